"""The methods that can be compared, by the names users type.

lora  ia3  bottleneck  full …     methods of the registry
prefix  prompt                    short for prefix_tuning, prompt_tuning
dora  rslora  pissa               a method with one setting
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..adapters.registry import ALIASES, VARIANTS
from ..config.loading import SHORT_SECTIONS
from ..errors import ConfigError, UsageError, format_names, nearest
from ..methods import config_class, method_names

SECTIONS = ("model", "data", "method", "train", "output_dir")


@dataclass(frozen=True)
class Candidate:
    """One line of the comparison."""

    label: str  # the name the user typed
    method: str  # its name in the registry
    settings: dict[str, Any] = field(default_factory=dict)  # as in a recipe
    learning_rate: float = 0.0
    rate_source: Literal["default", "given", "tuned"] = "default"
    from_all: bool = False  # comes from "all" and was not named: left out, without an error, if it does not fit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that determine the candidate's runs, as plain values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "from_all"}


def build_candidates(
    names: Iterable[str], recipe_tree: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[Candidate]:
    """Return the candidates that the names stand for, without repetition.

    Args:
        names: what the user typed; "all" means every method of the registry.
        recipe_tree: the recipe as a plain tree; its method settings apply to that method and its variants.
        overrides: settings of single candidates: `{"lora.r": 8, "full.learning_rate": 1e-4}`.
    """
    labels = require_candidates(names := list(names), overrides)
    return [_build_candidate(label, recipe_tree, overrides, from_all=label not in names) for label in labels]


def require_candidates(names: Iterable[str], overrides: Mapping[str, Any]) -> list[str]:
    """Return the labels that the names stand for, "all" written out; arguments as for `build_candidates`.

    Raises:
        UsageError: a name, or the first part of an override, is unknown. No method is imported.
    """
    known = sorted({*method_names(), *ALIASES, *VARIANTS})
    labels = list(dict.fromkeys(n for name in names for n in (method_names() if name == "all" else (name,))))
    if not labels:
        raise UsageError("--methods names no method", "methods as lora,ia3,full, or all")
    if unknown := [n for n in labels if n not in known]:
        listing = "; ".join(f"{n!r}{nearest(n, known).replace('; ', ', ')}" for n in unknown)
        expected = f"some of {format_names(known, 40)}"
        raise UsageError(f"no method is called {listing}", expected, "slimtune methods lists them")
    for path in overrides:
        label, choices = path.partition(".")[0], [*labels, *SECTIONS]
        if label not in labels:
            message = f"--set {path}: {label!r} is neither a compared method nor a section of the recipe"
            raise UsageError(message + nearest(label, choices), f"one of {format_names(choices)}")
    return labels


def _build_candidate(
    label: str, recipe_tree: Mapping[str, Any], overrides: Mapping[str, Any], from_all: bool
) -> Candidate:
    method, variant_settings = VARIANTS.get(label, (ALIASES.get(label, label), {}))
    cls = config_class(method)
    own = {path.partition(".")[2]: value for path, value in overrides.items() if path.partition(".")[0] == label}
    given_rate = own.pop("learning_rate", None)
    section = dict(recipe_tree.get("method") or {})
    recipe_settings = section if section.pop("name", "lora") == method else {}
    settings = {
        cls.short_names.get(name, name): value
        for part in (recipe_settings, variant_settings, own)
        for name, value in part.items()
    }
    if given_rate is None:
        return Candidate(label, method, settings, cls.learning_rate, from_all=from_all)
    try:
        rate = float(given_rate)
    except (TypeError, ValueError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{label}.learning_rate is {given_rate!r}", "a number above 0")
    return Candidate(label, method, settings, rate, "given", from_all)


def split_settings(pairs: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `--set` pairs into those of the recipe and those of single candidates."""
    of_recipe: dict[str, Any] = {}
    of_candidates: dict[str, Any] = {}
    for path, value in pairs:
        section, dot, _ = path.partition(".")
        is_recipe = section in SECTIONS or (not dot and path in SHORT_SECTIONS)
        (of_recipe if is_recipe else of_candidates)[path] = value
    return of_recipe, of_candidates
