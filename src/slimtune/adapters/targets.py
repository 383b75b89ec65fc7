"""Which modules an adapter changes, and a report of it. Nothing is silent: what matches nothing is an error.

PEFT's rules for names (a list holds names or dotted suffixes, a string is a pattern for the whole name, "all-linear" is
every linear map but the output head), and one rule of ours: each name, layer index and pattern asked for must match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import TargetError, format_names, nearest
from ..utils.linear_layers import layer_kind
from .architectures import HEADS, model_type
from .base import SiteKind

if TYPE_CHECKING:
    from .config import PeftConfig
from .layer import AdaptedLayer

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class MatchReport:
    """What was adapted and what was left.

    Args:
        adapted: names of the modules with a delta; "" is the model itself.
        trained_whole: names of the modules trained whole beside it (`modules_to_save`).
        biases: names of the bias parameters that train.
        left: names of linear maps and embeddings that stay as they are.
    """

    adapted: tuple[str, ...]
    trained_whole: tuple[str, ...]
    biases: tuple[str, ...]
    left: tuple[str, ...]
    kinds: dict[str, SiteKind] = field(default_factory=dict)
    """The kind of site each adapted module is."""

    def __str__(self) -> str:
        # `model.layers.7` is one of the `layers`; the model itself has no name.
        tails = [next((p for p in reversed(n.split(".")) if not p.isdigit()), "") or "model" for n in self.adapted]
        kinds = {t: tails.count(t) for t in dict.fromkeys(tails)}
        words = "module" if len(tails) == 1 else "modules"
        parts = [f"adapted {len(tails)} {words} ({', '.join(f'{k} × {n}' for k, n in kinds.items())})"] if tails else []
        if self.trained_whole:
            parts.append(f"trained whole: {format_names(self.trained_whole, 4)}")
        if self.biases:
            parts.append(f"{len(self.biases)} biases train")
        if not self.kinds or set(self.kinds.values()) & {"linear", "embedding"}:  # for others it says nothing
            parts.append(f"left {len(self.left)}: {format_names(self.left, 4)}" if self.left else "left none")
        return "; ".join(parts)


def select_targets(model: nn.Module, config: PeftConfig, *, strict: bool = True) -> MatchReport:
    """Return what `config` selects in `model`.

    Args:
        model: the base, adapted already or not.
        config: the method's config; `target_modules=None` takes the architecture's default.
        strict: raise where one of several names matches nothing. Off for adapters read from files, whose tensors say
            better than their config what belongs to them.

    Raises:
        TargetError: nothing matches, or (strict) a part of what was asked matches nothing, or a match cannot be
            adapted. What exists and the nearest name are given.
    """
    modules = _own_modules(model)
    whole = _trained_whole(modules, config, strict)
    inside = {n for n in modules if any(n == w or n.startswith(f"{w}.") for w in whole)}
    further = config.further_targets(model)
    if {"linear", "embedding", "norm", "block"} & set(config.kinds):
        targets = _wanted(model, modules, config)
        found = [n for n in modules if n not in inside and _is_target(n, config, targets)]
        if strict:
            _no_name_in_vain(modules, config, targets, found)
        if not found and not whole and not further:
            raise TargetError(
                f"target_modules={targets!r} matches no module{_near(targets, modules)}", _exists(modules)
            )
        _all_adaptable(model, modules, config, found)
        if strict:
            _no_pattern_in_vain(config, found)
        kinds = {n: _kind(modules[n], config) for n in found}
    else:
        found, kinds = [], {}
    _not_twice(kinds, further)
    kinds = {**kinds, **further}
    biases = _biases(model, config, found)
    left = tuple(n for n, m in modules.items() if _changeable(m) and n not in kinds and n not in inside)
    return MatchReport(tuple(kinds), tuple(whole), biases, left, kinds)


def _changeable(module: nn.Module) -> bool:
    return layer_kind(module) in ("linear", "embedding")


def _kind(module: nn.Module, config: PeftConfig) -> SiteKind:
    if "block" in config.kinds:
        return "block"
    kind = layer_kind(module)
    assert kind is not None
    return kind


def _not_twice(kinds: dict[str, Any], further: dict[str, Any]) -> None:
    twice = [n for n in further if n in kinds]
    if twice:
        raise TargetError(
            f"{format_names(twice)} is a target and is changed by another field of the config, too",
            "one change to a module by one adapter",
            "take it out of target_modules, or use two adapters",
        )


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by name, without what adapters brought."""
    return {n: m for n, m in model.named_modules() if n and not {"adapters", "trained_copies"} & set(n.split("."))}


def _wanted(model: nn.Module, modules: dict[str, nn.Module], config: PeftConfig) -> list[str] | str:
    targets = getattr(config, "target_modules", None)
    if targets is None:
        kind = model_type(model)
        default = config.default_targets(model)
        if default is None:
            raise TargetError(
                f"target_modules is None, and there is no default for {kind or type(model).__name__!r}",
                _exists(modules),
                'name the modules, or give target_modules="all-linear"',
            )
        return default
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _all_linear(model, modules, config)
    return targets


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], config: PeftConfig) -> list[str]:
    experts = [
        n
        for n, m in modules.items()
        if any(p is not None and p.dim() == 3 for p in m._parameters.values())
        and "expert" in f"{n} {type(m).__name__}".lower()
    ]
    if experts:
        raise TargetError(
            f'target_modules="all-linear" would leave out {len(experts)} expert modules ({format_names(experts, 3)}), whose '
            "weights are 3-dimensional parameters, not linear layers",
            "modules that can be adapted",
            'name the modules instead, such as target_modules=["q_proj", "v_proj"]',
        )
    heads = _heads(model, config)
    return [n for n, m in modules.items() if layer_kind(m) == "linear" and not any(m is h for h in heads)]


def _heads(model: Any, config: PeftConfig) -> list[nn.Module]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return [output]
    names = HEADS.get(str(config.task_type), ())
    return [m for m in (getattr(model, n, None) for n in names) if isinstance(m, nn.Module)][:1]


def _is_target(name: str, config: PeftConfig, targets: list[str] | str) -> bool:
    excluded, layers = getattr(config, "exclude_modules", None), getattr(config, "layers_to_transform", None)
    if excluded and matches_name(excluded, name):
        return False
    if not matches_name(targets, name):
        return False
    if layers is None or isinstance(targets, str):
        return True
    return layer_index(name, config.layers_pattern) in _as_list(layers)  # type: ignore[attr-defined]


def layer_index(name: str, patterns: list[str] | str | None) -> int | None:
    """Return the number of the layer a module is in: the first number in its name, or the one after a pattern."""
    name += "."  # a target may be the layer itself
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<at>\d+)\.", name) or re.match(r"[^.]*\.(?P<at>\d+)\.", name)
        return int(match["at"]) if match else None
    for pattern in _as_list(patterns):
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<at>\d+)\.", name)
        if match:
            return int(match["at"])
    return None


def _no_name_in_vain(
    modules: dict[str, nn.Module], config: PeftConfig, targets: list[str] | str, found: list[str]
) -> None:
    asked = [] if isinstance(targets, str) or getattr(config, "target_modules", None) is None else targets
    vain = [t for t in asked if not any(matches_name([t], n) for n in modules)]
    if vain:
        raise TargetError(
            f"target_modules: {format_names(vain)} matches no module{_near(vain, modules)}", _exists(modules)
        )
    excluded = getattr(config, "exclude_modules", None) or []
    vain = [
        e
        for e in _as_list(excluded)
        if not any(matches_name(e if isinstance(excluded, str) else [e], n) for n in modules)
    ]
    if vain:
        raise TargetError(
            f"exclude_modules: {format_names(vain)} matches no module{_near(vain, modules)}", _exists(modules)
        )
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None:
        pattern = config.layers_pattern  # type: ignore[attr-defined]
        there = {i for n in modules if matches_name(targets, n) for i in [layer_index(n, pattern)] if i is not None}
        vain_layers = [i for i in _as_list(layers) if i not in there]
        if vain_layers:
            have = f"layers {min(there)} to {max(there)}" if there else "no numbered layers"
            raise TargetError(
                f"layers_to_transform: {format_names(vain_layers)} matches no layer", f"the targets are in {have}"
            )


def _no_pattern_in_vain(config: PeftConfig, found: list[str]) -> None:
    for name, patterns in getattr(config, "patterns", {}).items():
        for pattern in patterns:
            if not any(find_pattern([pattern], n) for n in found):
                tails = sorted({n.rsplit(".", 1)[-1] for n in found})
                raise TargetError(
                    f"{name}: {pattern!r} matches no adapted module{nearest(pattern, [*tails, *found])}",
                    f"adapted are {format_names(tails)}",
                )


_WORDS = {"linear": "linear maps (Linear, Conv1D)", "embedding": "embeddings", "norm": "normalisations"}


def _all_adaptable(model: nn.Module, modules: dict[str, nn.Module], config: PeftConfig, found: Iterable[str]) -> None:
    if "block" in config.kinds:
        return
    for name in found:
        if layer_kind(modules[name]) not in config.kinds:
            raise TargetError(
                f"{name} is a {type(modules[name]).__name__}, which {config.name} cannot change",
                " and ".join(_WORDS[k] for k in config.kinds if k in _WORDS),
                f"name the {config.kinds[0]} modules inside it" if layer_kind(modules[name]) is None else "",
            )
        if isinstance(modules[name], nn.Embedding) and not _looks_rows_up(modules[name]):
            raise TargetError(f"{name} is a {type(modules[name]).__name__}, whose input is not the numbers of its rows",
                              "an embedding that looks rows up, or a linear map")  # fmt: skip
        parent = modules.get(name.rpartition(".")[0], model)
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise TargetError(
                f"{name} lies in a torch {type(parent).__name__}, which reads its weight past its forward, so "
                "that an adapter there would do nothing",
                "a module whose forward is called",
            )


def _looks_rows_up(module: nn.Module) -> bool:
    own = next(
        vars(c)["forward"] for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, AdaptedLayer)
    )
    return own is nn.Embedding.forward or hasattr(module, "embed_scale")


def _trained_whole(modules: dict[str, nn.Module], config: PeftConfig, strict: bool) -> list[str]:
    if config.trains_every_weight:
        return [name for name, module in modules.items() if any(p is not None for p in module._parameters.values())]
    asked = list(getattr(config, "modules_to_save", None) or [])
    vain = [a for a in asked if not any(n.endswith(a) for n in modules)]
    if vain and strict:
        raise TargetError(
            f"modules_to_save: {format_names(vain)} matches no module{_near(vain, modules)}", _exists(modules)
        )
    # Plain endings, as in PEFT: "classifier" also means DistilBERT's pre_classifier, which is as new.
    found = [n for n in modules if n.endswith((*asked, *HEADS.get(str(config.task_type), ())))]
    found = [n for n in found if not any(n.startswith(f"{o}.") for o in found)]
    for name in found:
        if any(True for _ in modules[name].buffers()):
            raise TargetError(
                f"modules_to_save: {name} has buffers, of which an adapter keeps no copy of its own",
                "modules with parameters alone",
            )
    return found


def _biases(model: nn.Module, config: Any, found: list[str]) -> tuple[str, ...]:
    kind = getattr(config, "bias", "none")
    if kind == "none":
        return ()
    modules = _own_modules(model)
    have = [n for n, m in modules.items() if isinstance(m._parameters.get("bias"), torch.Tensor)]
    return tuple(f"{n}.bias" for n in have if kind == "all" or n in found)


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _exists(modules: dict[str, nn.Module]) -> str:
    tails = dict.fromkeys(n.rsplit(".", 1)[-1] for n, m in modules.items() if _changeable(m))
    return f"one of {format_names(tails, 16)}" if tails else "a model with linear maps or embeddings"


def _near(wanted: list[str] | str, modules: dict[str, nn.Module]) -> str:
    first = wanted if isinstance(wanted, str) else (wanted[0] if wanted else "")
    tails = list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in modules))
    return nearest(first, [*tails, *modules])


Value = TypeVar("Value")


def matches_name(wanted: Iterable[str] | str, name: str) -> bool:
    """Return whether `name` is meant: a string is a pattern for the whole name, a list holds names or suffixes."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def find_pattern(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that matches the end of `name` from a dot on, or None."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


def get_pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """Return the value of the first pattern that matches `name` (see `pattern_key`), or the default."""
    key = find_pattern(patterns, name)
    return default if key is None else patterns[key]
