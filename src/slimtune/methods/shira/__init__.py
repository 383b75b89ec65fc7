"""SHiRA: y = (W + S) x + b, with W and b frozen and S sparse: a few single entries of the weight train.

S has n = r · (in + out) entries, as many as a LoRA of rank r has parameters, at random positions; they start at zero,
so the model starts unchanged. Parameters added per layer: n. Merged: W + S, a change of any rank.

Paper: https://arxiv.org/abs/2406.13175. File format: PEFT's `shira_weight (n)` and `shira_indices (2, n)`, the rows and
columns of the entries in row-major order.
"""

from .shira_config import ShiraConfig as ShiraConfig
