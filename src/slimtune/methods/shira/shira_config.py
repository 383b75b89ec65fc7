"""SHiRA's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.adapters.architectures import DEFAULT_TARGETS
from ...core.adapters.peft_config import FAN_IN_FAN_OUT_HELP, TargetedConfig, config_field
from ...errors import ConfigError

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


@dataclass
class ShiraConfig(TargetedConfig):
    """SHiRA: trained entries of a weight; PEFT's field names and defaults."""

    name: ClassVar = "shira"
    prefix: ClassVar = "shira_"
    learning_rate: ClassVar = 1e-3
    architecture_targets: ClassVar = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}
    fields_not_in_peft: ClassVar = frozenset(["exclude_modules", "layers_to_transform", "layers_pattern"])
    short_names: ClassVar = {"rank": "r", "seed": "random_seed", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"r": 16, "target_modules": "all-linear"}
    mask_fn: ClassVar[Callable[..., Any] | None] = None
    """`f(layer, r)` returns a mask `(out, in)` of the trained entries; set on a config, as in PEFT, and not saved."""

    r: int = config_field(32, "sets the number of entries, r · (in + out); does not limit the rank of the change", ge=1)
    mask_type: str = config_field("random", "how entries are chosen; any other name: by config.mask_fn")
    random_seed: int | None = config_field(
        None, "seed of the random positions; None: torch's default, the same each time", le=2**63 - 1
    )
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    init_weights: bool = config_field(True, "start at zero; False: normal random entries, for tests")

    def build(self, site: AdapterSite) -> AdapterModule:
        import torch

        from .shira_modules import SparseWeightUpdate, choose_trained_entries

        inputs, outputs = site.in_features, site.out_features
        n, size = self.r * (inputs + outputs), inputs * outputs
        if n > size:
            message = f"r={self.r} is {n:,} entries for {site.name}, which has {size:,}"
            raise ConfigError(message, f"r up to {size // (inputs + outputs)} there")
        no_indices = torch.zeros(2, n, dtype=torch.int32, device=site.init_device)
        indices = no_indices if site.skip_init else choose_trained_entries(self, site, n)
        return SparseWeightUpdate(site, indices, self.init_weights)
