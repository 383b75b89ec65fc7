"""Adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The file's metadata contain a fingerprint of the base's config, and of a run's adapter what it was trained on
(extras/training_fingerprint.py). Files are written atomically, pickles are not read.
"""

import copy
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ...errors import AdapterError, PeftWarning, UsageError, format_names, suggest
from ..foundation.files import write_atomic
from ..foundation.fingerprint import config_fingerprint
from .adapter_tensors import PREFIX, get_peft_model_state_dict, require_plausible_config_size
from .extension_hooks import FOLDER_WRITERS
from .peft_config import PeftConfig, get_or_download_file, write_adapter_config

T = TypeVar("T")
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
BASE_FINGERPRINT = "base_config"
TRAINING_FINGERPRINT = "training_fingerprint"
_HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
_IGNORED_ARGUMENTS = (
    "torch_dtype", "dtype", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index",
    "ephemeral_gpu_offload", "torch_device",
)  # fmt: skip
"""PEFT's arguments on how to place the base: it is loaded already, and an adapter is placed on its layer's device."""
_UNCOMPARED_FIELDS = {
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type",
    "target_modules", "exclude_modules",  # the keys of the tensors tell which modules matched
    "init_lora_weights", "lora_dropout",
}  # fmt: skip
"""Fields of a config that do not change what a trained adapter's tensors mean."""


def read_adapter_tensors_and_metadata(
    path: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an adapter file's tensors and metadata (`BASE_FINGERPRINT`, `TRAINING_FINGERPRINT`, if slimtune wrote it).

    Raises:
        UsageError: the folder or repository does not exist or contains no adapter.
        AdapterError: the file is a pickle, or not a valid safetensors file.
    """
    refuse_pickles(Path(path, subfolder or ""))
    with open_weights_file(get_or_download_file(path, WEIGHTS_FILE, subfolder, **hub)) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118


def refuse_pickles(folder: Path) -> None:
    """Raise AdapterError if a folder has an adapter's tensors as a pickle alone."""
    pickles = [folder / p for p in PICKLES if (folder / p).is_file()]
    if pickles and not (folder / WEIGHTS_FILE).is_file():
        message = f"{pickles[0]} is a pickle, which can run arbitrary code when it is read"
        raise AdapterError(message, WEIGHTS_FILE, "save the adapter again with safetensors where it was trained")


@contextmanager
def open_weights_file(file: Path) -> Iterator[Any]:
    """Open a safetensors file; raise AdapterError if it is damaged."""
    file.open("rb").close()  # safetensors says of a file that may not be read that it does not exist
    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except SafetensorError as e:
        message = f"{file} ({file.stat().st_size} bytes) is not a valid safetensors file: {e}"
        raise AdapterError(message, "a complete file", "copy it again, or use an older checkpoint") from None


def get_adapter_tensors_and_metadata(
    model: Any, adapter: str, state_dict: Mapping[str, Tensor] | None = None, save_embedding_layers: str | bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the content of an adapter's file: tensors by key, on their current device, and the metadata."""
    training_fingerprint = model.adapter_state.training_fingerprints.get(adapter)
    known = {"format": "pt", BASE_FINGERPRINT: _base_fingerprint(model), TRAINING_FINGERPRINT: training_fingerprint}
    tensors = get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers=save_embedding_layers)
    return tensors, {name: text for name, text in known.items() if text}


def serialize_to_safetensors_header_and_data(
    tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, memoryview]:
    """Return the two parts of a safetensors file, whose bytes depend on its content alone.

    The library writes the metadata in any order.
    """
    storages = [t.untyped_storage().data_ptr() for t in tensors.values()]
    # safetensors refuses tensors that share memory; adapters of tied modules do.
    repeated = {k for k, s in zip(tensors, storages, strict=True) if storages.count(s) > 1}
    data = save({k: t.clone() if k in repeated else t for k, t in tensors.items()})
    start = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:start])}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text, memoryview(data)[start:]


def save_adapter(
    model: Any,
    folder: Path,
    adapter_name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = False,
    convert_to_zero_init: bool = False,
) -> None:
    """Write one adapter's config, tensors and the files of `FOLDER_WRITERS` into `folder`, each atomically.

    `convert_to_zero_init` writes an equal adapter without a stored start; see `PeftConfig.convert_to_zero_init`.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file", "a folder")
    tensors, metadata = get_adapter_tensors_and_metadata(model, adapter_name, state_dict, save_embedding_layers)
    tensors = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    config = model.peft_config[adapter_name]
    if flat := [k for k, t in tensors.items() if k.endswith(("lora_A.weight", "lora_B.weight")) and t.dim() < 2]:
        text = f"{len(flat)} tensors are shards of DeepSpeed or FSDP, which no base can load: {format_names(flat)}"
        warnings.warn(f"{text}; gather the parameters first", PeftWarning, stacklevel=3)
    if convert_to_zero_init:
        modules = model.adapter_modules(adapter_name)
        config, converted = config.convert_to_zero_init(modules)
        for site, module in modules.items():
            for name in module.tensors():
                del tensors[config.file_key(f"{PREFIX}{site}.{name}")]
            tensors |= {config.file_key(f"{PREFIX}{site}.{n}"): t.detach().cpu() for n, t in converted[site].items()}
        tensors = {k: t.contiguous() for k, t in tensors.items()}
    # PEFT also writes inference_mode, so that a file loads frozen.
    values = {**config.to_dict(), "inference_mode": True}
    if config.task_type is None:
        base = model.base_model_class
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    content = serialize_to_safetensors_header_and_data(tensors, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter_config(folder, values)
    write_atomic(folder / WEIGHTS_FILE, content)
    for write_file in FOLDER_WRITERS.load_all().values():
        write_file(config, folder, getattr(model, "model_tags", None) or ())


def require_compatible_config(attached: PeftConfig, loaded: PeftConfig, source: str | os.PathLike) -> None:
    """Raise AdapterError if an adapter's settings give its tensors another meaning than they have in `attached`."""
    ours, theirs = attached.to_dict(), loaded.to_dict()
    ignored = _UNCOMPARED_FIELDS | attached.training_written_fields
    different = [k for k in ours if k not in ignored and ours[k] != theirs.get(k)]
    if different:
        values = "; ".join(f"{k} is {theirs.get(k)!r} there, {ours[k]!r} here" for k in different)
        raise AdapterError(f"{source} was trained with other settings: {values}", hint="load it under another name")


def read_tensors_config_metadata_for_model(
    model: Any, path: str | os.PathLike, config: PeftConfig | None, is_trainable: bool, hub_arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], PeftConfig, dict[str, str]]:
    """Return an adapter's tensors, config and metadata, read from a folder or the Hub, if it belongs to this base."""
    # Models written for transformers 4 whose modules were renamed have a mapping from the names of older checkpoints.
    key_mapping = hub_arguments.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
    hub_arguments = {k: v for k, v in hub_arguments.items() if k not in (*_IGNORED_ARGUMENTS, "key_mapping")}
    require_valid_hub_arguments(hub_arguments)
    tensors, metadata = read_adapter_tensors_and_metadata(path, **hub_arguments)
    tensors = rename_keys(tensors, key_mapping) if key_mapping else rename_keys_of_older_transformers(tensors, model)
    config = config or PeftConfig.from_pretrained(path, **hub_arguments)
    fingerprint, here = metadata.get(BASE_FINGERPRINT), _base_fingerprint(model)
    if fingerprint and here and fingerprint != here:
        message = f"{path} was trained on another base: its config has fingerprint {fingerprint}, this one has {here}"
        raise AdapterError(message, hint="see base_model_name_or_path in its adapter_config.json", code="wrong-base")
    config.inference_mode = not is_trainable
    require_plausible_config_size(model, config, tensors, path)
    return tensors, config, metadata


def require_valid_hub_arguments(hub_arguments: Mapping[str, Any]) -> None:
    """Raise UsageError if an argument is not one of `hf_hub_download`'s."""
    for name in hub_arguments.keys() - set(_HUB_ARGUMENTS):
        expected = f"one of {format_names(_HUB_ARGUMENTS)}"
        raise UsageError(f"unknown argument {name!r}{suggest(name, _HUB_ARGUMENTS)}", expected)


def rename_keys(tensors: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return tensors whose keys are replaced by the first pattern that matches; keys count without their prefix."""
    renamed = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for pattern, replacement in (key_mapping or {}).items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[key[: len(key) - len(key.removeprefix(PREFIX))] + name] = tensor
    return renamed


def rename_keys_of_older_transformers(tensors: dict[str, T], model: Any) -> dict[str, T]:
    """Return tensors by the names that transformers gives their modules now, where the file has older ones."""
    if not isinstance(model, PreTrainedModel):
        return tensors
    modules = {name for name, _ in model.named_modules()}

    def count_known_parts(name: str) -> int:
        return sum(path in modules for path in itertools.accumulate(name.split("."), "{}.{}".format))

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    renamed = {}
    for key, tensor in tensors.items():
        old = new = key.removeprefix(PREFIX)
        for renaming in renamings:
            new = renaming.rename_source_key(new)[0]
        better = count_known_parts(new) > count_known_parts(old)
        renamed[f"{PREFIX}{new}" if better else key] = tensor
    return renamed


def _base_fingerprint(model: Any) -> str | None:
    """Return the fingerprint of a transformers model's config, None for other modules."""
    config = get_base_config(model)
    return config_fingerprint(config) if hasattr(config, "to_dict") else None


def get_base_config(model: Any) -> Any:
    """Return the config of the base below a model's adapters, None if it has none."""
    config = getattr(model, "config", None)
    state = vars(model).get("_slimtune")
    change = None if state is None else state.base_layer_replication
    if config is not None and change is not None:
        config = copy.deepcopy(config)
        vars(config.get_text_config()).update(change.config_values)
    return config
