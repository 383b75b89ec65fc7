"""LoHa's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.adapters.peft_config import RankPatternConfig, config_field
from ...errors import ConfigError
from ...extras.rank_limits import require_rank_fitting_layer_size

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class LycorisConfig(RankPatternConfig):
    """The fields that LoHa and LoKr share."""

    kinds: ClassVar = ("linear", "conv")
    short_names: ClassVar = {"rank": "r", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"r": 8, "alpha": lambda given: 2 * given["r"], "target_modules": "all-linear"}

    r: int = config_field(
        8, "rank. LoHa: of each product; LoKr: of factors large enough to be products themselves", ge=1
    )
    alpha: float = config_field(8, "scale numerator: the update is scaled by alpha / r", gt=0)
    rank_dropout: float = config_field(
        0.0, "probability of dropping an output of the update, the same for all rows", ge=0, lt=1
    )
    module_dropout: float = config_field(0.0, "probability of leaving out a layer's update in one step", ge=0, lt=1)
    use_effective_conv2d: bool = config_field(
        False,
        "at Conv1d and Conv2d with a kernel larger than 1: factors that are small convolutions, of fewer parameters",
    )

    def effective_kernel(self, site: AdapterSite) -> tuple[int, int] | None:
        """Return the kernel of factors that are convolutions, `(k, 1)` for a Conv1d; None: they are matrices."""
        kernel = getattr(site.module, "kernel_size", ()) if site.kind == "conv" else ()
        if not self.use_effective_conv2d or math.prod(kernel) == 1:
            return None
        if len(kernel) > 2:
            message = f"use_effective_conv2d is True, and {site.name} is a Conv3d"
            raise ConfigError(message, "Conv1d and Conv2d only", "use_effective_conv2d=False")
        return (*kernel, 1)[:2]


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa: the elementwise product of two low-rank matrices beside frozen layers; PEFT's names and defaults."""

    name: ClassVar = "loha"
    prefix: ClassVar = "hada_"
    learning_rate: ClassVar = 5e-3

    init_weights: bool = config_field(True, "True: Kaiming-uniform, W2b zero; False: all four random, for tests")

    def build(self, site: AdapterSite) -> AdapterModule:
        from .loha_modules import ConvLoHa, LinearLoHa

        require_rank_fitting_layer_size(site, self.get_rank(site.name))
        return (ConvLoHa if site.kind == "conv" else LinearLoHa)(site, self)
