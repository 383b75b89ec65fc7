"""LoKr: y = W x + b + s · (W1 ⊗ W2) x, a Kronecker product.

W1 (p, m), W2 (q, n), p·q = out, m·n = in, each pair as near to a square as the sizes (or `decompose_factor`) allow;
s = alpha / r. A matrix that is large beside r is a product of two: W2 = W2a (q, r) W2b (r, n), and with
`decompose_both` W1 = W1a (p, r) W1b (r, m). W1 starts at zero, so the model starts unchanged. Parameters added per
layer: p·m + r·(q + n), or fewer. Merged: W + s · W1 ⊗ W2.

At a convolution the factors of `in` are those of in / groups, and W2 (q, n · kernel size) is stored with its kernel, or
as W2a (q, r) W2b (r, n · kernel size), or with `use_effective_conv2d` as in `loha`: T2, W2a (r, q), W2b (r, n).

At a linear layer the forward pass never builds the product: with x reshaped to X (m, n), (W1 ⊗ W2) x is W1 X W2^T
(p, q).

Papers: LyCORIS https://arxiv.org/abs/2309.14859, FedPara https://arxiv.org/abs/2108.06098. File format: PEFT's
`lokr_w1`, `lokr_w2`, or `lokr_w1_a`, `lokr_w1_b`, `lokr_w2_a`, `lokr_w2_b`, `lokr_t2`.
"""

from .lokr_config import LoKrConfig as LoKrConfig
