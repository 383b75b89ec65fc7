"""LoHa: y = W x + b + s · ((W1a W1b) ⊙ (W2a W2b)) x, the elementwise product of two low-rank matrices.

W1a, W2a (out, r), W1b, W2b (r, in), s = alpha / r. The product has rank up to r², with 2 r (in + out) parameters. W2b
starts at zero, so the model starts unchanged. Merged: W + s · (W1a W1b) ⊙ (W2a W2b).

An elementwise product of low-rank matrices is itself a low-rank matrix, with one rank for each pair (k, l) of ranks:

    B[:, kl] = W1a[:, k] ⊙ W2a[:, l]    A[kl, :] = W1b[k, :] ⊙ W2b[l, :]    (W1a W1b) ⊙ (W2a W2b) = B A

So where r² is small beside the layer's size, it runs and exports as a LoRA of rank r². Elsewhere the weight of the
update is computed in the forward pass and again in the backward pass, so that it is never kept.

At a convolution W is the matrix (out, in / groups · kernel size), and the update is a convolution with its weight. With
`use_effective_conv2d` each factor is a small convolution T (r, r, *kernel) between W1a^T (out, r) and W1b (r, in):

    W1_oik = Σ_pq W1a_po T1_pqk W1b_qi        parameters: 2 r (in + out) + 2 r² · kernel size

Papers: FedPara https://arxiv.org/abs/2108.06098, LyCORIS https://arxiv.org/abs/2309.14859. File format: PEFT's
`hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, and with `use_effective_conv2d` `hada_t1`, `hada_t2`.
"""

from .loha_config import LoHaConfig as LoHaConfig
from .loha_config import LycorisConfig as LycorisConfig
