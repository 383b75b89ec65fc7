"""PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, read strictly and written whole.

A key is `base_model.model.<module>.<tensor>`: `…q_proj.lora_A.weight`. A trained bias of an adapted module lies under
`<module>.base_layer.bias`, a module trained whole under its own name. The file's metadata hold a fingerprint of the
base's config. Nothing is left out of account: a missing, unexpected or wrongly shaped tensor is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..errors import AdapterError, UsageError, format_names, nearest
from ..utils.files import write_atomic
from ..utils.fingerprint import config_fingerprint
from .config import CONFIG_FILE, PeftConfig, find_file
from .layer import get_site
from .model_card import write_model_card

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIX = "base_model.model."
_FINGERPRINT = "base_config"


class LoadResult(NamedTuple):
    """What `set_peft_model_state_dict` left over; both are empty, or it raised."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_adapter_tensors(model: Any, adapter: str) -> dict[str, Tensor]:
    """Return what a file holds of an adapter: its own live tensors by their keys in the file."""
    found: dict[str, Tensor] = {}
    for name, module in model._attached.members.get(adapter, []):
        at = f"{_PREFIX}{name}." if name else _PREFIX
        delta: Any = module.adapters[adapter] if adapter in module.adapters else None  # noqa: SIM401 (a ModuleDict has no get)
        if delta is not None:
            found.update({at + n: p for n, p in delta.tensors().items()})
        if adapter in module.trained_copies:
            inner = f"{at}base_layer." if delta is not None else at
            found.update({inner + n: p for n, p in module.trained_copies[adapter].named_parameters()})
    config = model.peft_config.get(adapter)
    if config is not None and config.trains_every_weight:  # the copy of tied weights is written once, by its first name
        first_key = {id(tensor): key for key, tensor in reversed(found.items())}
        found = {key: tensor for key, tensor in found.items() if first_key[id(tensor)] == key}
    return {config.file_key(k): t for k, t in found.items()} if config else found


def _accept(model: Any, adapter: str, given: Mapping[str, Tensor]) -> set[str]:
    """Let each delta get ready for a file's tensors; return the keys that the file may leave out."""
    config, optional = model.peft_config[adapter], set()
    for name, module in model._attached.members[adapter]:
        if adapter not in module.adapters:
            continue
        delta: Any = module.adapters[adapter]
        at = f"{_PREFIX}{name}." if name else _PREFIX
        # By the names a file may have, which need not be those the delta holds now.
        mine = {k.removeprefix(at): t for k, t in given.items() if k.startswith(at)}
        mine |= {n: given[k] for n in delta.tensors() for k in [config.file_key(at + n)] if k in given}
        delta.prepare_load(mine, get_site(name, model._attached.reports[adapter].kinds[name], model))
        optional |= {config.file_key(at + n) for n in delta.optional}
    return optional


def get_peft_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **_: Any
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in a file; from `state_dict` (names of the live model) where given."""
    own = get_adapter_tensors(model, model._known(adapter_name))
    if state_dict is None:
        return {k: p.detach() for k, p in own.items()}
    names = {id(p): n for n, p in model.state_dict(keep_vars=True).items()}
    return {k: state_dict[names[id(p)]] if id(p) in names else p.detach() for k, p in own.items()}


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", **_: Any
) -> LoadResult:
    """Copy tensors, by their keys in a file, into an attached adapter; raises AdapterError where they do not fit."""
    load_adapter_tensors(model, model._known(adapter_name), peft_model_state_dict, where="the state dict")
    return LoadResult([], [])


def load_adapter_tensors(model: Any, adapter: str, given: Mapping[str, Tensor], where: str) -> None:
    """Copy a file's tensors into an attached adapter, all or none.

    Raises:
        AdapterError: missing or unexpected keys, wrong shapes, or a copy of a base weight that is not this base's.
    """
    optional = _accept(model, adapter, given)
    own = get_adapter_tensors(model, adapter)
    given = {_our_key(k, own): t for k, t in given.items()}
    missing = [k for k in own if k not in given and k not in optional]
    unexpected = [k for k in given if k not in own and not _is_this_bases(model, k, given[k])]
    shapes = [
        f"{k}: {tuple(given[k].shape)} in the file, {tuple(own[k].shape)} here"
        for k in own
        if k in given and given[k].shape != own[k].shape
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(own)} tensors are missing, such as {format_names(missing, 2)}")
    if unexpected:
        faults.append(
            f"{len(unexpected)} tensors fit nothing here, such as {format_names(unexpected, 2)}{nearest(unexpected[0], own)}"
        )
    if shapes:
        faults.append(f"{len(shapes)} tensors have another shape: {'; '.join(shapes[:2])}")
    if faults:
        raise AdapterError(
            f"{where} does not fit this model: " + "; ".join(faults),
            "an adapter of this base and these targets",
            "load the base named in its adapter_config.json",
        )
    with torch.no_grad():
        for key, parameter in own.items():
            if key in given:
                parameter.copy_(given[key])


def read_adapter_file(
    path: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> tuple[dict[str, Tensor], str | None]:
    """Return an adapter file's tensors and the fingerprint of the base it was made for (None: not by us).

    Raises:
        UsageError: there is no such adapter.
        AdapterError: it is a pickle, or no sound safetensors file.
    """
    folder = Path(path, subfolder or "")
    pickles = [p for p in PICKLES if (folder / p).is_file()]
    if pickles and not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(
            f"{folder / pickles[0]} is a pickle, which can run any code when it is read",
            WEIGHTS_FILE,
            "save the adapter anew with safetensors where it was trained",
        )
    file = find_file(path, WEIGHTS_FILE, subfolder, **hub)
    try:
        with safe_open(str(file), framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, (f.metadata() or {}).get(_FINGERPRINT)  # noqa: SIM118
    except SafetensorError as e:
        raise AdapterError(
            f"{file} ({file.stat().st_size} bytes) is no sound safetensors file: {e}",
            "a whole file",
            "copy it again, or take an older checkpoint",
        ) from None


def adapter_tensor_info(
    model: Any, adapter: str, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what an adapter's file holds: tensors by their keys, where they lie now, and the metadata."""
    made_for = base_fingerprint(model)
    metadata = {"format": "pt", **({_FINGERPRINT: made_for} if made_for else {})}
    return get_peft_model_state_dict(model, state_dict, adapter), metadata


def save_adapter(model: Any, folder: Path, adapter: str, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write one adapter's two files and a model card into `folder`; each file is whole or absent."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file", "a folder")
    live, metadata = adapter_tensor_info(model, adapter, state_dict)
    plain = {k: t.detach().to("cpu").contiguous() for k, t in live.items()}
    config = model.peft_config[adapter]
    # A file is for use: PEFT, too, writes inference_mode so that it loads frozen.
    described = {**config.to_dict(), "inference_mode": True}
    if config.task_type is None:
        base = model._attached.base_class
        described["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG_FILE, json.dumps(described, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / WEIGHTS_FILE, to_bytes(plain, metadata))
    write_model_card(config, folder)


def base_fingerprint(model: Any) -> str | None:
    """Return the fingerprint of a transformers model's config, None for other modules."""
    config = getattr(model, "config", None)
    return config_fingerprint(config) if hasattr(config, "to_dict") else None


def check_same_base(model: Any, made_for: str | None, where: str | os.PathLike) -> None:
    """Raise AdapterError where an adapter was made for a base with another config."""
    here = base_fingerprint(model)
    if made_for and here and made_for != here:
        raise AdapterError(
            f"{where} was made for another base: its config has the fingerprint {made_for}, this one {here}",
            "the base the adapter was trained on",
            "see base_model_name_or_path in its adapter_config.json",
        )


def _our_key(key: str, own: Mapping[str, Any]) -> str:
    """Take both of PEFT's places for a bias, and keys written without the prefix."""
    # With bias="all" PEFT writes the biases of a module trained whole a second time, under its wrapper's names.
    key = key.replace(".modules_to_save.", ".")
    for form in (key, _PREFIX + key, key.replace(".base_layer.", "."), key.replace(".bias", ".base_layer.bias")):
        if form in own:
            return form
    return key


def _is_this_bases(model: Any, key: str, tensor: Tensor) -> bool:
    """PEFT also saves embeddings it did not train; they must be this base's own."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    module, _, leaf = name.rpartition(".")
    try:
        base = model.get_submodule(module)._parameters.get(leaf)
    except AttributeError:
        return False
    return base is not None and base.shape == tensor.shape and torch.equal(base.detach().cpu(), tensor.to(base.dtype))


_HUB = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
_MOOT = ("torch_dtype", "dtype", "device_map", "max_memory", "offload_folder", "offload_dir", "ephemeral_gpu_offload")
"""PEFT's arguments about where and how the base lies: it is loaded already, and an adapter goes where its layer is."""
_NOTES = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"}
"""Fields of a config that change nothing an adapter computes."""


class AdapterFiles:
    """The part of a `PeftModel` that reads and writes files."""

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
        """Write `adapter_config.json` and `adapter_model.safetensors`; adapters not named "default" go to subfolders.

        Raises:
            UsageError: a pickle is asked for (safe_serialization=False), an unknown adapter, or a path that is a file.
        """
        if not safe_serialization:
            raise UsageError("safe_serialization=False asks for a pickle", "safetensors", "leave the argument out")
        if save_embedding_layers not in ("auto", False) or path_initial_model_for_weight_conversion is not None:
            raise UsageError(
                "save_embedding_layers=True or path_initial_model_for_weight_conversion is not supported",
                "an adapter's own tensors",
                'train the embeddings with the adapter: modules_to_save=["embed_tokens"]',
            )
        if not is_main_process:
            return
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory, self._known(name))
            save_adapter(self, folder, name, state_dict)

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
        **hub: Any,
    ) -> Any:
        """Attach an adapter from a folder or the Hub to `model`, in place.

        Args:
            model: the base the adapter was trained on.
            model_id: an adapter folder or a Hub repository.
            adapter_name: name the adapter gets.
            is_trainable: whether it will train on; else it loads frozen and the model goes into evaluation mode.
            config: the adapter's config, where it is read already.
            autocast_adapter_dtype: keep the adapter in fp32 above a 16-bit base.
            low_cpu_mem_usage: taken for PEFT's sake.
            hub: where on the Hub: subfolder, revision, token, cache_dir.

        Raises:
            UsageError: there is no such folder or repository, or an unknown argument.
            AdapterError: the adapter is for another base, its config, keys or shapes do not fit, or it is a pickle.
        """
        del low_cpu_mem_usage
        hub = _only_hub(hub)
        if isinstance(model, AdapterFiles):
            more = {"autocast_adapter_dtype": autocast_adapter_dtype, "config": config, **hub}
            model.load_adapter(model_id, adapter_name, is_trainable, **more)
            return model
        tensors, config = _read(model, model_id, is_trainable, config, hub)
        adapted = cls._adopt(model, adapter_name, config, autocast_adapter_dtype, strict=False)
        try:
            load_adapter_tensors(adapted, adapter_name, tensors, where=str(model_id))
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
        **hub: Any,
    ) -> LoadResult:
        """Load an adapter beside the others, inactive; under a name that is there, load its tensors into it.

        Raises:
            UsageError, AdapterError: see `from_pretrained`; under a name that is there, other settings do not fit.
        """
        del torch_device, low_cpu_mem_usage
        hub = _only_hub(hub)
        tensors, config = _read(self, model_id, is_trainable, config, hub)
        if adapter_name in self.peft_config:
            _same_settings(self.peft_config[adapter_name], config, model_id)
            if adapter_name in self._attached.merged:
                raise UsageError(
                    f"{adapter_name!r} is merged into the base", "an unmerged adapter", "unmerge_adapter() first"
                )
            load_adapter_tensors(self, adapter_name, tensors, where=str(model_id))
            return LoadResult([], [])
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, strict=False)
        try:
            load_adapter_tensors(self, adapter_name, tensors, where=str(model_id))
        except BaseException:
            self._drop(adapter_name)
            raise
        self.set_requires_grad(adapter_name, is_trainable and adapter_name in self.active_adapters)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def create_or_update_model_card(self: Any, output_dir: str | os.PathLike) -> None:
        """Write the README.md of an adapter folder, unless there is one."""
        write_model_card(self.active_peft_config, Path(output_dir))


def _read(
    model: Any, where: str | os.PathLike, is_trainable: bool, config: PeftConfig | None, hub: dict[str, Any]
) -> tuple[dict, PeftConfig]:
    tensors, base = read_adapter_file(where, **hub)
    config = config or PeftConfig.from_pretrained(where, **hub)
    check_same_base(model, base, where)
    config.inference_mode = not is_trainable
    return tensors, config


def _only_hub(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the Hub; those that ask what is so anyway are taken, the rest is refused."""
    unknown = [k for k in given if k not in (*_HUB, *_MOOT)]
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}{nearest(unknown[0], _HUB)}", f"one of {format_names(_HUB)}")
    return {k: v for k, v in given.items() if k in _HUB}


def _same_settings(here: PeftConfig, there: PeftConfig, where: str | os.PathLike) -> None:
    """Raise where a file's adapter was trained with settings that would make its tensors mean something else here."""
    ours, theirs = here.to_dict(), there.to_dict()
    # Which modules were matched, the keys say; how the parameters started, they have left behind.
    passing = {
        *_NOTES,
        *here.training_written_fields,
        "target_modules",
        "exclude_modules",
        "init_lora_weights",
        "lora_dropout",
    }
    other = [k for k in ours if k not in passing and ours[k] != theirs.get(k)]
    if other:
        told = "; ".join(f"{k} is {theirs.get(k)!r} there, {ours[k]!r} here" for k in other)
        raise AdapterError(
            f"{where} was trained with other settings: {told}",
            "an adapter with the same settings",
            "load it under another name",
        )
