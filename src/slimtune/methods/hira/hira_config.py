"""HiRA's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.adapters.name_patterns import get_value_by_pattern
from ...core.adapters.peft_config import FAN_IN_FAN_OUT_HELP, TargetedConfig, config_field
from ...extras.rank_limits import require_rank_fitting_layer_size

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class HiraConfig(TargetedConfig):
    """HiRA: the weight times a low-rank matrix, elementwise; PEFT's field names and defaults."""

    name: ClassVar = "hira"
    prefix: ClassVar = "hira_"
    learning_rate: ClassVar = 3e-3
    kinds: ClassVar = ("linear", "embedding", "conv")
    short_names: ClassVar = {"rank": "r", "dropout": "hira_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"target_modules": "all-linear"}

    r: int = config_field(32, "rank of the factors; typically 8 to 64", ge=1)
    hira_dropout: float = config_field(0.0, "probability of dropping an input of the update while training", ge=0, lt=1)
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    init_weights: bool | Literal["gaussian"] = config_field(
        True,
        'True: Kaiming-uniform A; "gaussian": normal A; both with zero B (embeddings: zero A, normal B); False: random',
    )
    rank_pattern: dict[str, int] = config_field({}, "rank of single layers, by name or pattern", ge=1)

    @property
    def patterns(self) -> dict[str, dict]:
        """The fields that map layer patterns to values; each pattern must match a target."""
        return {"rank_pattern": self.rank_pattern}

    def build(self, site: AdapterSite) -> AdapterModule:
        import torch
        from torch import nn

        from .hira_modules import ConvHira, EmbeddingHira, LinearHira

        r = require_rank_fitting_layer_size(site, get_value_by_pattern(self.rank_pattern, site.name, self.r))
        # Random numbers are drawn in PEFT's order: one seed gives the same adapter in both libraries.
        kernel = site.require_ungrouped("HiRA") if site.kind == "conv" else ()
        A = torch.randn(r, site.in_features // math.prod(kernel), *kernel, device=site.init_device)
        B = torch.randn(site.out_features, r, *[1] * len(kernel), device=site.init_device)
        if site.kind == "embedding" and self.init_weights:
            A.zero_()
            nn.init.normal_(B)
        elif self.init_weights:
            B.zero_()
            if self.init_weights == "gaussian" and site.kind == "linear":  # at convolutions PEFT knows one start
                nn.init.normal_(A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        A, B = A.to(site.device, site.dtype), B.to(site.device, site.dtype)
        if site.kind == "embedding":
            return EmbeddingHira(A, B)
        return (ConvHira if site.kind == "conv" else LinearHira)(A, B, self.hira_dropout)
