"""Another adapter's values in the place of one that runs: nothing is rebuilt, a compiled model is not compiled again.

A compiled model holds on to shapes and to numbers such as LoRA's scale. So the live parameters keep their places and
shapes, and a LoRA (A, B, s) of rank r goes into one of rank R ≥ r and scale S as

    A' = [A; 0] (R, in)      B' = [B · s / S, 0] (out, R)      S · B' A' = s · B A

`prepare_model_for_compiled_hotswap` makes the room, before the model is compiled: rank R everywhere, S = 1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError, UsageError, format_names
from . import state_dict
from .config import PeftConfig
from .conversion import rank_settings
from .model import PeftModel
from .state_dict import _only_hub, _read, _same_settings

_PREPARE = "prepare_model_for_compiled_hotswap(model, target_rank=…) before the model is compiled"


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room in the LoRA adapters of a model for others of any alpha and of ranks up to `target_rank`.

    Call it after the first adapter is loaded, and before the model is compiled or an optimizer made: the parameters
    are new ones. What the model computes stays as it is.

    Args:
        model: the model with its adapters.
        target_rank: largest rank that will be swapped in; None: the ranks stay, the scales become 1.
        config: taken for PEFT's sake: the adapters' own configs are kept right.
        check_compiled: what to do where the model is compiled already, which will compile it again: "error", "warn" or
            "ignore".

    Raises:
        UsageError: the model has no LoRA adapters, one has a larger rank, or it is compiled already.
    """
    del config
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if check_compiled not in ("error", "warn", "ignore"):
        raise UsageError(f"check_compiled is {check_compiled!r}", "'error', 'warn' or 'ignore'")
    if compiled and check_compiled == "error":
        raise UsageError("the model is compiled already", "a model that is not", _PREPARE)
    if compiled and check_compiled == "warn":
        warnings.warn("the model is compiled already, and will be compiled again", stacklevel=2)
    model = _model(model)
    model._unmerged()
    at = model._attached
    plans = {
        a: {n: _own_factors(d) for n, d in at.deltas(a).items()} for a in at.configs if at.configs[a].ships_as_lora
    }
    if not plans:
        raise UsageError("the model has no LoRA adapter", "one that others can take the place of")
    for adapter, plan in plans.items():
        for name, found in plan.items():
            if found is None:
                raise UsageError(
                    f"adapter {adapter!r} is no plain LoRA at {name}: {type(at.deltas(adapter)[name]).__name__}",
                    "an adapter of plain low-rank maps",
                    f"model.to_lora({adapter!r}, rank) makes one",
                )
            if target_rank is not None and found[0].shape[0] > target_rank:
                raise UsageError(
                    f"target_rank is {target_rank}, and adapter {adapter!r} has rank {found[0].shape[0]} at {name}",
                    "the largest rank that will be there",
                )
    for adapter, plan in plans.items():
        ranks = {}
        for name, delta in at.deltas(adapter).items():
            A, B, scale = plan[name]  # type: ignore[misc]
            R = ranks[name] = target_rank or A.shape[0]
            _replace(delta, A, F.pad(A.detach(), (0, 0, 0, R - A.shape[0])))
            _replace(delta, B, F.pad(B.detach() * scale, (0, R - B.shape[1])))
            delta.scale = 1.0
        for field, value in rank_settings(ranks).items():
            setattr(at.configs[adapter], field, value)
    _model(model)._rerun()


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike, adapter_name: str, torch_device: Any = None, **hub: Any
) -> None:
    """Copy an adapter from a folder or the Hub into the parameters of one that is there, all or nothing.

    The adapter keeps its name, its parameters and its config, which says what they mean now. Layers the new adapter
    does not change are zeroed. Methods without low-rank factors swap with adapters of the same settings.

    Args:
        model: the model with the adapter, compiled or not.
        model_name_or_path: an adapter folder or a Hub repository.
        adapter_name: the adapter whose place is taken.
        torch_device: taken for PEFT's sake.
        hub: where on the Hub: subfolder, revision, token, cache_dir.

    Raises:
        UsageError: there is no such adapter or folder, or the adapter is merged.
        AdapterError: the file is for another base, other layers, a larger rank or (without factors) other settings.
    """
    del torch_device
    model, where = _model(model), model_name_or_path
    at = model._attached
    model._known(adapter_name)
    model._unmerged()
    tensors, config = _read(model, where, False, None, _only_hub(hub))
    swap = next(n for n in (f"hotswap{i}" for i in range(len(at.configs) + 1)) if n not in at.configs)
    model.add_adapter(swap, config, strict=False)
    try:
        state_dict.load_adapter_tensors(model, swap, tensors, where=str(where))
        unknown = [n for n in _places(model, swap) if n not in _places(model, adapter_name)]
        if unknown:
            raise AdapterError(
                f"{where} changes {len(unknown)} modules that {adapter_name!r} does not, such as {format_names(unknown, 2)}",
                "an adapter of the same modules, or of fewer",
                "load_adapter(path, name) under a name of its own",
            )
        pairs = _in_place(model, adapter_name, swap, where)
        with torch.no_grad():
            for live, value in pairs:
                live.copy_(value)
    finally:
        model._drop(swap)


def _in_place(model: PeftModel, name: str, swap: str, where: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the live tensors and what is copied into them; raise where something does not fit."""
    at = model._attached
    live, new = at.deltas(name), at.deltas(swap)
    factors = {n: d.low_rank_factors() for n, d in new.items()}
    if any(f is None for f in factors.values()) or any(_own_factors(d) is None for d in live.values()):
        _same_settings(at.configs[name], at.configs[swap], where)
        mine, theirs = state_dict.get_adapter_tensors(model, name), state_dict.get_adapter_tensors(model, swap)
        if {k: t.shape for k, t in mine.items()} != {k: t.shape for k, t in theirs.items()}:
            raise AdapterError(f"{where} has other tensors than {name!r}", "an adapter of the same modules and sizes")
        return [(mine[k], theirs[k]) for k in mine]
    pairs: list[tuple[Tensor, Tensor]] = []
    for n, delta in live.items():
        A, B, scale = _own_factors(delta)  # type: ignore[misc]
        found = factors.get(n)
        if found is None:
            pairs.append((B, torch.zeros_like(B)))
            continue
        a, b, s = found
        room = A.shape[0] - a.shape[0]
        if room < 0 or not scale:
            raise AdapterError(
                f"{where} has rank {a.shape[0]} and scale {s:g} at {n}, {name!r} has room for rank {A.shape[0]} and "
                f"scale {scale:g}",
                "a rank that is not larger",
                _PREPARE,
            )
        pairs += [(A, F.pad(a, (0, 0, 0, room))), (B, F.pad(b * (s / scale), (0, room)))]
    return pairs + _owned(model, name, swap, where)


def _owned(model: PeftModel, name: str, swap: str, where: Any) -> list[tuple[Tensor, Tensor]]:
    mine, theirs = (
        {
            f"{n}.{k}": p
            for n, m in model._attached.members[a]
            if a in m.trained_copies
            for k, p in m.trained_copies[a].named_parameters()
        }
        for a in (name, swap)
    )
    if set(mine) != set(theirs):
        raise AdapterError(
            f"{where} trains whole {format_names(theirs) or 'nothing'}, {name!r} {format_names(mine) or 'nothing'}",
            "the same modules trained whole",
        )
    return [(mine[k], theirs[k]) for k in mine]


def _places(model: PeftModel, name: str) -> set[str]:
    return {n for n, _ in model._attached.members[name]}


def _own_factors(delta: Any) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    """Return a delta's factors where they are parameters of its own, so that others can be copied into them."""
    found = delta.low_rank_factors()
    own = {id(p) for p in delta.parameters()}
    if found is None or not {id(found[0]), id(found[1])} <= own or getattr(delta, "scale", None) != found[2]:
        return None
    return found


def _replace(delta: nn.Module, old: Tensor, value: Tensor) -> None:
    name = next(n for n, p in delta.named_parameters() if p is old)
    at, _, leaf = name.rpartition(".")
    home = delta.get_submodule(at)
    home._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    if isinstance(home, nn.Linear):
        home.out_features, home.in_features = value.shape


def _model(model: Any) -> PeftModel:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise UsageError(f"a {type(model).__name__} has no adapters", "a model with adapters")
    return model
