"""LoRA on parameters (`target_parameters`): the stacked weights of experts, or any matrix of a module.

    W (experts, out, in) + s · B_e A_e for expert e         A (r · experts, in), B (out, r · experts)

A is ordered by expert, then by rank; B by rank, then by expert: PEFT's file format (its `ParamWrapper`). A module whose
weights are stored as `(experts, in, out)` has `is_weight_transposed`; a matrix `(out, in)` counts as one expert.

The update is not added to the weight: the module's forward gets a `LowRankWeight` in the place of its parameter, so an
expert's update runs as two thin products on the tokens routed to it.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import conversion_mapping

from ...core.adapters.adapter_module import AdapterSite, BaseForward
from ...core.adapters.architectures import get_model_type
from ...core.adapters.name_patterns import find_matching_pattern
from ...core.adapters.targets import map_target_modules_by_name, strip_layer_prefixes_if_unambiguous
from ...errors import ConfigError, MixedBatchError, TargetError, UsageError, format_names
from .lora_init import initialize_lora_factors
from .lora_modules import LoraModuleBase
from .low_rank_weight import LowRankWeight, Term

TRANSPARENT_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
"""transformers' ways to run experts (`_experts_implementation`) whose products `LowRankWeight` knows."""


class ParameterLora(LoraModuleBase):
    """LoRA on one parameter of a module; one on an earlier parameter of the module is nested as `base_layer`.

    Args:
        names: the module's parameters to adapt, in the module's order.
    """

    def __init__(self, site: AdapterSite, config: Any, names: list[str]) -> None:
        *earlier, name = names
        full_name = f"{site.name}.{name}"
        if (field := find_field_unsupported_on_parameters(config)) is not None:
            hint = f"leave {field} out, or name layers in target_modules"
            raise ConfigError(f"{field} is {getattr(config, field)!r}, and {full_name} is a parameter", hint=hint)
        r, alpha = config.get_rank(full_name), config.get_alpha(full_name)
        super().__init__(site, config, r, alpha / math.sqrt(r) if config.use_rslora else alpha / r)
        # PEFT's order: one seed gives the same adapter in both libraries.
        if earlier:
            self.base_layer = ParameterLora(site, config, earlier)
        parameter: Any = site.module._parameters[name]
        if parameter.dim() not in (2, 3) or not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            message = f"{full_name} {tuple(parameter.shape)} in {parameter.dtype} cannot be adapted"
            raise TargetError(message, "an unquantized parameter of 2 or 3 dimensions")
        self.parameter_name, self.adapted_parameters = name, names
        self.num_experts = parameter.shape[0] if parameter.dim() == 3 else 1
        self.stacked = parameter.dim() == 3
        self.is_transposed = self.stacked and getattr(site.module, "is_transposed", False)
        out_features, in_features = parameter.shape[-2:]
        if self.is_transposed:
            in_features, out_features = out_features, in_features
        self.lora_A = nn.Linear(in_features, r * self.num_experts, bias=False, device=site.init_device)
        self.lora_B = nn.Linear(r * self.num_experts, out_features, bias=False, device=site.init_device)
        initialize_lora_factors(self.init, self.lora_A, self.lora_B, r)
        self.register_buffer("has_gradient", torch.zeros(self.num_experts, dtype=torch.bool), persistent=False)
        self.to(site.device, site.dtype)
        if config.freeze_a:
            self.frozen_names = [n for n, _ in self.named_parameters() if n.endswith("lora_A.weight")]
            self.lora_A.requires_grad_(False)

    @property
    def r(self) -> int:
        """The rank of an expert's update."""
        return self.lora_A.out_features // self.num_experts

    has_gradient: Tensor
    """Whether an expert's update got a gradient other than zero in the training so far, bool `(experts)`."""

    def each_parameter(self) -> Iterator["ParameterLora"]:
        """Yield this module and those nested in it: one for each adapted parameter."""
        yield self
        if "base_layer" in self._modules:
            yield from self.base_layer.each_parameter()

    def term(self) -> Term:
        """Return the update of the parameter as stored, `L (experts, m, r)`, `R (experts, r, n)`, s; or matrices."""
        A, B = self.lora_A.weight, self.lora_B.weight
        if not self.stacked:
            return B, A, self.scale
        A = A.view(self.num_experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return (A.mT, B.mT, self.scale) if self.is_transposed else (B, A, self.scale)

    def forward_with_base(self, base: BaseForward, *args: Any, **kwargs: Any) -> Any:
        terms: dict[str, list[Term]] = {}
        for adapter in (*base.inner_modules, self):
            if not isinstance(adapter, ParameterLora):
                message = f"LoRA on a parameter runs at the same module as a {type(adapter).__name__}"
                raise UsageError(message, "one kind of active adapter per module")
            for module in adapter.each_parameter():
                terms.setdefault(module.parameter_name, []).append(module.term())
        weights: dict[str, Any] = {n: LowRankWeight(getattr(base.module, n), found) for n, found in terms.items()}
        config = getattr(base.module, "config", None)
        if getattr(config, "_experts_implementation", None) not in TRANSPARENT_IMPLEMENTATIONS:
            weights = {n: weight.materialize() for n, weight in weights.items()}
        return base.run_base_with(weights, *args, **kwargs)

    def forward_batch_rows(self, base: BaseForward, *args: Any, **kwargs: Any) -> Any:
        message = "experts do not know a token's row, so a LoRA on their parameters cannot run a mixed batch"
        raise MixedBatchError(message, "one adapter for all rows with target_parameters", "set_adapter instead")

    def note_reached_experts(self) -> None:
        """Note which experts the last backward pass reached."""
        for module in self.each_parameter():
            grad: Any = module.lora_B.weight.grad
            if grad is not None:
                local = getattr(grad, "to_local", lambda grad=grad: grad)()  # FSDP shards the rows of B
                module.has_gradient |= local.ne(0).any(0).view(-1, module.num_experts).any(0)

    def extra_state(self) -> dict[str, Tensor]:
        return {module.parameter_name: module.has_gradient for module in self.each_parameter()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        for module in self.each_parameter():
            module.has_gradient.copy_(state[module.parameter_name])

    def low_rank_factors(self) -> None:
        return None

    def expert_factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        parts = list(self.each_parameter())
        if not all(part.stacked for part in parts):
            return {}
        terms = {part.parameter_name: (*part.term(), part.is_transposed) for part in reversed(parts)}
        return {n: (L.mT, R.mT, s) if transposed else (R, L, s) for n, (L, R, s, transposed) in terms.items()}

    def merge_into_parameter(self, name: str, parameter: Tensor) -> Tensor:
        for module in self.each_parameter():
            if module.parameter_name == name:
                L, R, scale = module.term()
                parameter = parameter + (L.to(parameter.dtype) @ R.to(parameter.dtype)) * scale
        return parameter


def find_field_unsupported_on_parameters(config: Any) -> str | None:
    """Return a setting that has no meaning for a parameter, whose input the adapter does not see, or None."""
    fields = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out", "alora_invocation_tokens")
    init = config.init_lora_weights
    named = not isinstance(init, bool) and init != "gaussian"
    return next((f for f in fields if getattr(config, f)), "init_lora_weights" if named else None)


MISREAD_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Names that PEFT takes for the experts of a checkpoint of transformers 4, in families converted like Qwen2-MoE.

PEFT moves such names from `target_modules` to the experts in `target_parameters` and doubles the rank there, also where
the model has linear layers of these names, in shared experts and dense layers. Their weights can be named in
`target_parameters`, which it leaves as they are: the tensors in the file have the same keys and shapes.
"""


def find_linears_peft_mistakes_for_experts(model: nn.Module) -> set[str]:
    """Return the names of the linear layers of a model that PEFT takes for experts (`MISREAD_PROJECTIONS`)."""
    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})  # what PEFT reads
    if families.get(get_model_type(model)) != "qwen2_moe":
        return set()
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return {n for n in linear if n.rpartition(".")[2] in MISREAD_PROJECTIONS}


def move_expert_like_targets_to_parameters(config: Any, model: nn.Module) -> None:
    """Move the targets of a LoraConfig that PEFT takes for experts from target_modules to target_parameters."""
    misread = find_linears_peft_mistakes_for_experts(model)
    targets = map_target_modules_by_name(model, config) if misread else {}
    if not (moved := [name for name in targets if name in misread]):
        return
    names = strip_layer_prefixes_if_unambiguous([f"{name}.weight" for name in moved], model)
    if (field := find_field_unsupported_on_parameters(config)) is not None:
        message = f"HF PEFT takes the targets {format_names(names)} for experts, and will not load this adapter"
        warnings.warn(f"{message}: {field} is {getattr(config, field)!r}", stacklevel=3)
        return
    rest = [name for name in targets if name not in misread]
    config.target_modules = strip_layer_prefixes_if_unambiguous(rest, model)
    config.layers_to_transform = config.layers_pattern = None
    config.target_parameters = [*(config.target_parameters or []), *names]
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for pattern in [p for p in patterns if any(find_matching_pattern([p], n) for n in moved)]:
            patterns[f"({pattern})\\.weight"] = patterns[pattern]
            if not any(find_matching_pattern([pattern], n) for n in rest):
                del patterns[pattern]
