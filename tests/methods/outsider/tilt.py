"""Tilt: y' = y + g ⊙ y + v, one trained gain and one trained shift per output of a linear layer.

g (out) and v (out) start at zero, so the model starts unchanged. Merged: W' = (1 + g) ⊙ W, b' = (1 + g) ⊙ b + v.
An example of a method in a package of its own: see docs/internals/adding_a_method.md.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from slimtune.core.adapters.adapter_module import AdapterModule, AdapterSite, MergeUnsupported
from slimtune.core.adapters.config_fields import config_field
from slimtune.core.adapters.peft_config import TargetedConfig


@dataclass
class TiltConfig(TargetedConfig):
    """Tilt: a gain (and a shift) for each output of linear layers."""

    name: ClassVar[str] = "tilt"
    recipe_defaults: ClassVar[dict] = {"target_modules": "all-linear"}

    shift: bool = config_field(False, "also train a shift of each output")

    def build(self, site: AdapterSite) -> AdapterModule:
        return LinearTilt(site, self.shift)


class LinearTilt(AdapterModule):
    def __init__(self, site: AdapterSite, shift: bool) -> None:
        super().__init__()
        zeros = torch.zeros(site.out_features, device=site.device, dtype=site.dtype)
        self.tilt_gain = nn.Parameter(zeros)
        self.tilt_shift = nn.Parameter(zeros.clone()) if shift else None

    def forward(self, x, y):
        y = y + self.tilt_gain.to(y.dtype) * y
        return y if self.tilt_shift is None else y + self.tilt_shift.to(y.dtype)

    def get_no_op_values(self, site):
        return {name: 0.0 for name, _ in self.named_parameters()}

    def merge_into(self, weight, bias):
        if bias is None and self.tilt_shift is not None:
            raise MergeUnsupported("the base has no bias to hold the shift")
        gain = 1 + self.tilt_gain.to(weight.dtype)
        shift = 0 if self.tilt_shift is None else self.tilt_shift
        return gain[:, None] * weight, None if bias is None else gain * bias + shift
