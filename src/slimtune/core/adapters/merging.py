"""Merging: adapters are added to a layer's parameters; `unmerge_adapters_from_layer` puts the original ones back."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.linear_layers import get_weight_and_bias_names, is_quantized, is_weight_transposed
from .adapted_layer import AdaptedLayerMixin
from .adapter_module import MergeUnsupported


def merge_adapters_into_layer(
    name: str, module: AdaptedLayerMixin, adapter_names: Iterable[str], *, require_finite: bool = False
) -> None:
    """Merge adapters into the parameters of a module, which keeps the replaced ones for `unmerge_adapters_from_layer`.

    If other adapters are merged already, all are merged into the original parameters.

    Raises:
        MergeUnsupported: a method cannot merge, the base is quantized or (`require_finite`) the result is not finite.
    """
    adapter_names = [*module.merged_names, *(a for a in adapter_names if a not in module.merged_names)]
    unmerge_adapters_from_layer(module)
    merged: dict[str, Tensor] = {}
    owner = next((a for a in adapter_names if a in module.trained_copies), None)
    if owner is not None:
        merged = {n: p.detach() for n, p in module.trained_copies[owner].state_dict(keep_vars=True).items()}
    modules: list[Any] = [module.adapters[a] for a in adapter_names if a in module.adapters]
    if modules and is_quantized(module):
        raise MergeUnsupported(f"{name} is quantized: load the base in 16 or 32 bits")
    with torch.no_grad():
        for adapter_module in modules:
            for n in adapter_module.adapted_parameters:
                parameter: Any = merged.get(n, module._parameters[n])
                parameter = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
                merged[n] = adapter_module.merge_into_parameter(n, parameter)
    modules = [m for m in modules if not m.adapted_parameters]
    weight_name, bias_name = get_weight_and_bias_names(module)
    weight, bias = (merged.get(n, module._parameters.get(n)) for n in (weight_name, bias_name))
    transposed = is_weight_transposed(module)
    if modules and weight is not None:
        # Compute in fp32 or wider, and round once below.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, bias = weight.detach().to(wide), None if bias is None else bias.detach().to(wide)
        weight = weight.t() if transposed else weight.flatten(1) if weight.dim() > 2 else weight
    start = weight, bias
    with torch.no_grad():
        for adapter_module in modules:
            weight, bias = adapter_module.merge_into(weight, bias)
    if weight is not start[0] and weight is not None:
        stored: Any = module._parameters[weight_name]
        merged[weight_name] = weight.t().contiguous() if transposed else weight.reshape(stored.shape)
    if bias is not start[1] and bias is not None:
        merged[bias_name] = bias
    replaced: dict[str, Any] = {n: {**module._parameters, **module._buffers}[n] for n in merged}
    for n, tensor in merged.items():
        base = replaced[n]
        if base is None:
            raise MergeUnsupported(f"{name} has no bias, into which the adapter's bias could be merged")
        if require_finite and not torch.isfinite(tensor).all():
            names = ", ".join(adapter_names)
            raise MergeUnsupported(
                f"{name}.{n} contains NaN or Inf after merging: the adapter {names} seems to be broken"
            )
    for n, tensor in merged.items():  # only now that nothing can fail any more
        if n in module._buffers:
            module._buffers[n] = tensor.clone()
            continue
        # A new parameter object: modules tied to this one keep the old one.
        module._parameters[n] = nn.Parameter(tensor.to(replaced[n].dtype, copy=True), requires_grad=False)
    module.__dict__.update(original_parameters=replaced, merged_names=tuple(adapter_names))


def retie_equal_merged_parameters(modules: Iterable[AdaptedLayerMixin]) -> None:
    """Let merged parameters share memory again that were one parameter before and are equal now."""
    first: dict[int, Any] = {}
    for module in modules:
        for name, original in (module.original_parameters or {}).items():
            merged: Any = module._parameters.get(name)
            is_parameter = original is not None and merged is not None  # not a buffer
            shared = first.setdefault(id(original), merged) if is_parameter else merged
            if shared is not merged and torch.equal(shared, merged):
                module._parameters[name] = shared


def unmerge_adapters_from_layer(module: AdaptedLayerMixin) -> None:
    """Put the original parameters back, bit for bit."""
    if module.original_parameters is not None:
        for n, tensor in module.original_parameters.items():
            (module._buffers if n in module._buffers else module._parameters)[n] = tensor
        module.__dict__.update(original_parameters=None, merged_names=())


def group_tied_parameter_names(model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters that are one tensor, in groups of two and more."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def untie_partly_tied_after_merge(model: Any, tied_before_merge: Iterable[list[str]]) -> None:
    """Give each of `tied_before_merge` parameters that are no longer one tensor its own, and say so in the config.

    Saving writes tensors that share memory once, and a config cannot say that only some are tied (T5, BART).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups = [[n for n in group if n in parameters] for group in tied_before_merge]  # the adapters' own are gone
    separated = [group for group in groups if len({id(parameters[name]) for name in group}) > 1]
    if separated:
        mark_embeddings_untied(model)
    for group in separated:
        seen = {id(parameters[group[0]])}
        for name in group[1:]:
            if id(parameters[name]) in seen:
                outer, _, last = name.rpartition(".")
                model.get_submodule(outer)._parameters[last] = copy.deepcopy(parameters[name])
            seen.add(id(parameters[name]))


def mark_embeddings_untied(model: Any) -> None:
    """Record in the config that input and output embeddings are two tensors, so that saving writes both."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
