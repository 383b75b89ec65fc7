"""VeRA's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.adapters.architectures import DEFAULT_TARGETS
from ...core.adapters.peft_config import BIAS_HELP, FAN_IN_FAN_OUT_HELP, TargetedConfig, config_field
from ...errors import TargetError
from ...extras.rank_limits import require_rank_fitting_layer_size

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite, SiteKind


@dataclass
class VeraConfig(TargetedConfig):
    """VeRA: two trained vectors per layer around random matrices shared by all; PEFT's field names and defaults."""

    name: ClassVar = "vera"
    prefix: ClassVar = "vera_lambda_"
    fields_not_in_peft: ClassVar = frozenset(["exclude_modules"])
    learning_rate: ClassVar = 1e-2
    architecture_targets: ClassVar = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}
    short_names: ClassVar = {"rank": "r", "dropout": "vera_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"target_modules": "all-linear"}

    r: int = config_field(256, "rank; larger than LoRA's, typically 128 to 1024", ge=1)
    projection_prng_key: int = config_field(0, "seed of A and B", le=2**63 - 1)
    save_projection: bool = config_field(
        True, "write A and B into the file; False: draw them again from the seed, which may differ in another torch"
    )
    vera_dropout: float = config_field(0.0, "probability of dropping an input of A while training", ge=0, lt=1)
    d_initial: float = config_field(0.1, "start of λ_d; usually 0.1 or less")
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "vera_only"] = config_field("none", BIAS_HELP)
    init_weights: bool = config_field(True, "True: λ_b zero, λ_d d_initial; False: λ_b one, λ_d normal, for tests")

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone, where A and B are stored."""
        from ...extras.prompt_learning.prompt_modules import find_backbone_name

        return {find_backbone_name(model): "model"}

    def file_key(self, key: str) -> str:
        """Return PEFT's key; those of A and B name no module of the model."""
        name = key.rpartition(".")[2]
        return f"base_model.{name}" if name in ("vera_A", "vera_B") else key

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        """Return the trained vectors of each layer, and A and B at the backbone."""
        from .vera_modules import LinearVera, SharedRandomProjections

        layers = [s for s in sites if s.kind != "model"]
        if not layers:
            raise TargetError(f"target_modules={self.target_modules!r} matches no module", "linear layers")
        for site in layers:
            require_rank_fitting_layer_size(site, self.r)
        widest = max(s.in_features for s in layers), max(s.out_features for s in layers)
        shared = next(SharedRandomProjections(s, self, *widest) for s in sites if s.kind == "model")
        return [shared if s.kind == "model" else LinearVera(s, self, shared) for s in sites]
