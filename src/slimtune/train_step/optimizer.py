"""The optimizers of a run: AdamW, or AdamW with 8-bit states, in groups by learning rate and weight decay.

lr of a group       the run's learning rate times the factor its method gives (LoRA+: B learns faster than A)
decay of a group    weight_decay, but 0 for biases and for the weights of normalisation layers
"""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from ..adapters.optimizer import get_lr_multipliers
from ..kernels.adamw import adamw_8bit

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamw-8bit": (adamw_8bit, {}),
}
"""PyTorch's default instead of `fused`, `foreach`, takes temporary tensors of all parameters at once."""
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of the parameter names that transformers' Trainer excludes from weight decay."""


def build_optimizer(model: Any, name: str = "adamw", *, lr: float = 1e-4, weight_decay: float = 0.0) -> Optimizer:
    """Return the optimizer of a model's trained parameters, real or fake; `name` is a key of `OPTIMIZERS`."""
    optimizer, options = OPTIMIZERS[name]
    multipliers = get_lr_multipliers(model) if hasattr(model, "peft_config") else {}
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (parameter_name in decayed, multipliers.get(id(parameter), 1.0))
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: not item[0][0])  # the first group's rate is the one logged
    settings = [
        {"params": parameters, "lr": lr * multiplier, "weight_decay": weight_decay if decays else 0.0}
        for (decays, multiplier), parameters in ordered
    ]
    return optimizer(settings, lr=lr, **options)
