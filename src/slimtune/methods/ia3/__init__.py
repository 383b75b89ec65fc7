"""(IA)³: y = l ⊙ (W x + b); in feed-forward layers y = W (l ⊙ x) + b, with W and b frozen.

l (out), in feed-forward layers l (in), starts at one, so the model starts unchanged.
Parameters added per layer: out, or in. Merged: diag(l) W and l ⊙ b, or W diag(l) and b.

At a convolution l scales the channels of the output, or of the input.

Paper: https://arxiv.org/abs/2205.05638. File format: PEFT's `ia3_l`, as `(out, 1)` or `(1, in)`; at a
convolution `(1, channels, 1, …)`.
"""

from .ia3_config import IA3Config as IA3Config
