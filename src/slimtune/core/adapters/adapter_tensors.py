"""The tensors of an attached adapter, by their keys in a file, and how a file's tensors get into an adapter.

A key is `base_model.model.<module>.<tensor>`, for example `…q_proj.lora_A.weight`. A trained bias of an adapted module
is stored as `<module>.base_layer.bias`, a module trained in full under its own name. A missing, unexpected or wrongly
shaped tensor is an error.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ...errors import AdapterError, PeftWarning, format_names, suggest
from ..foundation.files import read_json_object
from ..kernels.linear_layers import is_finite
from .adapted_layer import read_adapter_site
from .peft_config import PeftConfig
from .targets import match_targets

PREFIX = "base_model.model."
"""How the keys of a file start."""
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_FREE_VALUES, _MAX_RATIO = 1 << 20, 64
"""An adapter may start with this many values more than its file, times this factor: AdaLoRA prunes ranks."""


class LoadResult(NamedTuple):
    """Keys that did not match. For adapters both lists are always empty: loading raises instead."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_adapter_tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's live tensors by their keys in a file."""
    found: dict[str, Tensor] = {}
    for name, layer in model.adapted_layers(adapter_name).items():
        site = _file_prefix(name, model.match_report(adapter_name).kinds)
        has_module = adapter_name in layer.adapters
        if has_module:
            found |= {site + n: p for n, p in layer.adapters[adapter_name].tensors().items()}
        if adapter_name in layer.trained_copies:
            copies = f"{site}base_layer." if has_module else site
            found |= {copies + n: p for n, p in layer.trained_copies[adapter_name].state_dict(keep_vars=True).items()}
    config = model.peft_config[adapter_name]
    if config.trains_every_weight:  # the copy of tied weights is stored once, under its first name
        first_keys = {id(tensor): key for key, tensor in reversed(found.items())}
        found = {key: tensor for key, tensor in found.items() if first_keys[id(tensor)] == key}
    return {config.file_key(k): t for k, t in found.items()}


def _file_prefix(name: str, kinds: Mapping[str, str]) -> str:
    """Return how a module's keys start; PEFT wraps an attention module before its out_proj."""
    parent, _, leaf = name.rpartition(".")
    path = f"{parent}.base_layer.{leaf}" if parent and kinds.get(parent) == "weight" else name
    return f"{PREFIX}{path}." if path else PREFIX


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
            text = (
                f"save_embedding_layers is True, but a {type(model).__name__} is no transformers model: none is found"
            )
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
        why = "the adapter changes" if changed else "were resized"
        text = f"the file gets the base's embeddings, which {why}; save_embedding_layers=False leaves them out"
        warnings.warn(text, PeftWarning, stacklevel=4)
    return {
        f"{PREFIX}{name}.{'base_layer.' if changed else ''}{key}": tensor
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
    return read_json_object(Path(cached), error_class=AdapterError).get("vocab_size", size) != size


def load_adapter_tensors(
    model: Any, adapter_name: str, tensors: Mapping[str, Tensor], source: str, ignore_mismatched_sizes: bool = False
) -> LoadResult:
    """Copy a file's tensors into an attached adapter, all or none; return the keys that did not match: none.

    `ignore_mismatched_sizes` leaves out, with a warning, the tensors whose shapes differ.

    Raises:
        AdapterError: missing or unexpected keys, wrong shapes, or a copy of a base weight that differs from the base's.
    """
    _leave_meta_device(model, adapter_name)
    if ignore_mismatched_sizes:
        own = get_adapter_tensors(model, adapter_name)
        keys = {k: _normalize_key(k, own) for k in tensors}
        wrong = [k for k, ours in keys.items() if ours in own and own[ours].shape != tensors[k].shape]
        if wrong:
            sizes = "; ".join(f"{k}: {tuple(tensors[k].shape)}, not {tuple(own[keys[k]].shape)}" for k in wrong)
            message = f"{len(wrong)} tensors of the adapter were not loaded, since their shapes differ: {sizes}"
            warnings.warn(message, PeftWarning, stacklevel=3)
        tensors = {**tensors, **{k: own[keys[k]].detach() for k in wrong}}
    optional = _prepare_load(model, adapter_name, tensors)
    own = get_adapter_tensors(model, adapter_name)
    tensors = {_normalize_key(k, own): t for k, t in tensors.items()}
    missing = [k for k in own if k not in tensors and k not in optional]
    extra = {k: _find_base_weight(model, k) for k in tensors if k not in own}
    resized = bool(extra) and _is_resized(model, model.peft_config[adapter_name].base_model_name_or_path)
    unexpected = [k for k, base in extra.items() if base is None or not _fits_base(model, base, tensors[k], resized)]
    # A config with bias="none" may come with biases that were trained. A bias is not a mark of another base.
    shapes_here = {k: base.shape for k, base in extra.items() if base is not None and k.endswith(".bias")}
    biases = [k for k in unexpected if shapes_here.get(k) == tensors[k].shape]
    unexpected = [k for k in unexpected if k not in biases]
    if faults := _list_faults(own, tensors, missing, unexpected):
        hint = "load the base named in its adapter_config.json"
        if len(faults) == 1 and "NaN or Inf" in faults[0]:
            hint = "the training that wrote it diverged: load an earlier checkpoint"
        raise AdapterError(f"{source} does not fit this model: {'; '.join(faults)}", hint=hint, code="wrong-base")
    if biases:
        model.copy_biases(adapter_name, [_get_base_name(k) for k in biases])
        own = get_adapter_tensors(model, adapter_name)
        tensors = {_normalize_key(k, own): t for k, t in tensors.items()}
    with torch.no_grad():
        for key, tensor in {**extra, **own}.items():  # `extra`: embeddings that were resized before they were saved
            if tensor is not None and key in tensors:
                tensor.copy_(tensors[key])
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
        similar = suggest(unexpected[0], own)
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


def iterate_config_tensors(model: Any, config: PeftConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield key and tensor, on the meta device, of the adapter modules that a config makes on a base; nothing changes.

    Args:
        model: the base, without adapters.
        config: names that match nothing are accepted, as for a file.
    """
    config = copy.deepcopy(config)
    config.check_model(model)
    config.fill_from_model(model)
    kinds = match_targets(model, config, require_every_match=False).kinds
    meta = torch.device("meta")
    sites = [
        dataclasses.replace(read_adapter_site(n, kind, model, skip_init=True), device=meta) for n, kind in kinds.items()
    ]
    for site, module in zip(sites, config.build_all(sites), strict=True):
        prefix = _file_prefix(site.name, kinds)
        for name, tensor in module.tensors().items():
            yield config.file_key(prefix + name), tensor


def require_plausible_config_size(model: Any, config: PeftConfig, tensors: Mapping[str, Tensor], path: object) -> None:
    """Raise AdapterError if the config asks for far more memory than a file's tensors, before it is allocated."""
    unsaved = 0
    for key, tensor in iterate_config_tensors(model, config):
        if key not in tensors:
            unsaved += tensor.numel()
        elif tensor.numel() > _FREE_VALUES + _MAX_RATIO * tensors[key].numel():
            sizes = f"{key} is {tuple(tensors[key].shape)} in the file, but {tuple(tensor.shape)} by its config"
            raise AdapterError(
                f"{path}: {sizes}", "an adapter_config.json that belongs to the tensors", code="wrong-base"
            )
    if unsaved > _FREE_VALUES + sum(p.numel() for p in model.parameters()):
        message = f"{path}: its config asks for {unsaved:,} values that its file does not have"
        raise AdapterError(message, "an adapter_config.json that belongs to the tensors", code="wrong-base")


def _leave_meta_device(model: Any, adapter: str) -> None:
    """Rebuild the modules of an adapter that is on the meta device on the devices of their layers."""
    old = model.adapter_modules(adapter)
    on_meta = [p for module in old.values() for p in module.parameters() if p.is_meta]
    layers = model.adapted_layers(adapter)
    if not on_meta or all(p.is_meta for layer in layers.values() for p in layer._parameters.values() if p is not None):
        return
    config, kinds = model.peft_config[adapter], model.match_report(adapter).kinds
    how: dict[str, Any] = {"autocast": on_meta[0].dtype == torch.float32, "skip_init": True}
    with model.disable_adapter():
        new = config.build_all([read_adapter_site(name, kind, model, **how) for name, kind in kinds.items()])
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
        module.before_load_state_dict(tensors, read_adapter_site(name, kinds[name], model))
        optional |= {config.file_key(site + n) for n in module.optional}
    return optional


def _normalize_key(key: str, own: Mapping[str, Any]) -> str:
    """Return our key for one of PEFT's variants: both places of a bias, keys without the prefix."""
    # With bias="all" PEFT writes biases of a module trained in full twice, the second time under its wrapper's names.
    key = key.replace(".modules_to_save.", ".")
    forms = (key, PREFIX + key, key.replace(".base_layer.", "."), key.replace(".bias", ".base_layer.bias"))
    return next((form for form in forms if form in own), key)


def _get_base_name(key: str) -> str:
    """Return the name in the base of a key that is a base tensor's."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


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
