"""LayerNorm tuning: only the norms train, or linear layers that are named.

    y = w' ⊙ n(x) + b'        n(x): the normalised input; w' (d), b' (d): trained copies of the norm's w and b

For a linear layer y = W' x + b'. The copies start equal to the base's, so the model starts unchanged. Parameters
added per norm: d, or 2 d with a bias. Merged: w + (w' − w), and the same for b, so that several merged adapters add up
their changes.

Paper: https://arxiv.org/abs/2312.11420. File format: PEFT's `ln_tuning_layers.weight`, `ln_tuning_layers.bias`.
"""

from .ln_tuning_config import LNTuningConfig as LNTuningConfig
