"""What is left out by chance while training: single inputs, or whole outputs of an update."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dropout(probability: float) -> nn.Module:
    """Return a dropout of inputs; where the probability is 0 a module that does nothing."""
    return nn.Dropout(probability) if probability else nn.Identity()


def chance(module: nn.Module) -> float:
    """Return the probability with which a module made by `dropout` leaves out an input at this moment."""
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def kept(outputs: int, probability: float, *, rescale: bool) -> Tensor:
    """Draw which outputs of an update stay, as 0 and 1 `(outputs)`; with `rescale` their mean is 1."""
    # On the CPU, as PEFT draws them.
    drop = (torch.rand(outputs) > probability).float()
    return drop / drop.mean().clamp_min(1 / outputs) if rescale else drop
