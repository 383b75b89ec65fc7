"""OFT: y = W Rᵀ x + b, where R rotates blocks of k inputs; each block R_i (k, k) is orthogonal, or nearly so.

A block comes from a skew-symmetric Q_i, stored as its k (k - 1) / 2 values above the diagonal, by n terms of a series
or by the Cayley transform:

    R = I + 2 Q + 2 Q² + … + 2 Q^(n-2) + Q^(n-1) ≈ (I + Q) (I - Q)^-1        the default
    R = (I - Q) (I + Q)^-1                                                   use_cayley_neumann=False

The two rotate in opposite directions for the same Q: a file only works with the setting it was trained with.

A part x_i (k) of the input, as a row, becomes x_i R_i. It is computed as x_i + x_i (R_i - I), so that only the change
is rounded. Q starts at zero, so the model starts unchanged. Parameters added per layer: in · (k - 1) / 2. Merged: W Rᵀ.

At a convolution without groups R rotates the `in · kernel size` values that an output sees, as where PEFT is merged.
Its forward pass rotates overlapping patches and adds them up, which changes the output even at the start.

Papers: OFT https://arxiv.org/abs/2306.07280, OFTv2 https://arxiv.org/abs/2506.19847. File format: PEFT's
`oft_R.weight (in / k, k (k - 1) / 2)`; for an embedding, whose output is rotated, `oft_embedding_R.weight`.
"""

from .oft_config import OFTConfig as OFTConfig
