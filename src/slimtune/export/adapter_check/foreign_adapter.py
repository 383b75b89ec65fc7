"""Read an adapter that somebody else wrote: its header, its config, single tensors; nothing in it is trusted."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from ...core.adapters.adapter_files import PICKLES, WEIGHTS_FILE, open_weights_file, refuse_pickles
from ...core.adapters.peft_config import CONFIG_FILE
from ...core.foundation.files import read_json_object, refuse_non_regular_file
from ...core.foundation.formatting import format_bytes
from ...core.foundation.json_results import JsonObject
from ...core.training.run_dir import find_adapter_folder
from ...errors import AdapterError, UsageError, format_names

MAX_CONFIG_BYTES = 16 << 20
"""Of a JSON file beside an adapter, without tokenizer.json."""
MAX_TENSORS = 1_000_000


class TensorHeader(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as "F32"


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter folder whose header is read, and whose tensors are read one by one."""

    folder: Path
    file: Path
    config: JsonObject  # adapter_config.json
    tensors: dict[str, TensorHeader]  # by key
    metadata: dict[str, str]

    @cached_property
    def _opened(self) -> Any:
        return safe_open(str(self.file), framework="pt")

    def load_tensor(self, key: str) -> Tensor:
        """Return one tensor, as it is stored."""
        return self._opened.get_tensor(key)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size


def open_foreign_adapter(path: Path) -> ForeignAdapter:
    """Read the header and the config of an adapter or run folder.

    Raises:
        UsageError: there is no such folder, or no adapter in it.
        AdapterError: a file is damaged, a pickle, or of another format.
    """
    folder = _find_folder(path)
    file = folder / WEIGHTS_FILE
    if not file.exists():
        refuse_pickles(folder)
        raise UsageError(
            f"{folder} has no {WEIGHTS_FILE}; it has {format_names(sorted(p.name for p in folder.iterdir()))}",
            "an adapter folder as save_pretrained writes it",
        )
    refuse_non_regular_file(file)
    config = read_small_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    with open_weights_file(file) as opened:
        keys = list(opened.keys())
        if len(keys) > MAX_TENSORS:
            raise AdapterError(f"{file} has {len(keys):,} tensors", f"at most {MAX_TENSORS:,}")
        slices = {key: opened.get_slice(key) for key in keys}
        tensors = {k: TensorHeader(tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
        return ForeignAdapter(folder, file, config, tensors, dict(opened.metadata() or {}))


def _find_folder(path: Path) -> Path:
    """Return the adapter folder of a run or adapter folder, also where the config is missing."""
    if path.is_dir() and any((path / name).exists() for name in (WEIGHTS_FILE, *PICKLES)):
        return path
    return find_adapter_folder(path)


def read_small_json(file: Path, max_bytes: int = MAX_CONFIG_BYTES) -> JsonObject:
    """Return the JSON object in a file of limited size; raise AdapterError if it is damaged or larger."""
    refuse_non_regular_file(file)
    if (size := file.stat().st_size) > max_bytes:
        raise AdapterError(f"{file} has {format_bytes(size)}", f"at most {format_bytes(max_bytes)}")
    return read_json_object(file, error_class=AdapterError)
