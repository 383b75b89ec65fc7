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
from torch import Tensor, nn

from ..core.adapters.adapter_files import read_tensors_config_metadata_for_model, require_compatible_config
from ..core.adapters.adapter_tensors import get_adapter_tensors, load_adapter_tensors
from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import PeftModel
from ..errors import AdapterError, UsageError, format_names
from .lora_conversion import make_lora_config_rank_fields

_PREPARE = "prepare_model_for_compiled_hotswap(model, target_rank=…) before the model is compiled"

_LORA_TENSORS = {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"}
_CHANNELS = ("in_channels", "out_channels")


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Pad a model's LoRA adapters so that adapters of any alpha and of ranks up to `target_rank` can replace them.

    Call it after the first adapter is loaded and before the model is compiled or an optimizer is created: it changes
    the shapes of parameters. The model's output does not change.

    Args:
        target_rank: largest rank that will be swapped in; None: ranks stay, scales become 1.
        config: ignored: the adapters' own configs are updated.
        check_compiled: what to do if the model is already compiled.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise UsageError(f"check_compiled is {check_compiled!r}", "'error', 'warn' or 'ignore'")
    if _is_compiled(model):
        message = "prepare_model_for_compiled_hotswap was called with a model that is already compiled"
        if check_compiled == "error":
            raise UsageError(message, hint="call it before torch.compile")
        if check_compiled == "warn":
            warnings.warn(f"{message} and will be compiled again", stacklevel=2)
    model = _unwrap(model)
    model.require_unmerged()
    lora_adapters: dict[str, dict[str, Any]] = {
        a: model.adapter_modules(a) for a, c in model.peft_config.items() if c.uses_lora_file_format
    }
    if not lora_adapters:
        raise UsageError("the model has no LoRA adapter", "a LoRA adapter that others can replace")
    for adapter, modules in lora_adapters.items():  # check all before changing any
        for name, module in modules.items():
            if not _is_plain_lora(module):
                message = f"adapter {adapter!r} is not a plain LoRA at {name}: {type(module).__name__}"
                raise UsageError(message, hint=f"model.to_lora({adapter!r}, rank) makes one")
            rank = target_rank or module.r
            if module.r > rank:
                message = f"target_rank is {rank}, and adapter {adapter!r} has rank {module.r} at {name}"
                raise UsageError(message, "the largest rank of all adapters")
            if rank % module.groups:
                message = f"target_rank is {rank}, and {name} is a convolution with groups={module.groups}"
                raise UsageError(message, f"a target_rank that {module.groups} divides")
    for adapter, modules in lora_adapters.items():
        _pad_adapter(model, adapter, {n: target_rank or m.r for n, m in modules.items()})


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike, adapter_name: str, torch_device: Any = None, **hub: Any
) -> None:
    """Copy an adapter from a folder or the Hub into the parameters of an existing one, all or nothing.

    The existing adapter keeps its name, its parameter objects and its config, which still describes them; ranks that
    are too small grow, unless the model is compiled. Layers that the new adapter does not change are zeroed. Methods
    other than plain LoRA (DoRA, LoHa …) swap only with adapters of the same settings. `hub` says where in a Hub
    repository: subfolder, revision, token.

    Raises:
        UsageError: the adapter or folder does not exist, or the adapter is merged.
        AdapterError: the file has another base, other layers, a larger rank or (without factors) other settings.
    """
    compiled, model = _is_compiled(model), _unwrap(model)
    live_modules = model.adapter_modules(adapter_name)
    if adapter_name in model.merged_adapters:
        raise UsageError(
            f"{adapter_name!r} is merged into the base", hint="unmerge_adapter() first", code="merge-differs"
        )
    tensors, config, metadata = read_tensors_config_metadata_for_model(model, model_name_or_path, None, False, hub)
    types = [str(c.peft_type) for c in (model.peft_config[adapter_name], config)]
    if types[0] != types[1]:
        raise AdapterError(f"{model_name_or_path} is an adapter of {types[1]}, and {adapter_name!r} of {types[0]}")
    temporary = next(n for n in map("hotswap{}".format, itertools.count()) if n not in model.peft_config)
    model.add_adapter(temporary, config, strict=False)
    try:
        load_adapter_tensors(model, temporary, tensors, source=str(model_name_or_path))
        unknown = [n for n in model.adapter_modules(temporary) if n not in live_modules]
        if unknown:
            names = f"{len(unknown)} modules that {adapter_name!r} does not, such as {format_names(unknown, 2)}"
            raise AdapterError(f"{model_name_or_path} changes {names}", hint="load_adapter(path, name)")
        with torch.no_grad():
            for live, new in _match_tensors(model, adapter_name, temporary, model_name_or_path, compiled):
                live.copy_(new)
    finally:
        model.detach_adapter(temporary)
    model.note_loaded_adapter(adapter_name, str(model_name_or_path), metadata)


def _match_tensors(model: PeftModel, live: str, new: str, where: Any, compiled: bool) -> list[tuple[Tensor, Tensor]]:
    """Return each live tensor with the value to copy into it; raise if something does not fit."""
    live_modules: dict[str, Any] = dict(model.adapter_modules(live))
    new_modules: dict[str, Any] = dict(model.adapter_modules(new))
    if not all(map(_is_plain_lora, live_modules.values())) or not all(map(_is_resizable, new_modules.values())):
        require_compatible_config(model.peft_config[live], model.peft_config[new], where)
        old_tensors, new_tensors = get_adapter_tensors(model, live), get_adapter_tensors(model, new)
        if {k: t.shape for k, t in old_tensors.items()} != {k: t.shape for k, t in new_tensors.items()}:
            raise AdapterError(f"{where} has other tensors than {live!r}", "an adapter of the same modules and sizes")
        return [(old_tensors[k], new_tensors[k]) for k in old_tensors]
    ranks = {n: m.low_rank()[0].shape[0] for n, m in new_modules.items()}
    small = [n for n, rank in ranks.items() if rank > live_modules[n].r]
    if small and not compiled:
        _pad_adapter(model, live, {n: max(m.r, ranks.get(n, 0)) for n, m in live_modules.items()})
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, module in live_modules.items():
        tensors = module.tensors()
        if name not in new_modules:
            pairs += [(t, torch.zeros_like(t)) for n, t in tensors.items() if "_B" in n]
            continue
        if ranks[name] > module.r or not module.scale:
            theirs = f"rank {ranks[name]} and scale {new_modules[name].scale:g} at {name}"
            ours = f"space for rank {module.r} and scale {module.scale:g}"
            raise AdapterError(f"{where} has {theirs}, {live!r} has {ours}", hint=_PREPARE)
        values = new_modules[name].tensors_of_rank(module.r, module.scale)
        if set(values) != set(tensors):
            theirs, ours = format_names(values), format_names(tensors)
            raise AdapterError(f"{where} has other tensors at {name}: {theirs}", f"{ours}, as {live!r}")
        pairs += [(tensors[n], values[n]) for n in tensors]
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


def _pad_adapter(model: PeftModel, adapter: str, ranks: dict[str, int]) -> None:
    """Change the ranks of a plain LoRA by module and its scales to 1; the outputs do not change."""
    modules: dict[str, Any] = dict(model.adapter_modules(adapter))
    for name, module in modules.items():
        values = module.tensors_of_rank(ranks[name], 1.0)
        for n, parameter in module.tensors().items():
            parameter.data, parameter.grad = values[n].detach().clone(), None
            owner = module.get_submodule(n.rpartition(".")[0])
            if n.endswith(".weight"):
                inputs, outputs = ("in_features", "out_features") if isinstance(owner, nn.Linear) else _CHANNELS
                vars(owner).update({outputs: len(parameter), inputs: parameter.shape[1] * getattr(owner, "groups", 1)})
        module.scale = module.initial_scale = 1.0
        module.lora_alpha = ranks[name]
    for field, value in make_lora_config_rank_fields(ranks).items():
        setattr(model.peft_config[adapter], field, value)
    model.reset_layer_selections()


def _is_resizable(module: Any) -> bool:
    """Return whether a module computes what a plain LoRA of some rank does, also at a convolution and with a bias."""
    if module.takes_tokens or module.adapted_parameters or not hasattr(module, "tensors_of_rank"):
        return False
    scale = (module.low_rank_factors() or (None, None, module.scale))[2]
    return module.scale == scale and {n for n in module.tensors() if not n.startswith("start_")} <= _LORA_TENSORS


def _is_plain_lora(module: Any) -> bool:
    """Return whether a module is a LoRA whose own parameters are all its tensors, so that they can be replaced."""
    own = {id(p) for p in module.parameters()}
    return _is_resizable(module) and all(id(t) in own for t in module.tensors().values())


def _is_compiled(model: Any) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _unwrap(model: Any) -> PeftModel:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise UsageError(f"a {type(model).__name__} has no adapters", "an adapted model")
    return model
