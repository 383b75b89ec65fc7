"""Bottleneck adapters: a small two-layer network after a sub-layer, with the sub-layer's output going past it.

    y' = y + s · (U f(D h + c) + e)        D (m, d), c (m), U (d, m), e (d), f a non-linearity, d the hidden size

`style` says where it stands and what `h` is (any field given beside it wins):

    houlsby    after the attention and after the feed-forward of each layer; h = y
    pfeiffer   after each layer, its residual sum included: y is the stream the layer gives; h = y
    parallel   beside the feed-forward: h = x, what the feed-forward reads (normed, where its norm comes first)

Parameters added per adapter: 2 · d · m + m + d, with m = d / reduction_factor; plus 1 with scaling="learned", d with
"channel". U and e start at zero, so the model starts unchanged. Not mergeable: f is not linear.

Papers: Houlsby https://arxiv.org/abs/1902.00751, Pfeiffer https://arxiv.org/abs/2005.00247, parallel
https://arxiv.org/abs/2110.04366. File format, ours (PEFT has no such method), with the names of the `adapters` library:
`adapter_down.weight`, `.bias`, `adapter_up.weight`, `.bias`, and `scaling` where it is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...adapters.base import AdapterModule, Block, MergeUnsupported, Site, SiteKind
from ...adapters.config import TargetedConfig
from ...errors import ConfigError, TargetError, format_names, nearest
from ...kernels.dropout import dropout
from ...utils.linear_layers import layer_kind, layer_sizes
from .places import ATTENTION, FEED_FORWARD, layers_of, number, place

STYLES: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "is_parallel": False,
                "reduction_factor": 16, "non_linearity": "swish", "scaling": 1.0},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "is_parallel": False,
                 "reduction_factor": 16, "non_linearity": "relu", "scaling": 1.0},
    "parallel": {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "is_parallel": True,
                 "reduction_factor": 2, "non_linearity": "relu", "scaling": 4.0},
}  # fmt: skip
"""What the `adapters` library calls DoubleSeqBnConfig, SeqBnConfig and ParBnConfig."""


@dataclass
class BottleneckConfig(TargetedConfig):
    """Bottleneck adapters: a small network after, or beside, a sub-layer; Houlsby, Pfeiffer and parallel.

    Args:
        style: "houlsby", "pfeiffer" or "parallel": sets each field below that is None.
        mh_adapter: put an adapter after the attention of each layer. None: as the style has it.
        output_adapter: put one after the feed-forward of each layer. None: as the style has it.
        original_ln_before: the feed-forward's adapter stands after the whole layer, residual included. None: as the
            style has it.
        is_parallel: the adapter reads the sub-layer's input instead of its output. None: as the style has it.
        reduction_factor: hidden size over bottleneck size, above 0; or layer number → its own, "default" for the rest:
            `{"1": 8, "default": 16}`. None: 16, parallel 2.
        bottleneck_size: the bottleneck's size in units, 1 and up, in place of reduction_factor.
        non_linearity: a transformers name: "relu", "gelu", "swish", "tanh" … None: as the style has it.
        scaling: factor on what the adapter adds, any number; "learned": one trained factor for each adapter; "channel":
            one for each hidden unit. None: 1, parallel 4.
        dropout: probability in [0, 1) of dropping a unit of what the adapter adds while training.
        init_weights: "mam_adapter": Kaiming-uniform down, zero up, so that nothing changes at first; "bert": both
            normal with std 0.02; "houlsby": both truncated normal with std 0.01.
        leave_out: numbers of the layers that get no adapter, from 0.
    """

    name: ClassVar[str] = "bottleneck"
    # The rest of the `adapters` library's fields.
    unsupported_peft_fields: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("ln_before", "ln_after", "use_gating", "adapter_residual_before_ln", "cross_adapter"), False),
        **dict.fromkeys(("inv_adapter", "inv_adapter_reduction_factor", "init_weights_seed"), None),
        **dict.fromkeys(("original_ln_after", "residual_before_ln"), True),
        "phm_layer": False,
        "stochastic_depth": 0.0,
    }
    kinds: ClassVar[tuple[SiteKind, ...]] = ("block",)
    mergeable: ClassVar[bool] = False
    short_names: ClassVar[dict[str, str]] = {
        "rank": "bottleneck_size",
        "activation": "non_linearity",
        "targets": "target_modules",
    }

    style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    mh_adapter: bool | None = None
    output_adapter: bool | None = None
    original_ln_before: bool | None = None
    is_parallel: bool | None = None
    reduction_factor: float | dict[str | int, float] | None = None
    bottleneck_size: int | None = None
    non_linearity: str | None = None
    scaling: float | Literal["learned", "channel"] | None = None
    dropout: float = 0.0
    init_weights: Literal["mam_adapter", "bert", "houlsby"] = "mam_adapter"
    leave_out: list[int] = field(default_factory=list)

    def check(self) -> None:
        """Fill in the style and check ranges, and that the flags go together."""
        super().check()
        self.require(self.style in STYLES, "style", f"one of {format_names(STYLES)}{nearest(self.style, STYLES)}")
        self._check_size()
        for name, value in STYLES[self.style].items():
            if getattr(self, name) is None and (name != "reduction_factor" or self.bottleneck_size is None):
                # The sum of the attention and its residual is computed inside the layer, where nothing can stand.
                setattr(self, name, False if name == "original_ln_before" and self._only_inside() else value)
        asked = self.mh_adapter or self.output_adapter or self.target_modules is not None
        self.require(bool(asked), "output_adapter", "true, or mh_adapter true, or target_modules")
        self.require(
            not (self.original_ln_before and self._only_inside()),
            "original_ln_before",
            "False where mh_adapter or is_parallel is true: there is nothing to read between a layer's sub-layers",
        )
        known = self.non_linearity in ACT2FN or self.non_linearity == "leakyrelu"
        self.require(known, "non_linearity", f"a transformers name{nearest(str(self.non_linearity), ACT2FN)}")
        number = isinstance(self.scaling, int | float) and not isinstance(self.scaling, bool)
        self.require(number or self.scaling in ("learned", "channel"), "scaling", "a number, 'learned' or 'channel'")
        self.require_share("dropout")
        self.require(self.init_weights in _STARTS, "init_weights", f"one of {format_names(_STARTS)}")
        self.leave_out = sorted(self.leave_out or [])
        whole = all(isinstance(i, int) and i >= 0 for i in self.leave_out)
        self.require(whole, "leave_out", "numbers of layers, from 0")
        self.require(
            not (self.leave_out and self.target_modules is not None),
            "leave_out",
            "empty where target_modules is given: exclude_modules takes modules out of it",
        )

    def _check_size(self) -> None:
        size, by = self.bottleneck_size, self.reduction_factor
        self.require_whole("bottleneck_size", none=True)
        self.require(size is None or by is None, "bottleneck_size", "None where reduction_factor is given, or reversed")
        if isinstance(by, dict):
            self.reduction_factor = by = {str(k): v for k, v in by.items()}
        numbers = by.values() if isinstance(by, dict) else [] if by is None else [by]
        right = all(isinstance(n, int | float) and n > 0 for n in numbers)
        self.require(right, "reduction_factor", "above 0, or layer numbers with values above 0")

    def _only_inside(self) -> bool:
        return bool(self.mh_adapter or self.is_parallel)

    def default_targets(self, model: nn.Module) -> list[str] | None:
        """Return the names of the sub-layers asked for, in every layer.

        Raises:
            TargetError: the layers are not found, one of them lacks what was asked for, or leave_out matches none.
        """
        layers, found = layers_of(model), []
        numbers = {n for name in layers for n in [number(name)] if n is not None}
        vain = [i for i in self.leave_out if i not in numbers]
        if vain:
            raise TargetError(f"leave_out: {format_names(vain)} matches no layer", f"layers 0 to {max(numbers)}")
        for name, layer in layers.items():
            if number(name) in self.leave_out:
                continue
            if self.mh_adapter:
                found.append(place(name, layer, "attention", ATTENTION, bool(self.is_parallel)))
            if self.original_ln_before:
                found.append(name)
            elif self.output_adapter:
                found.append(place(name, layer, "feed-forward", FEED_FORWARD, bool(self.is_parallel)))
        return found

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the adapters; each layer number in reduction_factor must be one of an adapted layer."""
        if isinstance(self.reduction_factor, dict):
            have = [str(n) for n in sorted({number(s.name) for s in sites} - {None})]  # type: ignore[type-var]
            vain = [k for k in self.reduction_factor if k not in have and k != "default"]
            if vain:
                raise TargetError(
                    f"reduction_factor: {format_names(vain)} matches no adapted layer", f"one of {format_names(have)}"
                )
        return [self.build(site) for site in sites]

    def build(self, site: Site) -> AdapterModule:
        """Return the adapter at `site`, with its layer's own size."""
        module = site.module
        widths = layer_sizes(module) if layer_kind(module) == "linear" else (site.in_features, site.out_features)
        if not all(widths):
            raise TargetError(f"the size of what {site.name} gives is unknown", "a model whose config has hidden_size")
        if self.bottleneck_size is not None:
            size = self.bottleneck_size
        else:
            size = max(1, int(widths[1] // self._reduction(number(site.name))))
        return Bottleneck(site, widths[0] if self.is_parallel else widths[1], size, widths[1], self)

    def _reduction(self, layer: int | None) -> float:
        by = self.reduction_factor
        if not isinstance(by, dict):
            assert by is not None
            return by
        if str(layer) in by or "default" in by:
            return by.get(str(layer), by.get("default", 1.0))
        raise ConfigError(f"reduction_factor has no value for layer {layer}", "a value for each layer, or a 'default'")


class Bottleneck(Block):
    """`y + s · (U f(D h + c) + e)` for a sub-layer's input `x (..., d)` and output `y (..., d)`; h is one of them."""

    def __init__(self, site: Site, reads: int, size: int, gives: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.parallel, self.place = config.is_parallel, site.name
        self.f = F.leaky_relu if config.non_linearity == "leakyrelu" else ACT2FN[config.non_linearity]
        self.dropout = dropout(config.dropout)
        # Made and filled in the order of the `adapters` library.
        self.adapter_down = nn.Linear(reads, size, device=site.init_device)
        self.adapter_up = nn.Linear(size, gives, device=site.init_device)
        for linear in (self.adapter_down, self.adapter_up):
            nn.init.zeros_(linear.bias)
            _STARTS[config.init_weights](linear.weight, linear is self.adapter_up)
        self.scaling: Any = config.scaling
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(
                torch.ones(gives if config.scaling == "channel" else 1, device=site.init_device)
            )
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x, y (..., d)` to `(..., d)`; computes in y's dtype whatever the adapter is kept in."""
        h = self.f(_linear(x.to(y.dtype) if self.parallel else y, self.adapter_down))
        scale = self.scaling.to(y.dtype) if isinstance(self.scaling, Tensor) else self.scaling
        return y + self.dropout(_linear(h, self.adapter_up)) * scale

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: between the two maps stands a non-linearity."""
        raise MergeUnsupported(f"the bottleneck adapter at {self.place} is not linear, so that no weight can hold it")


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def _kaiming_or_zero(weight: Tensor, up: bool) -> None:
    nn.init.zeros_(weight) if up else nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


_STARTS = {
    "mam_adapter": _kaiming_or_zero,
    "bert": lambda weight, _: nn.init.normal_(weight, std=0.02),
    "houlsby": lambda weight, _: nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02),
}
