"""HiRA: y = (W + W ⊙ (B A)) x + b, with W and b frozen: a high-rank change from low-rank factors.

A (r, in), B (out, r). B starts at zero, so the model starts unchanged; at an embedding A starts at zero and B
normal. Parameters added per layer: r · (in + out). Merged: W ⊙ (1 + B A).

At a convolution without groups A is (r, in, *kernel) and B (out, r, 1, …): as matrices, the factors of its weight's.

Paper: https://openreview.net/pdf?id=TwJrTz9cRS. File format: PEFT's `hira_A`, `hira_B`; for an embedding
`hira_embedding_A (r, rows)`, `hira_embedding_B (dim, r)`.
"""

from .hira_config import HiraConfig as HiraConfig
