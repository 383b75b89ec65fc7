"""MiSS: y = W x + b + Dᵀ S x, where S x is the sum of the input's parts of r values each.

D (r, out), S x = Σ_i x[i r : (i + 1) r]; an input whose size r does not divide is padded with zeros. Every r-th column
of the weight gets the same update: a matrix of rank r. Parameters added per layer: r · out, half of LoRA's where
in = out. D starts at zero, so the model starts unchanged. Merged: W + Dᵀ S.

    "mini"  D (r, mini_r), repeated along the outputs: r · mini_r parameters
    "bat"   D (out / r, r, r): the block W_oi (r, r) of the weight becomes W_oi + W_oi D_o + D_o: an update that depends
            on the weight. r · out parameters; it reads and changes the whole weight in each forward pass.

Paper: https://arxiv.org/abs/2409.15371. File format: PEFT's `miss_block`.
"""

from .miss_config import MissConfig as MissConfig
