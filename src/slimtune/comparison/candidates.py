"""What can be compared, by the names people give: methods, variants of them, and full fine-tuning.

lora  ia3  bottleneck …     the registry's methods
prefix  prompt              short for prefix_tuning, prompt_tuning
dora  rslora  pissa         a method with a setting
full                        every weight of the base trains
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config.loading import SHORT
from ..errors import ConfigError, UsageError, format_names, nearest
from ..methods import config_class, method_names

FULL = "full"
FULL_RATE = 5e-5
"""The learning rate full fine-tuning starts from: transformers' own default."""
ALIASES = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}
SECTIONS = ("model", "data", "method", "train", "output_dir")


@dataclass(frozen=True)
class Candidate:
    """One line of the comparison.

    Args:
        label: the name it was asked for by.
        method: the registry's name, or "full".
        settings: the method's own, as a recipe has them.
        rate: the learning rate.
        rate_from: where the rate comes from.
        by_all: it was not named but came by "all": where it does not go with the base it is left out, not an error.
    """

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    rate_from: Literal["default", "given", "tuned"] = "default"
    by_all: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what decides its cells, as plain values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "by_all"}

    @property
    def is_full(self) -> bool:
        """Whether every weight of the base trains."""
        return self.method == FULL


def known() -> list[str]:
    """Return every name that can be compared, sorted."""
    return sorted({*method_names(), *ALIASES, *VARIANTS, FULL})


def build_candidates(wanted: Iterable[str], tree: Mapping[str, Any], given: Mapping[str, Any]) -> list[Candidate]:
    """Return the entries that names stand for, each once.

    Args:
        expected: names; "all": every method of the registry, and full.
        tree: the recipe's; its method's settings are taken for that method and its variants.
        given: `{"lora.r": 8, "full.learning_rate": 1e-4}`: settings of single entries.

    Raises:
        UsageError: names that are not known, all at once, each with the nearest; or settings of what is not compared.
    """
    asked = list(wanted)
    labels = [n for name in asked for n in ((*method_names(), FULL) if name == "all" else (name,))]
    unknown = [n for n in labels if n not in known()]
    if unknown:
        said = "; ".join(f"{n!r}{nearest(n, known()).replace('; ', ', ')}" for n in unknown)
        raise UsageError(
            f"no method is called {said}", f"some of {format_names(known(), 40)}", "slimtune methods lists them"
        )
    if not labels:
        raise UsageError("--methods names none", "methods as lora,ia3,full, or all")
    strays = [path for path in given if path.partition(".")[0] not in labels]
    if strays:
        first = strays[0].partition(".")[0]
        raise UsageError(
            f"--set {strays[0]}: {first!r} is neither compared nor a section{nearest(first, [*labels, *SECTIONS])}",
            f"one of {format_names([*dict.fromkeys(labels), *SECTIONS])}",
        )
    found = [_entry(label, tree, given) for label in dict.fromkeys(labels)]
    return [dataclasses.replace(entry, by_all=entry.label not in asked) for entry in found]


def _entry(label: str, tree: Mapping[str, Any], given: Mapping[str, Any]) -> Candidate:
    method, fixed = VARIANTS.get(label, (ALIASES.get(label, label), {}))
    own = {p.partition(".")[2]: v for p, v in given.items() if p.partition(".")[0] == label}
    rate = own.pop("learning_rate", None)
    if method == FULL:
        if own:
            raise UsageError(f"full fine-tuning has no setting {next(iter(own))!r}", "full.learning_rate")
        return Candidate(label, FULL, {}, _rate(label, rate, FULL_RATE), "default" if rate is None else "given")
    cls = config_class(method)
    section = tree.get("method", {})
    recipes = dict(section) if section.get("name", "lora") == method else {}
    recipes.pop("name", None)
    settings: dict[str, Any] = {cls.short_names.get(k, k): v for part in (recipes, fixed, own) for k, v in part.items()}
    return Candidate(
        label, method, settings, _rate(label, rate, cls.learning_rate), "default" if rate is None else "given"
    )


def _rate(label: str, given: Any, default: float) -> float:
    if given is None:
        return default
    try:
        rate = float(given)
    except (TypeError, ValueError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{label}.learning_rate is {given!r}", "a number above 0")
    return rate


def split_settings(pairs: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `--set` pairs as those of the recipe and those of single entries."""
    recipe: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for path, value in pairs:
        section, dot, _ = path.partition(".")
        (recipe if section in SECTIONS or (not dot and path in SHORT) else single)[path] = value
    return recipe, single
