"""Where a model's layers keep their attention and their feed-forward, found by structure and by the names in use."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...adapters.architectures import ATTENTION, FEED_FORWARD
from ...errors import TargetError, format_names
from ...utils.linear_layers import layer_kind

# The output map of a sub-layer that adds its residual itself (BERT's attention, BLOOM, MPT).
_INSIDE = ("output.dense", "dense", "dense_4h_to_h", "down_proj", "out_proj")


def layers_of(model: Any) -> dict[str, nn.Module]:
    """Return the model's layers by name: the entries of each outermost list in which one has a sub-layer."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    lists = {n: m for n, m in lists.items() if any(_first(layer, ATTENTION + FEED_FORWARD) for layer in m)}
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is not config and hasattr(model, "get_decoder"):  # beside a tower for pictures or sound
        inside = set(model.get_decoder().modules())
        lists = {n: m for n, m in lists.items() if m in inside}
    layers = {f"{n}.{at}": layer for n, m in lists.items() for at, layer in enumerate(m)}
    if len(layers) < max(1, getattr(text, "num_hidden_layers", 1)):
        raise TargetError(
            f"found {len(layers)} of the {getattr(text, 'num_hidden_layers', 1)} layers of a {type(model).__name__}",
            "layers in a list, with an attention and a feed-forward each",
            "name the modules to adapt in target_modules",
        )
    return layers


def place(name: str, layer: nn.Module, what: str, paths: Sequence[str], parallel: bool) -> str:
    """Return the full name of a layer's sub-layer: of the module whose output is y, before any residual."""
    path = _first(layer, paths)
    module = layer.get_submodule(path) if path else None
    if module is not None and path not in ("fc2", "output.dense") and _adds_residual(module):
        inside = _first(module, _INSIDE)
        path, module = f"{path}.{inside}", module.get_submodule(inside) if inside else None
    if module is None:
        have = format_names(n for n, _ in layer.named_children())
        raise TargetError(
            f"the layer {name} ({type(layer).__name__}) has no {what} that is known here; it has {have}",
            f"one of {format_names(paths)}",
            "name the modules to adapt in target_modules",
        )
    if parallel and layer_kind(module) is not None:
        raise TargetError(
            f"the {what} of {name} is no module of its own ({path} gives its output), so that what it reads is unknown",
            "style 'houlsby' or 'pfeiffer'",
        )
    return f"{name}.{path}"


def _first(module: nn.Module, paths: Sequence[str]) -> str:
    names = {n for n, _ in module.named_modules()}
    return next((p for p in paths if p in names), "")


def _adds_residual(module: nn.Module) -> bool:
    return "residual" in inspect.signature(module.forward).parameters or bool(_first(module, ("output.dense",)))


def number(name: str) -> int | None:
    """Return the number of the layer a module is in: the first in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
