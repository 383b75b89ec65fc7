"""MiSS's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import BIAS_HELP, TargetedConfig, config_field
from ...errors import ConfigError

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class MissConfig(TargetedConfig):
    """MiSS: one low-rank update shared by every part of the input; PEFT's field names and defaults."""

    name: ClassVar = "miss"
    prefix: ClassVar = "miss_"
    learning_rate: ClassVar = 5e-4
    short_names: ClassVar = {"rank": "r", "dropout": "miss_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"r": 32, "target_modules": "all-linear"}

    r: int = config_field(64, "length of a part of the input, and rank; at most the layers' inputs", ge=1)
    miss_dropout: float = config_field(
        0.0, 'probability of dropping an input of the update; not with "bat"', ge=0, lt=1
    )
    mini_r: int = config_field(1, 'outputs after which "mini" repeats D; must divide the layers\' outputs', ge=1)
    init_weights: bool | Literal["bat", "mini"] = config_field(
        True,
        'True: plain; "mini": D repeated along the outputs; "bat": an update that depends on W; False: random start',
    )
    bias: Literal["none", "all", "MiSS_only"] = config_field("none", BIAS_HELP)

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.init_weights == "bat" and self.miss_dropout:
            yield self.error("miss_dropout", "0 with 'bat'")

    def build(self, site: AdapterSite) -> AdapterModule:
        from .miss_modules import LinearBat, LinearMiss

        in_, out, r, bat = site.in_features, site.out_features, self.r, self.init_weights == "bat"
        layer = f"{site.name} ({in_} inputs, {out} outputs)"
        if r > in_:
            message = f"`r` ({r}) must be less than or equal to in_features ({in_}) of {site.name}"
            raise ConfigError(message, hint=f"r={in_}")
        if bat and (in_ % r or out % r):
            hint = f"r={math.gcd(in_, out)}"
            raise ConfigError(f"r is {r}, at {layer}", "a divisor of both with init_weights='bat'", hint)
        if self.init_weights == "mini" and out % self.mini_r:
            hint = f"mini_r={math.gcd(out, self.mini_r)}"
            raise ConfigError(f"mini_r is {self.mini_r}, at {layer}", "a divisor of the outputs", hint)
        return (LinearBat if bat else LinearMiss)(site, self)
