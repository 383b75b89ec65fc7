"""A PeftModel's files: saving, loading onto a base, loading beside other adapters. The format is in `checkpoint.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import AdapterError, UsageError, format_names, nearest
from . import state_dict as adapter_files
from .config import PeftConfig

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
            adapter_files.save(self, folder, name, state_dict)

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
            adapter_files.load(adapted, adapter_name, tensors, where=str(model_id))
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
    ) -> adapter_files.LoadResult:
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
            adapter_files.load(self, adapter_name, tensors, where=str(model_id))
            return adapter_files.LoadResult([], [])
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, strict=False)
        try:
            adapter_files.load(self, adapter_name, tensors, where=str(model_id))
        except BaseException:
            self._drop(adapter_name)
            raise
        self.set_requires_grad(adapter_name, is_trainable and adapter_name in self.active_adapters)
        if not is_trainable:
            self.eval()
        return adapter_files.LoadResult([], [])

    def create_or_update_model_card(self: Any, output_dir: str | os.PathLike) -> None:
        """Write the README.md of an adapter folder, unless there is one."""
        adapter_files.write_model_card(self.active_peft_config, Path(output_dir))


def _read(
    model: Any, where: str | os.PathLike, is_trainable: bool, config: PeftConfig | None, hub: dict[str, Any]
) -> tuple[dict, PeftConfig]:
    tensors, base = adapter_files.read(where, **hub)
    config = config or PeftConfig.from_pretrained(where, **hub)
    adapter_files.check_same_base(model, base, where)
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
