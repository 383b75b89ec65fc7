"""Which modules an adapter changes: matching names, and a report of the result.

Names follow PEFT's rules: a list contains names or dotted suffixes, a string is a regular expression for the full name,
"all-linear" is every linear layer except the output head. In addition every name, layer index and pattern in a config
must match something: what matches nothing is an error that gives the nearest name.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...errors import TargetError, format_names, suggest
from ..kernels.linear_layers import get_base_layer_type, list_persistent_buffer_names
from .adapted_layer import ADDED_CHILDREN, AdaptedLayerMixin, can_hold_adapter_children
from .adapter_module import WEIGHT_KINDS, SiteKind
from .architectures import HEADS, get_model_type, get_text_config, is_weight_read_without_call
from .name_patterns import find_matching_pattern, make_module_name_regex
from .peft_config import PeftConfig

Modules = dict[str, nn.Module]
ALL_LINEAR = "all-linear"
_KIND_NAMES = {
    "linear": "linear layers (Linear, Conv1D)",
    "embedding": "embeddings",
    "conv": "convolutions",
    "weight": "nn.MultiheadAttention",
    "norm": "normalisation layers",
}


@dataclass(frozen=True)
class TargetMatches:
    """Which modules of a base an adapter changes.

    Args:
        adapted: names of the modules with an adapter module; "" is the model itself.
        trained_whole: names of the modules trained in full (`modules_to_save`).
        biases: names of the trained biases.
        unadapted: names of the linear layers, convolutions and embeddings that are not adapted.
        kinds: site kind of each adapted module.
        copied: names of the parameters that the adapter trains a copy of, by module.
    """

    adapted: tuple[str, ...]
    trained_whole: tuple[str, ...]
    biases: tuple[str, ...]
    untargeted_layers: tuple[str, ...]
    kinds: dict[str, SiteKind] = field(default_factory=dict)
    trained_parameter_copies: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        # `model.layers.7` counts as `layers`.
        types = [next((p for p in reversed(n.split(".")) if not p.isdigit()), "") or "model" for n in self.adapted]
        counts = ", ".join(f"{t} × {types.count(t)}" for t in dict.fromkeys(types))
        parts = [f"adapted {len(types)} {'module' if len(types) == 1 else 'modules'} ({counts})"] if types else []
        if self.trained_whole:
            parts.append(f"trained in full: {format_names(self.trained_whole, 4)}")
        if self.biases:
            parts.append(f"{len(self.biases)} biases train")
        if not self.kinds or WEIGHT_KINDS & set(self.kinds.values()):
            rest = self.untargeted_layers
            parts.append(f"not adapted: {f'{len(rest)} ({format_names(rest, 4)})' if rest else 'none'}")
        return "; ".join(parts)


def match_targets(model: nn.Module, config: PeftConfig, *, require_every_match: bool = True) -> TargetMatches:
    """Return the modules that `config` selects in `model`, a base with or without adapters.

    `require_every_match=False` accepts names that match nothing as long as one matches: for adapters loaded from
    files, whose tensors determine what belongs to them.

    Raises:
        TargetError: nothing matches, with `require_every_match` a part does not, or a match cannot be adapted.
    """
    modules = get_base_modules(model)
    tied = find_tied_embedding_names(model)
    whole = _add_tied_modules(modules, config, _select_modules_to_save(modules, config, require_every_match), tied)
    inside_whole = dict.fromkeys(n for n in modules if any(n == w or n.startswith(f"{w}.") for w in whole))
    further = config.extra_targets(model)
    kinds: dict[str, SiteKind] = {}
    if {*WEIGHT_KINDS, "norm", "block"} & set(config.kinds):
        matched = _match_targets(model, modules, config, inside_whole, further, require_every_match)
        matched = _add_tied_modules(modules, config, matched, tied)
        kinds = _get_kinds(matched, model, modules, config)
        if require_every_match:
            parameters = [
                f"{n}.{p}" for n, names in map_modules_to_target_parameters(model, config).items() for p in names
            ]
            _check_every_pattern_matches(config, [*matched, *parameters])
    if require_every_match and not config.trains_every_weight:
        _warn_about_tying(config, tied, [*whole, *kinds])
    _check_no_target_twice(modules, kinds, further)
    with_bias = {"none": set(), "all": set(modules)}.get(getattr(config, "bias", "none"), set(kinds))
    biases = [n for n in modules if n in with_bias and isinstance(modules[n]._parameters.get("bias"), Tensor)]
    copied = {n: ["bias"] for n in biases}
    if getattr(config, "bias", "none") == "all":
        attentions = [n for n, m in modules.items() if isinstance(m._parameters.get("in_proj_bias"), Tensor)]
        copied |= {n: ["in_proj_bias"] for n in attentions}
    copied |= _list_whole_parameters(modules, whole, inside_whole)
    kinds |= further
    rest = [n for n, m in modules.items() if _has_weight_matrix(m) and n not in kinds and n not in inside_whole]
    return TargetMatches(tuple(kinds), tuple(whole), tuple(f"{n}.bias" for n in biases), tuple(rest), kinds, copied)


def _match_targets(
    model: nn.Module,
    modules: Modules,
    config: PeftConfig,
    whole: dict[str, None],
    further: dict[str, SiteKind],
    strict: bool,
) -> list[str]:
    """Return the modules that `target_modules` match outside of those trained `whole`.

    Raises:
        TargetError: nothing matches though nothing is trained whole or changed `further`, or (strict) a part of the
            config matches nothing.
    """
    targets = _resolve_targets(model, modules, config)
    found = [n for n in modules if is_target_module(n, config, targets)]
    matched = [n for n in found if n not in whole]
    if strict:
        _check_every_name_matches(model, modules, config, targets)
    if matched or further:
        return matched
    if found:
        message = f"target_modules only matches {format_names(found)}, which is trained in full"
        raise TargetError(message, "a target outside modules_to_save and the head of the task")
    if not whole:
        fields = ("exclude_modules", "layers_to_transform", "layers_pattern")
        left = ", ".join(f"{name}={value!r}" for name in fields if (value := getattr(config, name, None)))
        if left and any(matches_regex_or_names(targets, n) for n in modules):
            raise TargetError(f"target_modules={targets!r} matches no module that these settings leave: {left}")
        raise _nothing_matches(f"target_modules={targets!r}", targets, modules)
    return []


def _get_kinds(matched: list[str], model: nn.Module, modules: Modules, config: PeftConfig) -> dict[str, SiteKind]:
    """Return the site kinds of the matched modules, and of the output projection of each attention among them."""
    kinds = {n: _get_kind(n, model, modules, config) for n in matched}
    excluded = getattr(config, "exclude_modules", None)
    for attention in [n for n in matched if isinstance(modules[n], nn.MultiheadAttention)]:
        # As in PEFT, an adapter of the module is one of both its weights.
        out_proj = f"{attention}.out_proj"
        if not excluded or not matches_regex_or_names(excluded, out_proj):
            kinds[out_proj] = _get_kind(out_proj, model, modules, config)
    return kinds


def _check_no_target_twice(modules: Modules, kinds: dict[str, SiteKind], further: dict[str, SiteKind]) -> None:
    if twice := [n for n in further if n in kinds]:
        message = f"{format_names(twice)} is a target and also changed by another field of the config"
        if further[twice[0]] == "parameters":
            message += f": a parameter of {twice[0]!r}, a {type(modules[twice[0]]).__name__}"
        raise TargetError(message, hint="take it out of target_modules, or use two adapters")


def _list_whole_parameters(modules: Modules, whole: list[str], inside_whole: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the parameters and stored buffers of the modules trained in full, by module."""
    copied: dict[str, list[str]] = {}
    for name in inside_whole:
        own = [p for p, tensor in modules[name]._parameters.items() if tensor is not None]
        own += list_persistent_buffer_names(modules[name])
        # A module with nothing but children is adapted, too, so that it has PEFT's names: its copy is that of theirs.
        if own or (name in whole and can_hold_adapter_children(modules[name]) and "forward" not in vars(modules[name])):
            copied[name] = own
    return copied


def map_modules_to_target_parameters(model: nn.Module, config: Any) -> dict[str, list[str]]:
    """Return the parameters that `target_parameters` selects by their full name or its end, by module."""
    wanted = getattr(config, "target_parameters", None) or []
    modules = get_base_modules(model) if wanted else {}
    found = {n: [p for p in m._parameters if matches_regex_or_names(wanted, f"{n}.{p}")] for n, m in modules.items()}
    return {n: names for n, names in found.items() if names}


def map_target_modules_by_name(model: nn.Module, config: PeftConfig) -> Modules:
    """Return the modules that a config's target_modules match, by name."""
    modules = get_base_modules(model)
    targets = _resolve_targets(model, modules, config)
    return {n: m for n, m in modules.items() if is_target_module(n, config, targets)}


def find_expert_parameters(model: nn.Module, excluded: list[str] | str | None = None) -> list[str]:
    """Return the names of the experts' stacked weights `(experts, ..., ...)`, without those of `excluded` modules."""
    return [
        f"{name}.{parameter}"
        for name, module in get_base_modules(model).items()
        if _is_experts(name, module) and not (excluded and matches_regex_or_names(excluded, name))
        for parameter, tensor in module._parameters.items()
        if tensor is not None and tensor.dim() == 3
    ]


def list_all_linear_targets(model: Any, config: PeftConfig) -> list[str]:
    """Return the names of the modules that "all-linear" stands for.

    These are the linear layers without the output head, routers, and what `UNCALLED_LAYERS` lists.
    """
    modules = get_base_modules(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        task_heads = (getattr(model, n, None) for n in HEADS.get(str(config.task_type), ()))
        head = next((m for m in task_heads if isinstance(m, nn.Module)), None)
    uncalled = set(find_layers_read_without_call(model))
    linear = (n for n, m in modules.items() if get_base_layer_type(m) == "linear" and m is not head)
    return [n for n in linear if n not in uncalled and not _is_router(n, modules)]


def find_layers_read_without_call(model: nn.Module) -> list[str]:
    """Return the names of the layers whose weights are read without calling them (`UNCALLED_LAYERS`)."""
    modules = get_base_modules(model)
    return [n for n in modules if is_weight_read_without_call(modules.get(n.rpartition(".")[0], model), n)]


def strip_layer_prefixes_if_unambiguous(names: list[str], model: nn.Module) -> list[str]:
    """Return the ends of these names of modules or parameters, without the layer's number, if nothing else has them."""
    ends = list(dict.fromkeys(re.sub(r".*\.[0-9]+\.", "", name) for name in names))
    modules = get_base_modules(model)
    every = [*modules, *(f"{n}.{p}" for n, m in modules.items() for p in m._parameters)]
    return ends if {name for name in every if matches_regex_or_names(ends, name)} == set(names) else names


def _is_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module has the weights of several experts, stacked in parameters of 3 dimensions."""
    stacked = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    return stacked and "expert" in f"{name} {type(module).__name__}".lower()


def find_tied_embedding_names(model: Any) -> list[str]:
    """Return the input embedding's name and those of the modules tied to it; empty if none is, or by the config."""
    embedding: Any = None
    with suppress(AttributeError, NotImplementedError):  # a model of images has none
        embedding = model.get_input_embeddings()
    weight = None if embedding is None else embedding._parameters.get("weight")
    if weight is None or not getattr(get_text_config(model), "tie_word_embeddings", True):
        return []
    modules = get_base_modules(model)
    tied = [n for n, m in modules.items() if m is not embedding and m._parameters.get("weight") is weight]
    return [next(n for n, m in modules.items() if m is embedding), *tied] if tied else []


def _add_tied_modules(modules: Modules, config: Any, names: list[str], tied: list[str]) -> list[str]:
    """Return `names`, and with `ensure_weight_tying` all tied modules if one of them is among the names."""
    chosen = set(tied) & set(names)
    if not chosen or not getattr(config, "ensure_weight_tying", False):
        return names
    order = list(modules)
    return sorted({*names, *tied}, key=order.index)


def _warn_about_tying(config: Any, tied: list[str], chosen: Iterable[str]) -> None:
    """Warn where the modules tied to the embedding and `ensure_weight_tying` do not fit."""
    asked, own = getattr(config, "ensure_weight_tying", None), set(tied) & set(chosen)
    message = ""
    if asked:
        where = "is in modules_to_save or target_modules" if tied else "exists in the model"
        if not own and not getattr(config, "trainable_token_indices", None):
            message = f"ensure_weight_tying is True, but no module that is tied to the embedding {where}"
    elif own:
        why = "the method cannot tie its adapters" if asked is None else "ensure_weight_tying is not True"
        rest = format_names([n for n in tied if n not in own])
        apart = f"is tied to {rest}, which does not change with it" if rest else "are tied, but change separately"
        message = f"{format_names(sorted(own))} {apart}: {why}"
    if message:
        warnings.warn(message, stacklevel=6)


def matches_regex_or_names(regex_or_names: Iterable[str] | str, name: str) -> bool:
    """Return whether `name` matches: a string is a regular expression for all of it, a list has names or suffixes."""
    if isinstance(regex_or_names, str):
        return make_module_name_regex(regex_or_names).matches(name)
    return any(name == w or name.endswith(f".{w}") for w in regex_or_names)


def get_layer_index(name: str, patterns: list[str] | str | None) -> int | None:
    """Return the index of a module's layer: the first number in its name, or the one after a pattern."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if i and part.isdecimal()]
    if not patterns:  # like PEFT, which reads a number in second place only where there is no other
        numbers = [i for i in numbers if i > 1] or numbers
        return int(parts[numbers[0]]) if numbers else None
    for pattern in _as_list(patterns):
        for i in numbers:
            if find_matching_pattern([pattern], ".".join(parts[:i])) is not None:
                return int(parts[i])
    return None


def get_base_modules(model: nn.Module) -> Modules:
    """Return the base's modules by name, without the model itself and what adapters added."""
    return {n: m for n, m in model.named_modules() if n and not {*ADDED_CHILDREN} & set(n.split("."))}


def _resolve_targets(model: Any, modules: Modules, config: PeftConfig) -> list[str] | str:
    """Return the config's targets, with defaults and "all-linear" replaced by names."""
    targets = getattr(config, "target_modules", None)
    if targets is None:
        default = config.default_targets(model)
        if default is None and getattr(config, "target_parameters", None):
            return []
        if default is None:
            kind = get_model_type(model) or type(model).__name__
            message = f"target_modules is not given, and there is no default for {kind!r}"
            hint = 'name the modules, or set target_modules="all-linear"'
            raise TargetError(message, _describe_targets(modules), hint)
        return default
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return targets if isinstance(targets, str) else sorted(targets)
    if experts := find_expert_parameters(model, getattr(config, "exclude_modules", None)):
        names = format_names(strip_layer_prefixes_if_unambiguous(experts, model))
        message = f'target_modules="all-linear" leaves out the experts ({names})'
        warnings.warn(f"{message}: {config.name} does not adapt them, LoRA does", stacklevel=2)
    return list_all_linear_targets(model, config)


def _is_router(name: str, modules: Modules) -> bool:
    """Return whether a module belongs to the router beside some experts, which stays frozen unless it is named."""
    parts = name.split(".")
    beside = (i for i, part in enumerate(parts) if part in ("gate", "router"))
    return any(".".join([*parts[:i], "experts"]) in modules for i in beside)


def is_target_module(name: str, config: Any, targets: list[str] | str) -> bool:
    """Return whether targets match a module's name, and the config neither excludes it nor leaves out its layer."""
    excluded, layers = getattr(config, "exclude_modules", None), getattr(config, "layers_to_transform", None)
    if (excluded and matches_regex_or_names(excluded, name)) or not matches_regex_or_names(targets, name):
        return False
    by_index = layers is not None and not isinstance(targets, str)
    return not by_index or get_layer_index(name, config.layers_pattern) in _as_list(layers)


def _get_kind(name: str, model: nn.Module, modules: Modules, config: PeftConfig) -> SiteKind:
    """Return the site kind of a target; raise if the method cannot adapt it."""
    if "block" in config.kinds:
        return "block"
    module, kind = modules[name], get_base_layer_type(modules[name])
    class_name = type(module).__name__
    if kind is None or kind not in config.kinds:
        raise TargetError(
            f"{name} is a {class_name}, which {config.name} cannot adapt",
            " and ".join(_KIND_NAMES[k] for k in config.kinds if k in _KIND_NAMES),
            f"name the {config.kinds[0]} modules inside it" if kind is None else "",
        )
    if getattr(module, "in_proj_weight", module) is None:
        message = f"{name} is an nn.MultiheadAttention with separate weights for query, key and value"
        raise TargetError(message, "one in_proj_weight for all three")
    mro = (c for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, AdaptedLayerMixin))
    forward = vars(next(mro))["forward"]
    if isinstance(module, nn.Embedding) and not hasattr(module, "embed_scale") and forward is not nn.Embedding.forward:
        raise TargetError(f"{name} is a {class_name}, whose input is not a row index", "a linear layer")
    if kind == "conv" and not forward.__module__.startswith("torch.nn."):
        raise TargetError(f"{name} is a {class_name}, which computes something else than a torch convolution")
    parent = modules.get(name.rpartition(".")[0], model)
    if is_weight_read_without_call(parent, name):
        what = f"a {type(parent).__name__} reads its weight without calling it, so an adapter would be skipped"
        hint = f'exclude_modules=["{name.rpartition(".")[2]}"]; "all-linear" leaves it out'
        raise TargetError(f"{name} cannot be adapted: {what}", "other modules", hint)
    if kind == "conv" and any("causal_conv1d" in n for n in vars(sys.modules[type(parent).__module__])):
        raise TargetError(
            f"{name} belongs to a {type(parent).__name__}, whose GPU kernels read its weight and skip an adapter"
        )
    if kind != "weight" and isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        what = f"a torch {type(parent).__name__}, which reads the weight without calling the module"
        raise TargetError(f"{name} is part of {what}, so an adapter would do nothing")
    return kind


def _check_every_name_matches(model: nn.Module, modules: Modules, config: Any, targets: list[str] | str) -> None:
    for field_name in ("target_modules", "exclude_modules"):
        wanted = getattr(config, field_name, None) or []
        if isinstance(wanted, str) and field_name == "target_modules":
            continue  # the caller sees when the regular expression matches nothing
        names: list[Any] = [wanted] if isinstance(wanted, str) else [[name] for name in sorted(wanted)]
        unmatched = [
            w if isinstance(w, str) else w[0] for w in names if not any(matches_regex_or_names(w, n) for n in modules)
        ]
        if unmatched:
            raise _nothing_matches(f"{field_name}: {format_names(unmatched)}", unmatched, modules)
    parameters = [f"{n}.{p}" for n, m in modules.items() for p in m._parameters]
    wanted = getattr(config, "target_parameters", None) or []
    if unmatched := [w for w in wanted if not any(matches_regex_or_names([w], p) for p in parameters)]:
        if top := [w for w in unmatched if w in model._parameters]:
            message = f"target_parameters: {top[0]!r} belongs to the model itself, not to a module in it"
            raise TargetError(message, "a parameter of a module inside the model")
        last_parts = dict.fromkeys(p.rsplit(".", 1)[-1] for p in parameters)
        message = f"target_parameters: {format_names(unmatched)} matches no parameter"
        raise TargetError(message + suggest(unmatched[0], [*last_parts, *parameters]), "such as mlp.experts.down_proj")
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None:
        found = {get_layer_index(n, config.layers_pattern) for n in modules if matches_regex_or_names(targets, n)}
        indexes = sorted(i for i in found if i is not None)
        if missing := [i for i in _as_list(layers) if i not in indexes]:
            none = f"no numbered layers (layers_pattern={config.layers_pattern!r})"
            have = f"layers {indexes[0]} to {indexes[-1]}" if indexes else none
            message = f"layers_to_transform: {format_names(missing)} matches no layer"
            raise TargetError(message, f"the targets are in {have}")


def _check_every_pattern_matches(config: Any, matched: list[str]) -> None:
    for name, patterns in getattr(config, "patterns", {}).items():
        for pattern in patterns:
            if not any(find_matching_pattern([pattern], n) for n in matched):
                last_parts = sorted({n.rsplit(".", 1)[-1] for n in matched})
                similar = suggest(pattern, [*last_parts, *matched])
                raise TargetError(
                    f"{name}: {pattern!r} matches no adapted module{similar}", f"adapted are {format_names(last_parts)}"
                )


def _select_modules_to_save(modules: Modules, config: PeftConfig, strict: bool) -> list[str]:
    if config.trains_every_weight:
        return [name for name, module in modules.items() if any(p is not None for p in module._parameters.values())]
    wanted = list(getattr(config, "modules_to_save", None) or [])
    unmatched = [w for w in wanted if not any(n.endswith(w) for n in modules)]
    if unmatched and strict:
        raise _nothing_matches(f"modules_to_save: {format_names(unmatched)}", unmatched, modules)
    # Endings without a dot, like PEFT: "classifier" includes DistilBERT's pre_classifier, which is also new.
    found = [n for n in modules if n.endswith((*wanted, *HEADS.get(str(config.task_type), ())))]
    found = [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]
    return found


def _nothing_matches(what: str, wanted: list[str] | str, modules: Modules) -> TargetError:
    first = wanted if isinstance(wanted, str) else (wanted[0] if wanted else "")
    last_parts = dict.fromkeys(n.rsplit(".", 1)[-1] for n in modules)
    return TargetError(f"{what} matches no module{suggest(first, [*last_parts, *modules])}", _describe_targets(modules))


def _describe_targets(modules: Modules) -> str:
    names = dict.fromkeys(n.rsplit(".", 1)[-1] for n, m in modules.items() if _has_weight_matrix(m))
    return f"one of {format_names(names, 16)}" if names else "a model with linear layers, convolutions or embeddings"


def _has_weight_matrix(module: nn.Module) -> bool:
    return get_base_layer_type(module) in WEIGHT_KINDS


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple | set) else [value]
