"""The optimizers of a run: AdamW, or AdamW with 8-bit states, in groups by learning rate and weight decay.

lr of a group       the run's learning rate times the factor its method gives (LoRA+: B learns faster than A)
decay of a group    weight_decay, but 0 for biases and for the weights of normalisation layers
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from ..foundation.registry import Registry

OPTIMIZERS: Registry[Any] = Registry("slimtune.optimizers", "optimizer")
"""Functions that build an optimizer from parameter groups and a learning rate (extras/adamw_8bit.py)."""
STEP_ROUNDINGS: Registry[Any] = Registry("slimtune.step_roundings", "rounding of optimizer steps")
"""Functions that let an optimizer step bf16 parameters without losing small steps (extras/stochastic_rounding.py)."""
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of the parameter names that transformers' Trainer excludes from weight decay."""


def build_optimizer(model: Any, name: str = "adamw", *, lr: float = 1e-4, weight_decay: float = 0.0) -> Optimizer:
    """Return the optimizer of a model's trained parameters, real or fake; `name` is "adamw" or one of `OPTIMIZERS`."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    # The first group's rate is the one logged: that of parameters that decay.
    groups = parameter_groups(model, lr, weight_decay, decayed)
    # PyTorch's default instead of `fused`, `foreach`, takes temporary tensors of all parameters at once.
    built = torch.optim.AdamW(groups, lr=lr, fused=True) if name == "adamw" else OPTIMIZERS.load(name)(groups, lr=lr)
    in_fp32 = all(config.copies_in_fp32 for config in getattr(model, "peft_config", {}).values())
    return built if in_fp32 else STEP_ROUNDINGS.load("stochastic")(built)


def parameter_groups(
    model: Any, lr: float, weight_decay: float = 0.0, decayed: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups; each group's `lr` is multiplied by its method's factor.

    `decayed` has the names of the parameters that decay. None: matrices do, and biases, magnitudes and other vectors
    do not. Groups that decay come first.
    """
    multipliers: dict[int, float] = {}
    for adapter in getattr(model, "peft_config", ()):
        for module in model.adapter_modules(adapter).values():
            own = module.lr_multipliers()
            multipliers |= {id(p): own[n] for n, p in module.named_parameters() if n in own}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.dim() > 1 if decayed is None else name in decayed
            groups.setdefault((decays, multipliers.get(id(p), 1.0)), []).append(p)
    return [
        {"params": params, "lr": lr * multiplier, "weight_decay": weight_decay if decays else 0.0}
        for (decays, multiplier), params in sorted(groups.items(), key=lambda item: not item[0][0])
    ]
