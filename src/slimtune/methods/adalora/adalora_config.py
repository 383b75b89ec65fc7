"""AdaLoRA's settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.adapters.architectures import DEFAULT_TARGETS
from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import BIAS_HELP, FAN_IN_FAN_OUT_HELP, TargetedConfig, config_field
from ...errors import ConfigError, PeftWarning
from ...extras.rank_limits import require_rank_fitting_layer_size
from ..lora.lora_config import LoraConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass
class AdaLoraConfig(TargetedConfig):
    """AdaLoRA: low-rank updates whose ranks are reallocated in training; PEFT's field names and defaults."""

    name: ClassVar = "adalora"
    prefix: ClassVar = "lora_"
    learning_rate: ClassVar = 5e-3
    kinds: ClassVar = ("linear", "conv")
    architecture_targets: ClassVar = DEFAULT_TARGETS | {
        **dict.fromkeys(("bart", "opt"), _ENCODER_TARGETS),
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "roberta": ["query", "key", "value", "dense"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    }
    unsupported_peft_fields: ClassVar = {
        **LoraConfig.unsupported_peft_fields,
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"), False),
        **dict.fromkeys(
            ("trainable_token_indices", "alora_invocation_tokens", "eva_config", "corda_config", "lora_ga_config",
             "layer_replication")
        ),
        "loftq_config": {}, "alpha_pattern": {},
    }  # fmt: skip
    short_names: ClassVar = {
        "rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
    }  # fmt: skip
    recipe_defaults: ClassVar = {"lora_alpha": lambda g: 2 * g.get("init_r", 12), "target_modules": "all-linear"}
    training_written_fields: ClassVar = frozenset({"rank_pattern", "total_step"})

    target_r: int = config_field(8, "average rank of a layer at the end", ge=1)
    init_r: int = config_field(12, "rank each layer starts with, at least target_r; typically 1.5 times target_r", ge=1)
    tinit: int = config_field(0, "steps before the first rank is pruned", ge=0)
    tfinal: int = config_field(0, "steps at the end during which the ranks stay fixed", ge=0)
    deltaT: int = config_field(1, "steps between two reallocations", ge=1)
    beta1: float = config_field(0.85, "smoothing of the sensitivities", gt=0, lt=1)
    beta2: float = config_field(0.85, "smoothing of their deviations", gt=0, lt=1)
    orth_reg_weight: float = config_field(0.5, "factor of the regularization loss", ge=0)
    total_step: int | None = config_field(
        None, "optimizer steps of the whole training; None: slimtune train fills it in", ge=1
    )
    rank_pattern: dict[str, list[bool]] | None = config_field(None, "which ranks each layer keeps; training writes it")
    lora_alpha: float = config_field(8, "scale numerator: the update is scaled by lora_alpha / init_r", gt=0)
    lora_dropout: float = config_field(0.0, "probability of dropping an input of A while training", ge=0, lt=1)
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "lora_only"] = config_field("none", BIAS_HELP)
    init_lora_weights: bool = config_field(
        True, "True: A and B normal with std 0.02, E zero; False: all random, for tests"
    )
    r: int = config_field(8, "not used, as in PEFT: init_r is the rank")

    def normalize(self) -> None:
        super().normalize()
        self.rank_pattern = self.rank_pattern or None

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.init_r < self.target_r:
            yield self.error("init_r", f"at least target_r ({self.target_r})")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            message = f"The supplied schedule values don't allow for a budgeting phase: total_step is {self.total_step}"
            yield FieldError("total_step", message, f"above tinit + tfinal ({self.tinit} + {self.tfinal})")
        if self.r != 8:
            text = (
                "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the initial rank, use"
            )
            warnings.warn(f"{text} `init_r` instead.", PeftWarning, stacklevel=4)

    def build(self, site: AdapterSite) -> AdapterModule:
        """Return the adapter module at `site`; when loading a file, with the ranks that it keeps."""
        from .adalora_modules import LinearAdaLora

        kept = (self.rank_pattern or {}).get(f"{site.name}.lora_E") if site.skip_init else None
        if site.kind == "conv":
            site.require_ungrouped("AdaLoRA")
        rank = require_rank_fitting_layer_size(site, self.init_r, "init_r")
        return LinearAdaLora(site, self, rank if kept is None else sum(kept))

    def max_added_bytes(self, adapter_modules: Mapping[str, AdapterModule]) -> int:
        return 0  # training only removes ranks

    def on_train_begin(self, total_steps: int) -> None:
        """Fill in the number of steps if none is given."""
        if self.total_step is None:
            self.total_step = total_steps
            self.check_conflicts()

    def on_step_end(self, adapter_modules: Mapping[str, AdapterModule], step: int) -> None:
        """Update the scores from this step's gradients, and set the ranks beyond the budget to zero."""
        from .adalora_modules import allocate_ranks

        if self.total_step is None:
            raise ConfigError("total_step is None", "the steps of the whole training", "AdaLoraConfig(total_step=…)")
        modules: list[Any] = list(adapter_modules.values())
        last = self.total_step - self.tfinal
        for module in modules:
            if step < last:
                module.update_averages(self.beta1, self.beta2)
            elif step > last:
                module.zero_pruned_ranks()
        if step == last or (self.tinit < step < last and step % self.deltaT == 0):
            allocate_ranks(self, modules, 1 - (step - self.tinit) / (last - self.tinit))
        if step == last:
            for module in modules:
                module.averages.clear()

    def regularization_loss(self, adapter_modules: Mapping[str, AdapterModule]) -> Tensor | None:
        """Return orth_reg_weight · mean ‖P Pᵀ - I‖ (Frobenius) over every A and Bᵀ."""
        from .adalora_modules import compute_mean_orthogonality_norm

        if not self.orth_reg_weight or not adapter_modules:
            return None
        return self.orth_reg_weight * compute_mean_orthogonality_norm(list(adapter_modules.values()))
