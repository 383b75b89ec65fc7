"""Read and write adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A key is `base_model.model.<module>.<tensor>`, for example `…q_proj.lora_A.weight`. A trained bias of an adapted module
is stored as `<module>.base_layer.bias`, a module trained in full under its own name. The file's metadata contain a
fingerprint of the base's config. A missing, unexpected or wrongly shaped tensor is an error.
"""

import copy
import dataclasses
import itertools
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ...errors import AdapterError, PeftWarning, UsageError, format_names, nearest
from ...extras import model_card
from ..foundation.files import read_json, write_atomic
from ..foundation.fingerprint import config_fingerprint
from ..foundation.hub import commit_files, require_repo_id
from ..kernels.linear_layers import is_finite
from .active_adapters import ADDED_CHILDREN
from .adapted_layer import get_site
from .peft_config import CONFIG_FILE, PeftConfig, find_file, write_config
from .targets import select_targets

log = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIX = "base_model.model."
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_FINGERPRINT = "base_config"
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
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_FREE_VALUES, _MAX_RATIO = 1 << 20, 64
"""An adapter may start with this many values more than its file, times this factor: AdaLoRA prunes ranks."""


class LoadResult(NamedTuple):
    """Keys that did not match. For adapters both lists are always empty: loading raises instead."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# --- tensors of an attached adapter -----------------------------------------------------------------------------


def get_adapter_tensors(model: Any, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's live tensors by their keys in a file."""
    found: dict[str, Tensor] = {}
    for name, layer in model.adapted_layers(adapter).items():
        site = _file_prefix(name, model.match_report(adapter).kinds)
        has_module = adapter in layer.adapters
        if has_module:
            found |= {site + n: p for n, p in layer.adapters[adapter].tensors().items()}
        if adapter in layer.trained_copies:
            copies = f"{site}base_layer." if has_module else site
            found |= {copies + n: p for n, p in layer.trained_copies[adapter].state_dict(keep_vars=True).items()}
    config = model.peft_config[adapter]
    if config.trains_every_weight:  # the copy of tied weights is stored once, under its first name
        first_keys = {id(tensor): key for key, tensor in reversed(found.items())}
        found = {key: tensor for key, tensor in found.items() if first_keys[id(tensor)] == key}
    return {config.file_key(k): t for k, t in found.items()}


def _file_prefix(name: str, kinds: Mapping[str, str]) -> str:
    """Return how a module's keys start; PEFT wraps an attention module before its out_proj."""
    parent, _, leaf = name.rpartition(".")
    path = f"{parent}.base_layer.{leaf}" if parent and kinds.get(parent) == "weight" else name
    return f"{_PREFIX}{path}." if path else _PREFIX


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in a file.

    Args:
        state_dict: take the values from this `model.state_dict()`, as with FSDP.
        unwrap_compiled: the model is the result of `torch.compile`.
        save_embedding_layers: add the base's embeddings: see `save_pretrained`.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    own = get_adapter_tensors(model, adapter_name)
    own = _find_base_embeddings(model, adapter_name, save_embedding_layers) | own
    if state_dict is None:
        return {k: p.detach() for k, p in own.items()}
    names = {id(p): n for n, p in model.state_dict(keep_vars=True).items()}
    return {k: state_dict[names[id(p)]] if id(p) in names else p.detach() for k, p in own.items()}


def _find_base_embeddings(model: Any, adapter: str, choice: str | bool) -> dict[str, Tensor]:
    """Return the base's embeddings that an adapter's file also gets, by their keys, as PEFT does.

    `choice` is True, False, or "auto": embeddings that the adapter changes, or that were resized.
    """
    if not choice or not hasattr(model, "get_input_embeddings"):
        if choice is True:
            text = "Could not identify embedding layer(s) because the model is not a 🤗 transformers model."
            warnings.warn(text, PeftWarning, stacklevel=4)
        return {}
    config, parts = model.peft_config[adapter], []
    with suppress(NotImplementedError):  # a model of images without tokens
        parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings = {n: m for n, m in model.named_modules() if any(m is part for part in parts)}
    changed = {n for n in embeddings if n in model.match_report(adapter).kinds and n.endswith(_EMBEDDING_NAMES)}
    if config.name == "trainable_tokens" or getattr(config, "trainable_token_indices", None) is not None:
        changed = set()  # their point is a small file
    if choice == "auto" and not changed and not _is_resized(model, config.base_model_name_or_path):
        return {}
    if choice == "auto":
        why = "layers found in `target_modules`" if changed else "layer has been resized during finetuning"
        text = f"Setting `save_embedding_layers` to `True` as {'' if changed else 'the '}embedding {why}."
        warnings.warn(text, PeftWarning, stacklevel=4)
    return {
        f"{_PREFIX}{name}.{'base_layer.' if changed else ''}{key}": tensor
        for name, module in embeddings.items()
        if name in changed or not changed
        for key, tensor in module._parameters.items()
        if tensor is not None
    }


def _is_resized(model: Any, base: str | None) -> bool:
    """Return whether the model has another vocabulary than its base's config, in a folder or the Hub's cache."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not size or not base:
        return False
    folder, file = Path(base), Path(base, "config.json")
    try:
        cached = file if folder.is_dir() else try_to_load_from_cache(base, "config.json")
    except ValueError:  # neither a path nor a name of the Hub
        return False
    if not isinstance(cached, str | Path) or not Path(cached).is_file():
        return False
    return read_json(Path(cached), error=AdapterError).get("vocab_size", size) != size


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors, by their keys in a file, into an adapter; raise AdapterError if they do not fit.

    Args:
        ignore_mismatched_sizes: leave out, with a warning, the tensors whose shapes differ.
        low_cpu_mem_usage: ignored: an adapter on the meta device is put on its layers' devices in either case.
    """
    return load_adapter_tensors(model, adapter_name, peft_model_state_dict, "the state dict", ignore_mismatched_sizes)


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file by their keys.

    Args:
        model_id: folder or Hub repository.
        device: where the tensors are put; None: the CPU.
        key_mapping: regular expressions for keys, without `base_model.model.`, and what each is replaced by.
        hub: subfolder, revision, token, …
    """
    _check_hub_arguments(hub)
    tensors, _ = read_adapter_file(model_id, **hub)
    return {k: t.to(device or "cpu") for k, t in _rename_keys(tensors, key_mapping).items()}


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the state dict of the base: its tensors by their own names, without the adapters'."""
    return {k: t.detach() for k, t in _get_base_tensors(model).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Copy tensors into the base, by its own names; return the keys that are missing and unexpected.

    Raises:
        RuntimeError: with `strict` keys are missing or unexpected, as with torch's load_state_dict.
    """
    own = _get_base_tensors(model)
    missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    if strict and (missing or unexpected):
        parts = (
            f"{what} key(s) in state_dict: {keys}"
            for what, keys in (("Missing", missing), ("Unexpected", unexpected))
            if keys
        )
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(parts))
    with torch.no_grad():
        for key in own.keys() & state_dict.keys():
            own[key].copy_(state_dict[key])
    return LoadResult(missing, unexpected)


def _get_base_tensors(model: Any) -> dict[str, Tensor]:
    added = [f"{n}.{part}.".lstrip(".") for n in model.adapted_layers() for part in ADDED_CHILDREN]
    tensors = model.state_dict(keep_vars=True)
    return {k: t for k, t in tensors.items() if not k.startswith(tuple(added))} if added else tensors


def load_adapter_tensors(
    model: Any, adapter: str, given: Mapping[str, Tensor], where: str, ignore_mismatched_sizes: bool = False
) -> LoadResult:
    """Copy a file's tensors into an attached adapter, all or none; return the keys that did not match: none.

    `ignore_mismatched_sizes` leaves out, with a warning, the tensors whose shapes differ.

    Raises:
        AdapterError: missing or unexpected keys, wrong shapes, or a copy of a base weight that differs from the base's.
    """
    _leave_meta_device(model, adapter)
    if ignore_mismatched_sizes:
        own = get_adapter_tensors(model, adapter)
        keys = {k: _normalize_key(k, own) for k in given}
        wrong = [k for k, ours in keys.items() if ours in own and own[ours].shape != given[k].shape]
        if wrong:
            sizes = "; ".join(f"{k}: {tuple(given[k].shape)}, not {tuple(own[keys[k]].shape)}" for k in wrong)
            message = f"Some weights of the adapter were not loaded, their shapes differ: {sizes}"
            warnings.warn(message, PeftWarning, stacklevel=3)
        given = {**given, **{k: own[keys[k]].detach() for k in wrong}}
    optional = _prepare_load(model, adapter, given)
    own = get_adapter_tensors(model, adapter)
    given = {_normalize_key(k, own): t for k, t in given.items()}
    missing = [k for k in own if k not in given and k not in optional]
    extra = {k: _find_base_weight(model, k) for k in given if k not in own}
    resized = bool(extra) and _is_resized(model, model.peft_config[adapter].base_model_name_or_path)
    unexpected = [k for k, base in extra.items() if base is None or not _fits_base(model, base, given[k], resized)]
    # A config with bias="none" may come with biases that were trained. A bias is not a mark of another base.
    shapes_here = {k: base.shape for k, base in extra.items() if base is not None and k.endswith(".bias")}
    biases = [k for k in unexpected if shapes_here.get(k) == given[k].shape]
    unexpected = [k for k in unexpected if k not in biases]
    if faults := _list_faults(own, given, missing, unexpected):
        hint = "load the base named in its adapter_config.json"
        if len(faults) == 1 and "NaN or Inf" in faults[0]:
            hint = "the training that wrote it diverged: load an earlier checkpoint"
        raise AdapterError(f"{where} does not fit this model: {'; '.join(faults)}", hint=hint)
    if biases:
        model._copy_biases(adapter, [_get_base_name(k) for k in biases])
        own = get_adapter_tensors(model, adapter)
        given = {_normalize_key(k, own): t for k, t in given.items()}
    with torch.no_grad():
        for key, tensor in {**extra, **own}.items():  # `extra`: embeddings that were resized before they were saved
            if tensor is not None and key in given:
                tensor.copy_(given[key])
    return LoadResult([], [])


def _list_faults(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], missing: list[str], unexpected: list[str]
) -> list[str]:
    """Return why a file's tensors do not fit an adapter's own, one clause each; empty if they fit."""
    pairs = [(k, given[k], p) for k, p in own.items() if k in given]
    shapes = [(k, tuple(t.shape), tuple(p.shape)) for k, t, p in pairs]
    misshapen = [f"{k}: {there} in the file, {here} here" for k, there, here in shapes if there != here]
    mistyped = [f"{k}: {t.dtype}" for k, t, p in pairs if _number_kind(t) != _number_kind(p)]
    # A 16-bit or 8-bit value has an exact fp32 value.
    damaged = [k for k, t, _ in pairs if _number_kind(t) == "float" and not is_finite(t)]
    faults = []
    if untied := _find_untied(own, given):
        faults.append(f"{format_names(untied, 2)} are tied here, but differ in the file")
    if missing:
        faults.append(f"{len(missing)} of {len(own)} tensors are missing, such as {format_names(missing, 2)}")
    if unexpected:
        similar = nearest(unexpected[0], own)
        faults.append(f"{len(unexpected)} tensors are unexpected, such as {format_names(unexpected, 2)}{similar}")
    if misshapen:
        faults.append(f"size mismatch for {len(misshapen)} tensors: {'; '.join(misshapen[:2])}")
    if mistyped:
        faults.append(f"{len(mistyped)} tensors have another kind of numbers: {format_names(mistyped, 2)}")
    if damaged:
        faults.append(f"{len(damaged)} tensors contain NaN or Inf, such as {format_names(damaged, 2)}")
    return faults


def _find_untied(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return two keys of tensors that share memory, as they are or transposed, and have two values in a file."""
    first: dict[int, str] = {}
    for key, tensor in own.items():
        if key in given and tensor.numel() and not tensor.is_meta:
            other = first.setdefault(tensor.data_ptr(), key)
            a, b = given[key], given[other]
            if other != key and not any(x.shape == b.shape and torch.equal(x, b) for x in (a, a.T)):
                return [other, key]
    return []


def _number_kind(tensor: Tensor) -> str:
    dtype = tensor.dtype
    return "float" if dtype.is_floating_point else "int" if dtype not in (torch.bool, *_COMPLEX) else str(dtype)


def check_sizes(model: Any, config: PeftConfig, given: Mapping[str, Tensor], where: object) -> None:
    """Raise AdapterError if the config asks for far more memory than a file's tensors, before it is allocated."""
    config = copy.deepcopy(config)
    config.check_model(model)
    config.fill_from_model(model)
    kinds = select_targets(model, config, strict=False).kinds
    meta = torch.device("meta")
    sites = [dataclasses.replace(get_site(n, kind, model, loading=True), device=meta) for n, kind in kinds.items()]
    unsaved = 0
    for site, module in zip(sites, config.build_all(sites), strict=True):
        prefix = _file_prefix(site.name, kinds)
        for name, tensor in module.tensors().items():
            key = config.file_key(prefix + name)
            if key not in given:
                unsaved += tensor.numel()
            elif tensor.numel() > _FREE_VALUES + _MAX_RATIO * given[key].numel():
                sizes = f"{key} is {tuple(given[key].shape)} in the file, but {tuple(tensor.shape)} by its config"
                raise AdapterError(f"{where}: {sizes}", "an adapter_config.json that belongs to the tensors")
    if unsaved > _FREE_VALUES + sum(p.numel() for p in model.parameters()):
        message = f"{where}: its config asks for {unsaved:,} values that its file does not have"
        raise AdapterError(message, "an adapter_config.json that belongs to the tensors")


def _leave_meta_device(model: Any, adapter: str) -> None:
    """Rebuild the modules of an adapter that is on the meta device on the devices of their layers."""
    old = model.adapter_modules(adapter)
    on_meta = [p for module in old.values() for p in module.parameters() if p.is_meta]
    layers = model.adapted_layers(adapter)
    if not on_meta or all(p.is_meta for layer in layers.values() for p in layer._parameters.values() if p is not None):
        return
    config, kinds = model.peft_config[adapter], model.match_report(adapter).kinds
    how: dict[str, Any] = {"autocast": on_meta[0].dtype == torch.float32, "loading": True}
    with model.disable_adapter():
        new = config.build_all([get_site(name, kind, model, **how) for name, kind in kinds.items()])
    for name, module in zip(kinds, new, strict=True):
        module.method = config.name
        trains = {n for n, p in old[name].named_parameters() if p.requires_grad}
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter_name in trains)
        layers[name].adapters[adapter] = module


def _prepare_load(model: Any, adapter: str, given: Mapping[str, Tensor]) -> set[str]:
    """Let the adapter modules prepare for a file's tensors; return the keys that the file may leave out."""
    config, optional = model.peft_config[adapter], set()
    kinds = model.match_report(adapter).kinds
    for name, module in model.adapter_modules(adapter).items():
        site = _file_prefix(name, kinds)
        # A file may contain tensors that the module does not have at this moment.
        tensors = {k.removeprefix(site): t for k, t in given.items() if k.startswith(site)}
        for tensor in module.tensors():
            if (key := config.file_key(site + tensor)) in given:
                tensors[tensor] = given[key]
        module.before_load_state_dict(tensors, get_site(name, kinds[name], model))
        optional |= {config.file_key(site + n) for n in module.optional}
    return optional


def _normalize_key(key: str, own: Mapping[str, Any]) -> str:
    """Return our key for one of PEFT's variants: both places of a bias, keys without the prefix."""
    # With bias="all" PEFT writes biases of a module trained in full twice, the second time under its wrapper's names.
    key = key.replace(".modules_to_save.", ".")
    forms = (key, _PREFIX + key, key.replace(".base_layer.", "."), key.replace(".bias", ".base_layer.bias"))
    return next((form for form in forms if form in own), key)


def _get_base_name(key: str) -> str:
    """Return the name in the base of a key that is a base tensor's."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _find_base_weight(model: Any, key: str) -> Tensor | None:
    """Return the base's own tensor of a key: PEFT also saves embeddings that it did not train."""
    module, _, parameter = _get_base_name(key).rpartition(".")
    try:
        return model.get_submodule(module)._parameters.get(parameter)
    except AttributeError:
        return None


def _fits_base(model: Any, base: Tensor, tensor: Tensor, resized: bool) -> bool:
    """Return whether a file's copy of a base tensor equals it, or belongs to an embedding that was resized."""
    if base.shape != tensor.shape:
        return False
    get_parts = (getattr(model, f"get_{part}_embeddings", None) for part in ("input", "output"))
    weights = [getattr(get(), "weight", None) for get in get_parts if get is not None]
    is_new = resized and base.is_floating_point() and any(base is weight for weight in weights)
    return is_new or torch.equal(base.detach().cpu(), tensor.to(base.dtype))


# --- files ------------------------------------------------------------------------------------------------------


def read_adapter_file(
    path: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> tuple[dict[str, Tensor], str | None]:
    """Return an adapter file's tensors and the fingerprint of its base (None if another library wrote the file).

    Raises:
        UsageError: the folder or repository does not exist or contains no adapter.
        AdapterError: the file is a pickle, or not a valid safetensors file.
    """
    folder = Path(path, subfolder or "")
    pickles = [folder / p for p in PICKLES if (folder / p).is_file()]
    if pickles and not (folder / WEIGHTS_FILE).is_file():
        message = f"{pickles[0]} is a pickle, which can run arbitrary code when it is read"
        raise AdapterError(message, WEIGHTS_FILE, "save the adapter again with safetensors where it was trained")
    file = find_file(path, WEIGHTS_FILE, subfolder, **hub)
    try:
        with safe_open(str(file), framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, (f.metadata() or {}).get(_FINGERPRINT)  # noqa: SIM118
    except SafetensorError as e:
        message = f"{file} ({file.stat().st_size} bytes) is not a valid safetensors file: {e}"
        raise AdapterError(message, "a complete file", "copy it again, or use an older checkpoint") from None


def adapter_tensor_info(
    model: Any,
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = False,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the content of an adapter's file: tensors by key, on their current device, and the metadata."""
    fingerprint = _base_fingerprint(model)
    metadata = {"format": "pt", **({_FINGERPRINT: fingerprint} if fingerprint else {})}
    tensors = get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers=save_embedding_layers)
    return tensors, metadata


def to_safetensors(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
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
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: str | bool = False,
    convert_to_zero_init: bool = False,
) -> None:
    """Write one adapter's config, tensors and model card into `folder`; each file is written atomically.

    `convert_to_zero_init` writes an equal adapter without a stored start; see `PeftConfig.convert_to_zero_init`.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file", "a folder")
    tensors, metadata = adapter_tensor_info(model, adapter, state_dict, save_embedding_layers)
    tensors = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    config = model.peft_config[adapter]
    if flat := [k for k, t in tensors.items() if k.endswith(("lora_A.weight", "lora_B.weight")) and t.dim() < 2]:
        # PEFT's words come first.
        text = "DeepSpeed ZeRO-3 / FSDP shards are saved instead of whole tensors, which no base can load"
        warnings.warn(f"{text}: {format_names(flat)}. Gather the parameters first.", PeftWarning, stacklevel=3)
    if convert_to_zero_init:
        modules = model.adapter_modules(adapter)
        config, converted = config.convert_to_zero_init(modules)
        for site, module in modules.items():
            for name in module.tensors():
                del tensors[config.file_key(f"{_PREFIX}{site}.{name}")]
            tensors |= {config.file_key(f"{_PREFIX}{site}.{n}"): t.detach().cpu() for n, t in converted[site].items()}
        tensors = {k: t.contiguous() for k, t in tensors.items()}
    # PEFT also writes inference_mode, so that a file loads frozen.
    values = {**config.to_dict(), "inference_mode": True}
    if config.task_type is None:
        base = model.base_model_class
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, values)
    write_atomic(folder / WEIGHTS_FILE, to_safetensors(tensors, metadata))
    model_card.write_model_card(config, folder, getattr(model, "model_tags", None) or ())


def check_same_settings(here: PeftConfig, there: PeftConfig, where: str | os.PathLike) -> None:
    """Raise AdapterError if an adapter's settings give its tensors another meaning than they have in `here`."""
    ours, theirs = here.to_dict(), there.to_dict()
    ignored = _UNCOMPARED_FIELDS | here.training_written_fields
    different = [k for k in ours if k not in ignored and ours[k] != theirs.get(k)]
    if different:
        values = "; ".join(f"{k} is {theirs.get(k)!r} there, {ours[k]!r} here" for k in different)
        raise AdapterError(f"{where} was trained with other settings: {values}", hint="load it under another name")


def read_adapter(
    model: Any, path: str | os.PathLike, config: PeftConfig | None, is_trainable: bool, hub: dict[str, Any]
) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return an adapter's tensors and config, read from a folder or the Hub, if it belongs to this base."""
    # Models written for transformers 4 whose modules were renamed have a mapping from the names of older checkpoints.
    key_mapping = hub.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
    hub = {k: v for k, v in hub.items() if k not in (*_IGNORED_ARGUMENTS, "key_mapping")}
    _check_hub_arguments(hub)
    tensors, fingerprint = read_adapter_file(path, **hub)
    tensors = _rename_keys(tensors, key_mapping) if key_mapping else _rename_older_keys(tensors, model)
    config = config or PeftConfig.from_pretrained(path, **hub)
    here = _base_fingerprint(model)
    if fingerprint and here and fingerprint != here:
        message = f"{path} was trained on another base: its config has fingerprint {fingerprint}, this one has {here}"
        raise AdapterError(message, hint="see base_model_name_or_path in its adapter_config.json")
    config.inference_mode = not is_trainable
    check_sizes(model, config, tensors, path)
    return tensors, config


def _check_hub_arguments(hub: Mapping[str, Any]) -> None:
    for name in hub.keys() - set(_HUB_ARGUMENTS):
        expected = f"one of {format_names(_HUB_ARGUMENTS)}"
        raise UsageError(f"unknown argument {name!r}{nearest(name, _HUB_ARGUMENTS)}", expected)


def _rename_keys(tensors: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return tensors whose keys are replaced by the first pattern that matches; keys count without their prefix."""
    renamed = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        for pattern, replacement in (key_mapping or {}).items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[key[: len(key) - len(key.removeprefix(_PREFIX))] + name] = tensor
    return renamed


def _rename_older_keys(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return tensors by the names that transformers gives their modules now, where the file has older ones."""
    if not isinstance(model, PreTrainedModel):
        return tensors
    modules = {name for name, _ in model.named_modules()}

    def count_known_parts(name: str) -> int:
        return sum(path in modules for path in itertools.accumulate(name.split("."), "{}.{}".format))

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    renamed = {}
    for key, tensor in tensors.items():
        old = new = key.removeprefix(_PREFIX)
        for renaming in renamings:
            new = renaming.rename_source_key(new)[0]
        better = count_known_parts(new) > count_known_parts(old)
        renamed[f"{_PREFIX}{new}" if better else key] = tensor
    return renamed


def _base_fingerprint(model: Any) -> str | None:
    """Return the fingerprint of a transformers model's config, None for other modules."""
    config = getattr(model, "config", None)
    state = vars(model).get("_slimtune")
    replication = None if state is None else state.replication
    if config is not None and replication is not None:
        config = copy.deepcopy(config)
        vars(config.get_text_config()).update(replication.config_values)
    return config_fingerprint(config) if hasattr(config, "to_dict") else None


class SaveLoadMixin:
    """The part of `PeftModel` that saves, loads and uploads adapters."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        save_embedding_layers: str | bool = "auto",
        path_initial_model_for_weight_conversion: str | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters' files; adapters not named "default" go to subfolders.

        `path_initial_model_for_weight_conversion`, the folder of the adapter before its training, writes a LoRA whose
        init_lora_weights is "pissa", "olora", "corda" or "lora_ga" as the equal plain LoRA of twice the rank. The start
        is read from the adapter itself, which has it.

        Args:
            save_embedding_layers: whether the base's embeddings are written, too. "auto": those that an adapter changes
                or, if there are none, those that were resized; a warning says so.
        """
        if path_initial_model_for_weight_conversion is not None:
            PeftConfig.from_pretrained(path_initial_model_for_weight_conversion)  # it has to be an adapter
        if not safe_serialization:
            raise UsageError("safe_serialization=False requests a pickle", "safetensors", "omit the argument")
        for name in (selected_adapters or self.peft_config) if is_main_process else []:
            folder = Path(save_directory, "" if name == "default" else self._require_adapter(name))
            convert_to_zero_init = path_initial_model_for_weight_conversion is not None
            save_adapter(self, folder, name, state_dict, save_embedding_layers, convert_to_zero_init)

    @classmethod
    def from_pretrained(
        cls: Any,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> Any:
        """Load an adapter from a folder or a Hub repository onto its base `model`, in place.

        Args:
            is_trainable: True to continue training; False freezes the adapter and sets evaluation mode.
            config: the adapter's config, if it is already loaded.
            autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
            ignore_mismatched_sizes: leave out, with a warning, the tensors whose shapes differ.
            hub: where on the Hub: subfolder, revision, token, …

        Raises:
            UsageError: the folder or repository does not exist, or an argument is unknown.
            AdapterError: the adapter belongs to another base, its config, keys or shapes do not fit, or it is a pickle.
        """
        if isinstance(model, SaveLoadMixin):
            settings = {"autocast_adapter_dtype": autocast_adapter_dtype, "config": config, **hub}
            settings["ignore_mismatched_sizes"] = ignore_mismatched_sizes
            model.load_adapter(model_id, adapter_name, is_trainable, **settings)
            return model
        tensors, config = read_adapter(model, model_id, config, is_trainable, hub)
        adapted = cls._attach_first_adapter(model, adapter_name, config, autocast_adapter_dtype, strict=False)
        try:
            load_adapter_tensors(adapted, adapter_name, tensors, str(model_id), ignore_mismatched_sizes)
        except BaseException:
            adapted.unload()
            raise
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self: Any,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        config: PeftConfig | None = None,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> LoadResult:
        """Load another adapter, inactive. If the name exists, load the tensors into the existing adapter.

        That adapter must have the same settings. Other arguments and errors are those of `from_pretrained`.
        """
        tensors, config = read_adapter(self, model_id, config, is_trainable, hub)
        if adapter_name in self.peft_config:
            check_same_settings(self.peft_config[adapter_name], config, model_id)
            if adapter_name in self.merged_adapters:
                raise UsageError(f"{adapter_name!r} is merged into the base", hint="unmerge_adapter() first")
            return load_adapter_tensors(self, adapter_name, tensors, str(model_id), ignore_mismatched_sizes)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, strict=False)
        try:
            result = load_adapter_tensors(self, adapter_name, tensors, str(model_id), ignore_mismatched_sizes)
        except BaseException:
            self._remove_adapter(adapter_name)
            raise
        self.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return result

    def create_or_update_model_card(self: Any, output_dir: str | os.PathLike) -> None:
        """Write the README.md of an adapter folder; a README of the user's keeps its text and gets new metadata."""
        tags = getattr(self, "model_tags", None) or ()
        model_card.write_model_card(self.active_peft_config, Path(output_dir), tags)

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        **hub: Any,
    ) -> CommitInfo:
        """Upload the adapters, as `save_pretrained` writes them, in one commit.

        A README.md in the repository is not replaced. `slimtune push RUN` writes a longer one.

        Args:
            repo_id: `owner/name`, or `name` for a repository of your own; it is created if it does not exist.
            max_shard_size: ignored, because an adapter is one file.
            tags: further tags of a new README.md.
            hub: private, token, revision and create_pr, as in `utils.hub.commit_files`, which also lists the errors.
        """
        require_repo_id(repo_id)
        config = self.active_peft_config
        if not model_card.public_base(config):
            name = Path(config.base_model_name_or_path or "").name
            hint = "set base_model_name_or_path of the adapter's config to its Hub id"
            log.warning("others cannot find the base %r: %s", name, hint)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            files: dict[str, Path | bytes] = {}
            for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != model_card.CARD_FILE):
                if path.name == CONFIG_FILE:
                    write_config(path.parent, model_card.strip_local_paths(json.loads(path.read_text())))
                files[str(path.relative_to(folder))] = path
            files[model_card.CARD_FILE] = model_card.render_saved_card(config, tags or ()).encode()
            message = commit_message or f"Upload {config.peft_type} adapter"
            keep = (model_card.CARD_FILE,)
            return commit_files(files, repo_id, message=message, description=commit_description, keep=keep, **hub).info
