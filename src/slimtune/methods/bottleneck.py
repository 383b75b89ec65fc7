"""Bottleneck adapters: a small two-layer network after a sub-layer, with a residual connection around it.

    y' = y + s · (U f(D h + c) + e)        D (m, d), c (m), U (d, m), e (d), f a non-linearity, d the hidden size

`style` says where it is and what `h` is (any field given besides overrides the style):

    houlsby    after the attention and after the feed-forward of each layer; h = y
    pfeiffer   after each layer, including its residual sum: y is the layer's output; h = y
    parallel   beside the feed-forward: h = x, the feed-forward's input (after its norm, where the norm comes first)

Parameters added per adapter: 2 · d · m + m + d, with m = d / reduction_factor; plus 1 with scaling="learned", d with
"channel". U and e start at zero, so the model starts unchanged. It cannot be merged: f is not linear.

Papers: Houlsby https://arxiv.org/abs/1902.00751, Pfeiffer https://arxiv.org/abs/2005.00247, parallel
https://arxiv.org/abs/2110.04366. PEFT lacks this method; the file has the tensor names of the `adapters` library:
`adapter_down.weight`, `.bias`, `adapter_up.weight`, `.bias`, and `scaling` where it is learned.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..core.adapters.adapter_module import AdapterModule, Block, Site
from ..core.adapters.architectures import ATTENTION, FEED_FORWARD, text_config
from ..core.adapters.peft_config import TargetedConfig, setting
from ..core.adapters.targets import layer_index
from ..core.kernels.dropout import dropout
from ..core.kernels.linear_layers import layer_kind, layer_sizes
from ..errors import ConfigError, TargetError, format_names

STYLES: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "is_parallel": False,
                "reduction_factor": 16, "non_linearity": "swish", "scaling": 1.0},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "is_parallel": False,
                 "reduction_factor": 16, "non_linearity": "relu", "scaling": 1.0},
    "parallel": {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "is_parallel": True,
                 "reduction_factor": 2, "non_linearity": "relu", "scaling": 4.0},
}  # fmt: skip
"""The `adapters` library's DoubleSeqBnConfig, SeqBnConfig and ParBnConfig."""

_OUTPUT_LAYERS = ("output.dense", "dense", "dense_4h_to_h", "down_proj", "out_proj")
"""Names of the last linear layer in a sub-layer that adds its residual itself (BERT's attention, BLOOM, MPT)."""


@dataclass
class BottleneckConfig(TargetedConfig):
    """Bottleneck adapters: a small network after, or beside, a sub-layer; Houlsby, Pfeiffer and parallel."""

    name: ClassVar = "bottleneck"
    # Fields of the `adapters` library, with its defaults.
    unsupported_peft_fields: ClassVar = {
        **dict.fromkeys(("ln_before", "ln_after", "use_gating", "adapter_residual_before_ln", "cross_adapter"), False),
        **dict.fromkeys(("inv_adapter", "inv_adapter_reduction_factor", "init_weights_seed"), None),
        "original_ln_after": True, "residual_before_ln": True, "phm_layer": False, "stochastic_depth": 0.0,
    }  # fmt: skip
    kinds: ClassVar = ("block",)
    mergeable: ClassVar = False
    short_names: ClassVar = {"rank": "bottleneck_size", "activation": "non_linearity", "targets": "target_modules"}

    style: Literal["houlsby", "pfeiffer", "parallel"] = setting(
        "pfeiffer", "sets each of the other fields that is None"
    )
    mh_adapter: bool | None = setting(None, "put an adapter after the attention of each layer; None: by style")
    output_adapter: bool | None = setting(None, "put one after the feed-forward of each layer; None: by style")
    original_ln_before: bool | None = setting(
        None, "put the feed-forward's adapter after the residual sum; None: by style"
    )
    is_parallel: bool | None = setting(None, "the adapter reads the sub-layer's input, not its output; None: by style")
    reduction_factor: float | dict[str | int, float] | None = setting(
        None, 'hidden size / bottleneck size, or by layer: {"1": 8, "default": 16}; None: by style, 16 or 2', gt=0
    )
    bottleneck_size: int | None = setting(None, "the bottleneck's size in units, instead of reduction_factor", ge=1)
    non_linearity: str | None = setting(
        None, 'a transformers activation, such as "gelu"; None: by style', choices=lambda: [*ACT2FN, "leakyrelu"]
    )
    scaling: float | Literal["learned", "channel"] | None = setting(
        None, 'factor on the output; "learned": one trained, "channel": one per hidden unit; None: by style, 1 or 4'
    )
    dropout: float = setting(0.0, "probability of dropping a unit of the adapter's output while training", ge=0, lt=1)
    init_weights: Literal["mam_adapter", "bert", "houlsby"] = setting(
        "mam_adapter",
        '"mam_adapter": zero up, so the model starts unchanged; "bert": normal; "houlsby": truncated normal',
    )
    leave_out: list[int] = setting(default_factory=list, help="numbers of the layers without an adapter, from 0", ge=0)

    def check(self) -> None:
        """Fill in the style, and check that the fields fit one another."""
        super().check()
        one_size = self.bottleneck_size is None or self.reduction_factor is None
        self.require(one_size, "bottleneck_size", "None where reduction_factor is given, or the reverse")
        if isinstance(self.reduction_factor, dict):
            self.reduction_factor = {str(k): v for k, v in self.reduction_factor.items()}
        for name, value in STYLES[self.style].items():
            if getattr(self, name) is None and not (name == "reduction_factor" and self.bottleneck_size is not None):
                # No module outputs the sum of the attention and its residual: such an adapter cannot read it.
                inside = name == "original_ln_before" and (self.mh_adapter or self.is_parallel)
                setattr(self, name, False if inside else value)
        has_place = self.mh_adapter or self.output_adapter or self.target_modules is not None
        self.require(bool(has_place), "output_adapter", "True, or mh_adapter True, or target_modules")
        readable = not (self.original_ln_before and (self.mh_adapter or self.is_parallel))
        self.require(readable, "original_ln_before", "False where mh_adapter or is_parallel is True")
        self.leave_out = sorted(self.leave_out)
        allowed = not self.leave_out or self.target_modules is None
        self.require(allowed, "leave_out", "empty where target_modules is given: use exclude_modules")

    def default_targets(self, model: nn.Module) -> list[str] | None:
        """Return the names of the chosen sub-layers in every layer."""
        layers, targets = find_transformer_layers(model), []
        numbers = {layer_index(name, None) for name in layers} - {None}
        unmatched = [i for i in self.leave_out if i not in numbers]
        if unmatched:
            raise TargetError(
                f"leave_out: {format_names(unmatched)} matches no layer", f"one of {format_names(numbers)}"
            )
        for name, layer in layers.items():
            if layer_index(name, None) in self.leave_out:
                continue
            if self.mh_adapter:
                targets.append(find_sublayer(name, layer, "attention", bool(self.is_parallel)))
            if self.original_ln_before:
                targets.append(name)
            elif self.output_adapter:
                targets.append(find_sublayer(name, layer, "feed-forward", bool(self.is_parallel)))
        return targets

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the adapters; each layer number in reduction_factor must be that of an adapted layer."""
        if isinstance(self.reduction_factor, dict):
            numbers = {str(layer_index(s.name, None)) for s in sites}
            unmatched = [k for k in self.reduction_factor if k not in numbers and k != "default"]
            if unmatched:
                message = f"reduction_factor: {format_names(unmatched)} matches no adapted layer"
                raise TargetError(message, f"one of {format_names(sorted(numbers))}")
        return [self.build(site) for site in sites]

    def build(self, site: Site) -> AdapterModule:
        """Return the adapter at `site`, with its layer's own size."""
        module = site.module
        sizes = layer_sizes(module) if layer_kind(module) == "linear" else (site.in_features, site.out_features)
        if not all(sizes):
            raise TargetError(f"the output size of {site.name} is unknown", "a model whose config has hidden_size")
        factor, layer = self.reduction_factor, layer_index(site.name, None)
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
        if self.bottleneck_size is None and factor is None:
            message = f"reduction_factor has no value for layer {layer}"
            raise ConfigError(message, "a value for each layer, or a 'default'")
        size = self.bottleneck_size or max(1, int(sizes[1] // factor))  # type: ignore[operator]
        return Bottleneck(site, sizes[0] if self.is_parallel else sizes[1], size, sizes[1], self)


class Bottleneck(Block):
    """`y + s · (U f(D h + c) + e)` for a sub-layer's input `x (..., d)` and output `y (..., d)`; h is one of them."""

    neutral: ClassVar = {"adapter_up.weight": 0.0, "adapter_up.bias": 0.0}

    def __init__(self, site: Site, inputs: int, size: int, outputs: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.is_parallel = config.is_parallel
        self.activation = F.leaky_relu if config.non_linearity == "leakyrelu" else ACT2FN[config.non_linearity]
        self.dropout = dropout(config.dropout)
        # In the order of the `adapters` library: one seed gives the same adapter in both libraries.
        self.adapter_down = nn.Linear(inputs, size, device=site.init_device)
        self.adapter_up = nn.Linear(size, outputs, device=site.init_device)
        for linear in (self.adapter_down, self.adapter_up):
            nn.init.zeros_(linear.bias)
            if config.init_weights == "bert":
                nn.init.normal_(linear.weight, std=0.02)
            elif config.init_weights == "houlsby":
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            elif linear is self.adapter_up:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        self.scaling: Any = config.scaling
        if isinstance(config.scaling, str):
            count = outputs if config.scaling == "channel" else 1
            self.scaling = nn.Parameter(torch.ones(count, device=site.init_device))
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.activation(_apply_linear(x.to(y.dtype) if self.is_parallel else y, self.adapter_down))
        scale = self.scaling.to(y.dtype) if isinstance(self.scaling, Tensor) else self.scaling
        return y + self.dropout(_apply_linear(h, self.adapter_up)) * scale


def _apply_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def find_transformer_layers(model: Any) -> dict[str, nn.Module]:
    """Return the model's layers by name: the entries of each outermost module list that contains sub-layers."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    lists = {n: m for n, m in lists.items() if any(_first_submodule(layer, ATTENTION + FEED_FORWARD) for layer in m)}
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    config, text = getattr(model, "config", None), text_config(model)
    if text is not config and hasattr(model, "get_decoder"):  # a multimodal model: leave its vision or audio tower out
        decoder_modules = set(model.get_decoder().modules())
        lists = {n: m for n, m in lists.items() if m in decoder_modules}
    layers = {f"{n}.{i}": layer for n, m in lists.items() for i, layer in enumerate(m)}
    expected = getattr(text, "num_hidden_layers", 1)
    if len(layers) < max(1, expected):
        message = f"found {len(layers)} of the {expected} layers of a {type(model).__name__}"
        expected_layers = "layers in a module list, with an attention and a feed-forward each"
        raise TargetError(message, expected_layers, "name the modules to adapt in target_modules")
    return layers


def find_sublayer(name: str, layer: nn.Module, what: Literal["attention", "feed-forward"], parallel: bool) -> str:
    """Return the full name of the module that returns a sub-layer's output, without its residual."""
    paths = ATTENTION if what == "attention" else FEED_FORWARD
    path = _first_submodule(layer, paths)
    module = layer.get_submodule(path) if path else None
    if module is not None and path not in ("fc2", "output.dense"):
        adds_residual = "residual" in inspect.signature(module.forward).parameters
        if adds_residual or _first_submodule(module, ("output.dense",)):
            output_layer = _first_submodule(module, _OUTPUT_LAYERS)
            path, module = f"{path}.{output_layer}", module.get_submodule(output_layer) if output_layer else None
    if module is None:
        children = format_names(n for n, _ in layer.named_children())
        message = f"the layer {name} ({type(layer).__name__}) has no known {what}; it has {children}"
        raise TargetError(message, f"one of {format_names(paths)}", "name the modules to adapt in target_modules")
    if parallel and layer_kind(module) is not None:
        message = f"the {what} of {name} is not a module ({path} gives its output), so its input is unknown"
        raise TargetError(message, "style 'houlsby' or 'pfeiffer'")
    return f"{name}.{path}"


def _first_submodule(module: nn.Module, paths: Sequence[str]) -> str:
    names = {n for n, _ in module.named_modules()}
    return next((p for p in paths if p in names), "")
