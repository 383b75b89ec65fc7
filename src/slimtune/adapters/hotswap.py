"""Replace an adapter's values in place, so that a compiled model does not have to be compiled again.

A compiled model depends on shapes and on numbers such as LoRA's scale. So the live parameters keep their objects and
shapes, and a LoRA (A, B, s) of rank r is written into one of rank R ≥ r and scale S as

    A' = [A; 0] (R, in)      B' = [B · s / S, 0] (out, R)      S · B' A' = s · B A

`prepare_model_for_compiled_hotswap` pads the live adapter before the model is compiled: rank R everywhere, S = 1.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError, UsageError, format_names
from .config import PeftConfig
from .conversion import rank_settings
from .model import PeftModel
from .state_dict import check_same_settings, get_adapter_tensors, load_adapter_tensors, read_adapter

_PREPARE = "prepare_model_for_compiled_hotswap(model, target_rank=…) before the model is compiled"


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Pad a model's LoRA adapters so that adapters of any alpha and of ranks up to `target_rank` can replace them.

    Call it after the first adapter is loaded and before the model is compiled or an optimizer is created: it creates
    new parameters. The model's output does not change.

    Args:
        model: the model with its adapters.
        target_rank: largest rank that will be swapped in; None: ranks stay, scales become 1.
        config: accepted for PEFT compatibility; ignored, since the adapters' own configs are updated.
        check_compiled: what to do if the model is already compiled: "error", "warn" or "ignore".

    Raises:
        UsageError: the model has no LoRA adapters, one has a larger rank, or the model is already compiled.
    """
    del config
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if check_compiled not in ("error", "warn", "ignore"):
        raise UsageError(f"check_compiled is {check_compiled!r}", "'error', 'warn' or 'ignore'")
    if compiled and check_compiled == "error":
        raise UsageError("the model is already compiled", "a model that is not", _PREPARE)
    if compiled and check_compiled == "warn":
        warnings.warn("the model is already compiled and will be compiled again", stacklevel=2)
    model = _unwrap(model)
    model._require_unmerged()
    lora_adapters = [a for a, c in model.peft_config.items() if c.ships_as_lora]
    if not lora_adapters:
        raise UsageError("the model has no LoRA adapter", "a LoRA adapter that others can replace")
    for adapter in lora_adapters:  # check all before changing any
        for name, module in model.adapter_modules(adapter).items():
            factors = _get_own_factors(module)
            if factors is None:
                raise UsageError(
                    f"adapter {adapter!r} is not a plain LoRA at {name}: {type(module).__name__}",
                    "an adapter of plain low-rank layers",
                    f"model.to_lora({adapter!r}, rank) makes one",
                )
            if target_rank is not None and factors[0].shape[0] > target_rank:
                raise UsageError(
                    f"target_rank is {target_rank}, but adapter {adapter!r} has rank {factors[0].shape[0]} at {name}",
                    "the largest rank of all adapters",
                )
    for adapter in lora_adapters:
        ranks = {}
        modules: dict[str, Any] = model.adapter_modules(adapter)
        for name, module in modules.items():
            A, B, scale = module.low_rank_factors()
            ranks[name] = rank = target_rank or A.shape[0]
            _replace_parameter(module, A, F.pad(A.detach(), (0, 0, 0, rank - A.shape[0])))
            _replace_parameter(module, B, F.pad(B.detach() * scale, (0, rank - B.shape[1])))
            module.scale = 1.0
        for field, value in rank_settings(ranks).items():
            setattr(model.peft_config[adapter], field, value)
    model._update_active_state()


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike, adapter_name: str, torch_device: Any = None, **hub: Any
) -> None:
    """Copy an adapter from a folder or the Hub into the parameters of an existing one, all or nothing.

    The existing adapter keeps its name, its parameter objects and its config, which still describes them. Layers that
    the new adapter does not change are zeroed. Methods without low-rank factors swap only with adapters of the same
    settings.

    Args:
        model: the model with the adapter, compiled or not.
        model_name_or_path: an adapter folder or a Hub repository.
        adapter_name: the adapter to overwrite.
        torch_device: accepted for PEFT compatibility; ignored.
        hub: where on the Hub: subfolder, revision, token, cache_dir.

    Raises:
        UsageError: the adapter or folder does not exist, or the adapter is merged.
        AdapterError: the file has another base, other layers, a larger rank or (without factors) other settings.
    """
    del torch_device
    model = _unwrap(model)
    live_layers = model.adapted_layers(adapter_name)
    model._require_unmerged()
    tensors, config = read_adapter(model, model_name_or_path, None, False, hub)
    taken = model.peft_config
    temporary = next(n for n in (f"hotswap{i}" for i in range(len(taken) + 1)) if n not in taken)
    model.add_adapter(temporary, config, strict=False)
    try:
        load_adapter_tensors(model, temporary, tensors, where=str(model_name_or_path))
        unknown = [n for n in model.adapted_layers(temporary) if n not in live_layers]
        if unknown:
            raise AdapterError(
                f"{model_name_or_path} changes {len(unknown)} modules that {adapter_name!r} does not, such as "
                f"{format_names(unknown, 2)}",
                "an adapter of the same modules, or of fewer",
                "load_adapter(path, name) under a new name",
            )
        copies = _match_tensors(model, adapter_name, temporary, model_name_or_path)
        with torch.no_grad():
            for live, new in copies:
                live.copy_(new)
    finally:
        model._remove_adapter(temporary)


def _match_tensors(model: PeftModel, live: str, new: str, where: Any) -> list[tuple[Tensor, Tensor]]:
    """Return each live tensor with the value to copy into it; raise if something does not fit."""
    live_modules, new_modules = model.adapter_modules(live), model.adapter_modules(new)
    new_factors = {n: m.low_rank_factors() for n, m in new_modules.items()}
    if None in new_factors.values() or any(_get_own_factors(m) is None for m in live_modules.values()):
        check_same_settings(model.peft_config[live], model.peft_config[new], where)
        old_tensors, new_tensors = get_adapter_tensors(model, live), get_adapter_tensors(model, new)
        if {k: t.shape for k, t in old_tensors.items()} != {k: t.shape for k, t in new_tensors.items()}:
            raise AdapterError(f"{where} has other tensors than {live!r}", "an adapter of the same modules and sizes")
        return [(old_tensors[k], new_tensors[k]) for k in old_tensors]
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, module in live_modules.items():
        A, B, scale = _get_own_factors(module)  # type: ignore[misc]
        factors = new_factors.get(name)
        if factors is None:
            pairs.append((B, torch.zeros_like(B)))
            continue
        new_A, new_B, new_scale = factors
        padding = A.shape[0] - new_A.shape[0]
        if padding < 0 or not scale:
            raise AdapterError(
                f"{where} has rank {new_A.shape[0]} and scale {new_scale:g} at {name}, {live!r} has space for rank "
                f"{A.shape[0]} and scale {scale:g}",
                "a rank that is not larger",
                _PREPARE,
            )
        pairs += [(A, F.pad(new_A, (0, 0, 0, padding))), (B, F.pad(new_B * (new_scale / scale), (0, padding)))]
    live_copies, new_copies = _get_trained_copies(model, live), _get_trained_copies(model, new)
    if set(live_copies) != set(new_copies):
        raise AdapterError(
            f"{where} trains in full {format_names(new_copies) or 'nothing'}, "
            f"{live!r} {format_names(live_copies) or 'nothing'}",
            "the same modules trained in full",
        )
    return pairs + [(live_copies[k], new_copies[k]) for k in live_copies]


def _get_trained_copies(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    return {
        f"{name}.{n}": p
        for name, layer in model.adapted_layers(adapter).items()
        if adapter in layer.trained_copies
        for n, p in layer.trained_copies[adapter].named_parameters()
    }


def _get_own_factors(module: Any) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    """Return a module's factors if they are its own parameters, so that values can be copied into them, else None."""
    factors = module.low_rank_factors()
    own = {id(p) for p in module.parameters()}
    if factors is None or not {id(factors[0]), id(factors[1])} <= own or getattr(module, "scale", None) != factors[2]:
        return None
    return factors


def _replace_parameter(module: nn.Module, old: Tensor, value: Tensor) -> None:
    name = next(n for n, p in module.named_parameters() if p is old)
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = value.shape


def _unwrap(model: Any) -> PeftModel:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise UsageError(f"a {type(model).__name__} has no adapters", "a model with adapters")
    return model
