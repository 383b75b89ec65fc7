"""PEFT's functions on state dicts: of an adapter's file, of an attached adapter, and of the base below it."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapters.adapted_layer import ADDED_CHILDREN
from ..core.adapters.adapter_files import (
    read_adapter_tensors_and_metadata,
    rename_keys,
    require_valid_hub_arguments,
)
from ..core.adapters.adapter_tensors import LoadResult, load_adapter_tensors


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
    tensors = peft_model_state_dict
    result = load_adapter_tensors(model, adapter_name, tensors, "the state dict", ignore_mismatched_sizes)
    model.adapter_state.training_fingerprints.pop(adapter_name, None)  # where these tensors were trained is not known
    return result


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
    require_valid_hub_arguments(hub)
    tensors, _ = read_adapter_tensors_and_metadata(model_id, **hub)
    return {k: t.to(device or "cpu") for k, t in rename_keys(tensors, key_mapping).items()}


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
