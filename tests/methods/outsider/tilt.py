"""Tilt: y' = y + g ⊙ y + v, one gain and one shift for each output; the method of a third party, in forty lines.

g (out), v (out), both zero at the start. Merged: W' = (1 + g) ⊙ W, b' = (1 + g) ⊙ b + v.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from slimtune.adapters.base import AdapterModule, MergeUnsupported, Site
from slimtune.adapters.config import TargetedConfig


@dataclass
class TiltConfig(TargetedConfig):
    """Tilt: a gain (and a shift) for each output of linear maps.

    Args:
        shift: also train a shift of each output.
    """

    name: ClassVar[str] = "tilt"
    recipe_defaults: ClassVar[dict] = {"target_modules": "all-linear"}
    shift: bool = False

    def build(self, site: Site) -> AdapterModule:
        return Tilt(site, self.shift)


class Tilt(AdapterModule):
    def __init__(self, site: Site, shift: bool) -> None:
        super().__init__()
        how = {"device": site.device, "dtype": site.dtype}
        self.tilt_gain = nn.Parameter(torch.zeros(site.out_features, **how))
        self.tilt_shift = nn.Parameter(torch.zeros(site.out_features, **how)) if shift else None

    def forward(self, x, y):
        y = y + self.tilt_gain.to(y.dtype) * y
        return y if self.tilt_shift is None else y + self.tilt_shift.to(y.dtype)

    def merge_into(self, weight, bias):
        if bias is None and self.tilt_shift is not None:
            raise MergeUnsupported("the base has no bias to hold the shift")
        gain = 1 + self.tilt_gain.to(weight.dtype)
        shift = 0 if self.tilt_shift is None else self.tilt_shift
        return gain[:, None] * weight, None if bias is None else gain * bias + shift
