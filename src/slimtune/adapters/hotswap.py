"""Replace an adapter's values in place, so that a compiled model does not have to be compiled again.

A compiled model depends on shapes and on numbers such as LoRA's scale. So the live parameters keep their objects and
shapes, and a LoRA (A, B, s) of rank r is written into one of rank R ≥ r and scale S as

    A' = [A; 0] (R, in)      B' = [B · s / S, 0] (out, R)      S · B' A' = s · B A

`prepare_model_for_compiled_hotswap` pads the live adapter before the model is compiled: rank R everywhere, S = 1.
"""

import itertools
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
        target_rank: largest rank that will be swapped in; None: ranks stay, scales become 1.
        config: ignored: the adapters' own configs are updated.
        check_compiled: what to do if the model is already compiled.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise UsageError(f"check_compiled is {check_compiled!r}", "'error', 'warn' or 'ignore'")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise UsageError("the model is already compiled", hint=_PREPARE)
        if check_compiled == "warn":
            warnings.warn("the model is already compiled and will be compiled again", stacklevel=2)
    model = _unwrap(model)
    model._require_unmerged()
    lora_adapters: dict[str, dict[str, Any]] = {
        a: model.adapter_modules(a) for a, c in model.peft_config.items() if c.ships_as_lora
    }
    if not lora_adapters:
        raise UsageError("the model has no LoRA adapter", "a LoRA adapter that others can replace")
    for adapter, modules in lora_adapters.items():  # check all before changing any
        for name, module in modules.items():
            factors = _get_own_factors(module)
            if factors is None:
                message = f"adapter {adapter!r} is not a plain LoRA at {name}: {type(module).__name__}"
                raise UsageError(message, hint=f"model.to_lora({adapter!r}, rank) makes one")
            rank = factors[0].shape[0]
            if target_rank is not None and rank > target_rank:
                message = f"target_rank is {target_rank}, but adapter {adapter!r} has rank {rank} at {name}"
                raise UsageError(message, "the largest rank of all adapters")
    for adapter, modules in lora_adapters.items():
        ranks = {}
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
    settings. `hub` says where in a Hub repository: subfolder, revision, token.

    Raises:
        UsageError: the adapter or folder does not exist, or the adapter is merged.
        AdapterError: the file has another base, other layers, a larger rank or (without factors) other settings.
    """
    model = _unwrap(model)
    live_layers = model.adapted_layers(adapter_name)
    model._require_unmerged()
    tensors, config = read_adapter(model, model_name_or_path, None, False, hub)
    temporary = next(n for n in map("hotswap{}".format, itertools.count()) if n not in model.peft_config)
    model.add_adapter(temporary, config, strict=False)
    try:
        load_adapter_tensors(model, temporary, tensors, where=str(model_name_or_path))
        unknown = [n for n in model.adapted_layers(temporary) if n not in live_layers]
        if unknown:
            names = f"{len(unknown)} modules that {adapter_name!r} does not, such as {format_names(unknown, 2)}"
            raise AdapterError(f"{model_name_or_path} changes {names}", hint="load_adapter(path, name)")
        with torch.no_grad():
            for live, new in _match_tensors(model, adapter_name, temporary, model_name_or_path):
                live.copy_(new)
    finally:
        model._remove_adapter(temporary)


def _match_tensors(model: PeftModel, live: str, new: str, where: Any) -> list[tuple[Tensor, Tensor]]:
    """Return each live tensor with the value to copy into it; raise if something does not fit."""
    live_modules = {n: _get_own_factors(m) for n, m in model.adapter_modules(live).items()}
    new_modules = {n: m.low_rank_factors() for n, m in model.adapter_modules(new).items()}
    old_tensors, new_tensors = get_adapter_tensors(model, live), get_adapter_tensors(model, new)
    if None in new_modules.values() or None in live_modules.values():
        check_same_settings(model.peft_config[live], model.peft_config[new], where)
        if {k: t.shape for k, t in old_tensors.items()} != {k: t.shape for k, t in new_tensors.items()}:
            raise AdapterError(f"{where} has other tensors than {live!r}", "an adapter of the same modules and sizes")
        return [(old_tensors[k], new_tensors[k]) for k in old_tensors]
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, live_factors in live_modules.items():
        A, B, scale = live_factors  # type: ignore[misc]
        if name not in new_modules:
            pairs.append((B, torch.zeros_like(B)))
            continue
        new_A, new_B, new_scale = new_modules[name]  # type: ignore[misc]
        padding = A.shape[0] - new_A.shape[0]
        if padding < 0 or not scale:
            theirs = f"rank {new_A.shape[0]} and scale {new_scale:g} at {name}"
            ours = f"space for rank {A.shape[0]} and scale {scale:g}"
            raise AdapterError(f"{where} has {theirs}, {live!r} has {ours}", hint=_PREPARE)
        pairs += [(A, F.pad(new_A, (0, 0, 0, padding))), (B, F.pad(new_B * (new_scale / scale), (0, padding)))]
    live_copies, new_copies = _get_trained_copies(model, live), _get_trained_copies(model, new)
    if set(live_copies) != set(new_copies):
        theirs, ours = format_names(new_copies) or "nothing", format_names(live_copies) or "nothing"
        raise AdapterError(f"{where} trains in full {theirs}, {live!r} {ours}", "the same modules trained in full")
    return pairs + [(live_copies[k], new_copies[k]) for k in live_copies]


def _get_trained_copies(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    layers = {n: m.trained_copies for n, m in model.adapted_layers(adapter).items() if adapter in m.trained_copies}
    return {
        f"{name}.{n}": p
        for name, copies in layers.items()
        for n, p in copies[adapter].state_dict(keep_vars=True).items()
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
