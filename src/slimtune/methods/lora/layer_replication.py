"""Layer replication: layers of the base run several times, with the same weights and an adapter for each run.

    layer_replication [[0, 4], [2, 5]]      layers 0 1 2 3 4 become 0 1 2 3 2 3 4

A replica is a copy of a layer's modules that has the same parameters. The config counts the new layers, so that a cache
has a place for each. Removing the adapters puts the original layers back.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ...core.adapters.architectures import get_text_config
from ...errors import ModelError, TargetError


class _Replication(NamedTuple):
    """What replication replaced, to put it back."""

    ranges: Sequence[Sequence[int]]
    parent: nn.Module
    name: str
    layers: nn.ModuleList
    config_values: dict[str, Any]
    """The replaced values of the config of the model's text part."""

    def undo(self, model: nn.Module) -> None:
        """Put the original layers back."""
        setattr(self.parent, self.name, self.layers)
        _number_layers(self.layers)
        for field, value in self.config_values.items():
            setattr(get_text_config(model), field, value)


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> _Replication:
    """Stack the layers of the ranges `[start, end)` in a model of transformers, in place."""
    config = get_text_config(model)
    count: int = getattr(config, "num_hidden_layers", 0)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        message = f"layer_replication needs one list of {count} layers, and a {type(model).__name__} has {len(lists)}"
        raise ModelError(message, "a decoder or an encoder of transformers")
    if too_high := [end for _, end in ranges if end > count]:
        raise TargetError(f"layer_replication ends at {max(too_high)}", f"at most {count}, the number of layers")
    parent_name, _, name = lists[0].rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    layers: nn.ModuleList = getattr(parent, name)
    order = [i for start, end in ranges for i in range(start, end)]
    stacked = nn.ModuleList(
        layers[i] if i not in order[:place] else _copy_layer(layers[i]) for place, i in enumerate(order)
    )
    # Lists with one entry per layer, such as layer_types.
    old = {n: v for n, v in vars(config).items() if isinstance(v, list) and len(v) == count and "layer" in n}
    for field, values in old.items():
        setattr(config, field, [values[i] for i in order])
    config.num_hidden_layers = len(order)
    _number_layers(stacked)
    setattr(parent, name, stacked)
    return _Replication(ranges, parent, name, layers, {**old, "num_hidden_layers": count})


def _copy_layer(layer: nn.Module) -> Any:
    """Return a copy of a layer's modules that shares all its tensors and its config."""
    shared = [*layer.parameters(), *layer.buffers(), *(m.config for m in layer.modules() if hasattr(m, "config"))]
    return copy.deepcopy(layer, {id(x): x for x in shared})


def _number_layers(layers: nn.ModuleList) -> None:
    """Tell the modules of each layer its place, by which they find their keys and values in a cache."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]
