"""Bottleneck adapters's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import TargetedConfig, config_field
from ...errors import ConfigError, TargetError, format_names
from ...extras.rank_limits import require_rank_fitting_layer_size

if TYPE_CHECKING:
    from torch import nn

    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


STYLES: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "is_parallel": False,
                "reduction_factor": 16, "non_linearity": "swish", "scaling": 1.0},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "is_parallel": False,
                 "reduction_factor": 16, "non_linearity": "relu", "scaling": 1.0},
    "parallel": {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "is_parallel": True,
                 "reduction_factor": 2, "non_linearity": "relu", "scaling": 4.0},
}  # fmt: skip
"""The `adapters` library's DoubleSeqBnConfig, SeqBnConfig and ParBnConfig."""


def _list_activations() -> list[str]:
    from transformers.activations import ACT2FN

    return [*ACT2FN, "leakyrelu"]


@dataclass
class BottleneckConfig(TargetedConfig):
    """Bottleneck adapters: a small network after, or beside, a sub-layer; Houlsby, Pfeiffer and parallel."""

    name: ClassVar = "bottleneck"
    exists_in_peft: ClassVar = False
    # Fields of the `adapters` library, with its defaults.
    unsupported_peft_fields: ClassVar = {
        **dict.fromkeys(("ln_before", "ln_after", "use_gating", "adapter_residual_before_ln", "cross_adapter"), False),
        **dict.fromkeys(("inv_adapter", "inv_adapter_reduction_factor", "init_weights_seed"), None),
        "original_ln_after": True, "residual_before_ln": True, "phm_layer": False, "stochastic_depth": 0.0,
    }  # fmt: skip
    kinds: ClassVar = ("block",)
    mergeable: ClassVar = False
    short_names: ClassVar = {"rank": "bottleneck_size", "activation": "non_linearity", "targets": "target_modules"}

    style: Literal["houlsby", "pfeiffer", "parallel"] = config_field(
        "pfeiffer", "sets each of the other fields that is None"
    )
    mh_adapter: bool | None = config_field(None, "put an adapter after the attention of each layer; None: by style")
    output_adapter: bool | None = config_field(None, "put one after the feed-forward of each layer; None: by style")
    original_ln_before: bool | None = config_field(
        None, "put the feed-forward's adapter after the residual sum; None: by style"
    )
    is_parallel: bool | None = config_field(
        None, "the adapter reads the sub-layer's input, not its output; None: by style"
    )
    reduction_factor: float | dict[str | int, float] | None = config_field(
        None, 'hidden size / bottleneck size, or by layer: {"1": 8, "default": 16}; None: by style, 16 or 2', gt=0
    )
    bottleneck_size: int | None = config_field(
        None, "the bottleneck's size in units, instead of reduction_factor", ge=1
    )
    non_linearity: str | None = config_field(
        None, 'a transformers activation, such as "gelu"; None: by style', choices=_list_activations
    )
    scaling: float | Literal["learned", "channel"] | None = config_field(
        None, 'factor on the output; "learned": one trained, "channel": one per hidden unit; None: by style, 1 or 4'
    )
    dropout: float = config_field(
        0.0, "probability of dropping a unit of the adapter's output while training", ge=0, lt=1
    )
    init_weights: Literal["mam_adapter", "bert", "houlsby"] = config_field(
        "mam_adapter",
        '"mam_adapter": zero up, so the model starts unchanged; "bert": normal; "houlsby": truncated normal',
    )
    leave_out: list[int] = config_field([], "numbers of the layers without an adapter, from 0", ge=0)

    def normalize(self) -> None:
        """Fill in the style."""
        super().normalize()
        if isinstance(self.reduction_factor, dict):
            self.reduction_factor = {str(k): v for k, v in self.reduction_factor.items()}
        for name, value in STYLES[self.style].items():
            if getattr(self, name) is None and not (name == "reduction_factor" and self.bottleneck_size is not None):
                # No module outputs the sum of the attention and its residual: such an adapter cannot read it.
                inside = name == "original_ln_before" and (self.mh_adapter or self.is_parallel)
                setattr(self, name, False if inside else value)
        self.leave_out = sorted(self.leave_out)

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            yield self.error("bottleneck_size", "None where reduction_factor is given, or the reverse")
        has_place = self.mh_adapter or self.output_adapter or self.target_modules is not None
        if not has_place:
            yield self.error("output_adapter", "True, or mh_adapter True, or target_modules")
        if self.original_ln_before and (self.mh_adapter or self.is_parallel):
            yield self.error("original_ln_before", "False where mh_adapter or is_parallel is True")
        if self.leave_out and self.target_modules is not None:
            yield self.error("leave_out", "empty where target_modules is given: use exclude_modules")

    def default_targets(self, model: nn.Module) -> list[str] | None:
        """Return the names of the chosen sub-layers in every layer."""
        from ...core.adapters.targets import get_layer_index
        from .bottleneck_modules import find_sublayer_output_name, map_transformer_layers_by_name

        layers, targets = map_transformer_layers_by_name(model), []
        numbers = {get_layer_index(name, None) for name in layers} - {None}
        unmatched = [i for i in self.leave_out if i not in numbers]
        if unmatched:
            raise TargetError(
                f"leave_out: {format_names(unmatched)} matches no layer", f"one of {format_names(numbers)}"
            )
        for name, layer in layers.items():
            if get_layer_index(name, None) in self.leave_out:
                continue
            if self.mh_adapter:
                targets.append(find_sublayer_output_name(name, layer, "attention", bool(self.is_parallel)))
            if self.original_ln_before:
                targets.append(name)
            elif self.output_adapter:
                targets.append(find_sublayer_output_name(name, layer, "feed-forward", bool(self.is_parallel)))
        return targets

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        """Return the adapters; each layer number in reduction_factor must be that of an adapted layer."""
        from ...core.adapters.targets import get_layer_index

        if isinstance(self.reduction_factor, dict):
            numbers = {str(get_layer_index(s.name, None)) for s in sites}
            unmatched = [k for k in self.reduction_factor if k not in numbers and k != "default"]
            if unmatched:
                message = f"reduction_factor: {format_names(unmatched)} matches no adapted layer"
                raise TargetError(message, f"one of {format_names(sorted(numbers))}")
        return [self.build(site) for site in sites]

    def build(self, site: AdapterSite) -> AdapterModule:
        """Return the adapter at `site`, with its layer's own size."""
        from ...core.adapters.targets import get_layer_index
        from ...core.kernels.linear_layers import get_base_layer_type, get_in_and_out_features
        from .bottleneck_modules import Bottleneck

        module = site.module
        sizes = (
            get_in_and_out_features(module)
            if get_base_layer_type(module) == "linear"
            else (site.in_features, site.out_features)
        )
        if not all(sizes):
            raise TargetError(f"the output size of {site.name} is unknown", "a model whose config has hidden_size")
        factor, layer = self.reduction_factor, get_layer_index(site.name, None)
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
        if self.bottleneck_size is None and factor is None:
            message = f"reduction_factor has no value for layer {layer}"
            raise ConfigError(message, "a value for each layer, or a 'default'")
        size = self.bottleneck_size or max(1, int(sizes[1] // factor))  # type: ignore[operator]
        require_rank_fitting_layer_size(site, size, "bottleneck_size")
        return Bottleneck(site, sizes[0] if self.is_parallel else sizes[1], size, sizes[1], self)
