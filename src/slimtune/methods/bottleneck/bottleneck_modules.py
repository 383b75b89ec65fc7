"""Bottleneck adapters's adapter modules."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...core.adapters.adapter_module import AdapterSite, SubLayerOutputAdapter
from ...core.adapters.architectures import ATTENTION, FEED_FORWARD, get_text_config
from ...core.kernels.dropout import make_dropout
from ...core.kernels.linear_layers import get_base_layer_type
from ...errors import TargetError, format_names
from .bottleneck_config import BottleneckConfig

_OUTPUT_LAYERS = ("output.dense", "dense", "dense_4h_to_h", "down_proj", "out_proj")
"""Names of the last linear layer in a sub-layer that adds its residual itself (BERT's attention, BLOOM, MPT)."""


class Bottleneck(SubLayerOutputAdapter):
    """`y + s · (U f(D h + c) + e)` for a sub-layer's input `x (..., d)` and output `y (..., d)`; h is one of them."""

    no_op_values: ClassVar = {"adapter_up.weight": 0.0, "adapter_up.bias": 0.0}

    def __init__(self, site: AdapterSite, inputs: int, size: int, outputs: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.is_parallel = config.is_parallel
        self.activation = F.leaky_relu if config.non_linearity == "leakyrelu" else ACT2FN[config.non_linearity]
        self.dropout = make_dropout(config.dropout)
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


def map_transformer_layers_by_name(model: Any) -> dict[str, nn.Module]:
    """Return the model's layers by name: the entries of each outermost module list that contains sub-layers."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    lists = {n: m for n, m in lists.items() if any(_first_submodule(layer, ATTENTION + FEED_FORWARD) for layer in m)}
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    config, text = getattr(model, "config", None), get_text_config(model)
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


def find_sublayer_output_name(
    name: str, layer: nn.Module, sublayer: Literal["attention", "feed-forward"], require_whole_sublayer: bool
) -> str:
    """Return the full name of the module that returns a sub-layer's output, without its residual."""
    paths = ATTENTION if sublayer == "attention" else FEED_FORWARD
    path = _first_submodule(layer, paths)
    module = layer.get_submodule(path) if path else None
    if module is not None and path not in ("fc2", "output.dense"):
        adds_residual = "residual" in inspect.signature(module.forward).parameters
        if adds_residual or _first_submodule(module, ("output.dense",)):
            output_layer = _first_submodule(module, _OUTPUT_LAYERS)
            path, module = f"{path}.{output_layer}", module.get_submodule(output_layer) if output_layer else None
    if module is None:
        children = format_names(n for n, _ in layer.named_children())
        message = f"the layer {name} ({type(layer).__name__}) has no known {sublayer}; it has {children}"
        raise TargetError(message, f"one of {format_names(paths)}", "name the modules to adapt in target_modules")
    if require_whole_sublayer and get_base_layer_type(module) is not None:
        message = f"the {sublayer} of {name} is not a module ({path} gives its output), so its input is unknown"
        raise TargetError(message, "style 'houlsby' or 'pfeiffer'")
    return f"{name}.{path}"


def _first_submodule(module: nn.Module, paths: Sequence[str]) -> str:
    names = {n for n, _ in module.named_modules()}
    return next((p for p in paths if p in names), "")
