"""A checkpoint's weights, written a tensor at a time: safetensors files are laid out first, and filled as tensors come.

    file = length of the header (8 bytes) | header (JSON: name → dtype, shape, first and last byte) | tensors in a row

safetensors' own `save_file` wants all tensors of a file at once, which is the memory that this saves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..errors import AdapterError, ModelError, RunError

FILES, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
_AT_ONCE = 1 << 24
"""Numbers that are rounded and written at a time."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Place(NamedTuple):
    file: Path
    start: int
    dtype: torch.dtype
    shape: torch.Size


class Shards:
    """The weight files of a checkpoint: `model.safetensors`, or several and their index, as transformers names them.

    Args:
        folder: where they lie; it exists.
        outline: what will be written, in its order: tensors on `meta`, by name.
        largest: bytes of a file, at most, unless one tensor has more.

    Raises:
        ModelError: safetensors has no such dtype.
    """

    def __init__(self, folder: Path, outline: Mapping[str, Tensor], largest: int) -> None:
        self._left: dict[str, _Place] = {}
        split = split_torch_state_dict_into_shards(dict(outline), filename_pattern=FILES, max_shard_size=largest)
        for file, names in split.filename_to_tensors.items():
            self._lay(folder / file, {n: outline[n] for n in names})
        if split.is_sharded:
            numbers = sum(t.numel() for t in outline.values())
            index = {
                "metadata": {"total_parameters": numbers, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, rounded to the dtype it was announced with.

        Args:
            name: as it was announced; each is written once.
            tensor: of the shape announced.

        Raises:
            AdapterError: numbers that were rounded are not finite, before or after.
        """
        place = self._left.pop(name)
        if tensor.shape != place.shape:
            raise RunError(f"{name} has the shape {tuple(tensor.shape)}", str(tuple(place.shape)), "please report this")
        rounds = tensor.dtype != place.dtype and place.dtype.is_floating_point
        with open(place.file, "r+b") as f:
            f.seek(place.start)
            for part in tensor.detach().reshape(-1).split(_AT_ONCE):
                part = part.to(place.dtype)
                if rounds and not torch.isfinite(part).all():
                    raise AdapterError(
                        f"{name} holds numbers that {str(place.dtype).removeprefix('torch.')} cannot hold",
                        f"numbers up to {torch.finfo(place.dtype).max:.3g}",
                        "--dtype bfloat16 or float32",
                    )
                f.write(part.contiguous().view(torch.uint8).numpy())

    def close(self) -> None:
        """Check that every tensor was written.

        Raises:
            RunError: some are missing.
        """
        if self._left:
            numbers = sum(math.prod(p.shape) for p in self._left.values())
            missing = f"{numbers} numbers fewer than the model: {', '.join(list(self._left)[:3])}"
            raise RunError(f"the saved checkpoint holds {missing}", "all of them", "please report this")

    def _lay(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a file's header, and make the file as long as it will be."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, places = 0, {}
        # The widest first, as safetensors lays them, so that each starts at a multiple of its own size.
        for name, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            if t.dtype not in _NAMES:
                raise ModelError(f"{name} is of {t.dtype}, which a checkpoint cannot hold", "a number in 8 to 64 bits")
            start, end = end, end + t.numel() * t.element_size()
            header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
            places[name] = (start, t)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + end)
        self._left |= {n: _Place(file, 8 + len(text) + start, t.dtype, t.shape) for n, (start, t) in places.items()}
