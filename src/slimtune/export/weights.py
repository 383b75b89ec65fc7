"""A merged model's weights, from the model's names to the files': a module in memory at a time.

Most names are the same on both sides. Where transformers holds tensors otherwise than its checkpoints do (experts
stacked, fused maps apart), what becomes one tensor of the file, or comes from one, is converted together, as
`save_pretrained` does: a layer at a time where layers do not mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ..adapters.merged_state import MergedState
from .shards import Shards


class Weights:
    """What is to be written of a merged model; none of it is computed before it is written.

    Args:
        model: an adapted model; its adapters are merged, one module at a time.
        dtype: what its parameters are stored in; buffers stay as they are.
        adapters: see `MergedState`.
        rounding: rounds what is stored by the name it has in the checkpoint; else each number goes to its nearest.

    Raises:
        MergeRefused: see `MergedState`.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        adapters: Sequence[str] | None = None,
        rounding: Callable[[str, Tensor, torch.dtype], Tensor] | None = None,
    ) -> None:
        self._model, self._state = model, MergedState(model, adapters)
        self._rounding = rounding
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        held = {n: self._state.like(n) for n in self._state if n not in ignored}
        outline = {n: _outlined(t, dtype) for n, t in held.items()}
        self.parameters = sum(t.numel() for t in held.values() if isinstance(t, nn.Parameter))
        self.outline: dict[str, Tensor] = revert_weight_conversion(model, dict(outline))
        """Names, shapes and dtypes in the files, on `meta`."""
        # A tensor that is only renamed comes out as the object it went in.
        own = {id(t): n for n, t in outline.items()}
        self._renamed = {key: own[id(t)] for key, t in self.outline.items() if id(t) in own}
        self._converted = _groups(model, {n: t for n, t in outline.items() if n not in set(self._renamed.values())})

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.outline.values())

    def write(self, folder: Path, largest: int) -> None:
        """Write the weight files.

        Args:
            folder: where they go; it exists.
            largest: bytes of a file, at most.

        Raises:
            MergeRefused: see `MergedState`.
            AdapterError: the dtype cannot hold a number.
        """
        shards = Shards(folder, self.outline, largest)
        for key, name in self._renamed.items():
            tensor = self._state[name]
            if self._rounding is not None and self._state.like(name).is_floating_point():
                tensor = self._rounding(name, tensor, self.outline[key].dtype)
            shards.write(key, tensor)
        for names in self._converted:
            for key, tensor in revert_weight_conversion(self._model, {n: self._state[n] for n in names}).items():
                shards.write(key, tensor)
        shards.close()


def _outlined(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return torch.empty(tensor.shape, dtype=dtype if rounded else tensor.dtype, device="meta")


def _groups(model: Any, outline: Mapping[str, Tensor]) -> list[list[str]]:
    """Return names whose tensors are converted together: a layer's, or all where that makes something else."""
    groups: dict[str, list[str]] = {}
    for name in outline:
        layer = re.match(r".*?\.\d+\.", name)
        groups.setdefault(layer[0] if layer else "", []).append(name)
    apart: dict[str, Tensor] = {}
    for names in groups.values():
        apart |= revert_weight_conversion(model, {n: outline[n] for n in names})
    together = revert_weight_conversion(model, dict(outline))
    same = {n: t.shape for n, t in apart.items()} == {n: t.shape for n, t in together.items()}
    return list(groups.values()) if same else [list(outline)]
