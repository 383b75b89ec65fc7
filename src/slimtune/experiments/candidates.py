"""The methods and the tasks that can be compared, by the names users type.

lora  ia3  bottleneck  full …     methods of the registry
prefix  prompt                    short for prefix_tuning, prompt_tuning
dora  rslora  pissa               a method with one setting
dpo  simpo  orpo  sft …           objectives that learn from preference pairs, with the recipe's method
ipo                               an objective with one setting
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..core.adapters.method_registry import ALIASES, VARIANTS, get_method_config_class, list_methods
from ..core.config.objective_registry import list_objectives, load_objective_class
from ..core.config.recipe_loading import SHORT_SECTIONS, replace_recipe_values
from ..errors import ConfigError, UsageError, format_names, suggest

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from ..core.training.objective import Objective

SECTIONS = ("model", "data", "task", "method", "train", "output_dir")
TASK_VARIANTS = {"ipo": ("dpo", {"loss_type": "ipo"})}
"""Names for an objective with one setting."""


@dataclass(frozen=True)
class ComparisonCandidate:
    """One line of the comparison."""

    label: str  # the name the user typed
    method: str  # its name in the registry
    settings: dict[str, Any] = field(default_factory=dict)  # as in a recipe
    learning_rate: float | Literal["auto"] = "auto"
    rate_source: Literal["default", "given", "tuned"] = "default"
    task: dict[str, Any] | None = None  # as in a recipe; None: the recipe's
    from_all: bool = False  # comes from "all" and was not named: left out, without an error, if it does not fit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that determine the candidate's runs, as plain values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "from_all"}


def build_candidates(
    names: Iterable[str], recipe_tree: Mapping[str, Any], overrides: Mapping[str, Any], *, names_are_tasks: bool = False
) -> list[ComparisonCandidate]:
    """Return the candidates that the names stand for, without repetition.

    Args:
        names: what the user typed; "all" means every method of the registry.
        recipe_tree: the recipe as a plain tree; its settings of a method or a task apply to it and its variants.
        overrides: settings of single candidates: `{"lora.r": 8, "full.learning_rate": 1e-4}`.
        names_are_tasks: the names are those of objectives, which learn preference pairs with the recipe's method.
    """
    names, candidates = list(names), []
    for label in expand_candidate_labels(names, overrides, names_are_tasks=names_are_tasks):
        own = {path.partition(".")[2]: value for path, value in overrides.items() if path.partition(".")[0] == label}
        rate = own.pop("learning_rate", None)
        candidate = (_build_task_candidate if names_are_tasks else _build_method_candidate)(label, recipe_tree, own)
        if rate is not None:
            candidate = _set_rate(candidate, rate)
        candidates.append(dataclasses.replace(candidate, from_all=label not in names))
    return candidates


def expand_candidate_labels(
    names: Iterable[str], overrides: Mapping[str, Any], *, names_are_tasks: bool = False
) -> list[str]:
    """Return the labels that the names stand for, "all" written out; arguments as for `build_candidates`.

    Raises:
        UsageError: a name, or the first part of an override, is unknown. No method is imported.
    """
    kind, example = ("task", "dpo,simpo,orpo") if names_are_tasks else ("method", "lora,ia3,full, or all")
    known = sorted({*list_objectives(), *TASK_VARIANTS} if names_are_tasks else {*list_methods(), *ALIASES, *VARIANTS})
    every = {} if names_are_tasks else {"all": list_methods()}
    labels = list(dict.fromkeys(n for name in names for n in every.get(name, (name,))))
    if not labels:
        raise UsageError(f"--{kind}s names no {kind}", f"{kind}s as {example}")
    if unknown := [n for n in labels if n not in known]:
        listing = "; ".join(f"{n!r}{suggest(n, known).replace('; ', ', ')}" for n in unknown)
        expected = f"some of {format_names(known, 40)}"
        raise UsageError(
            f"no {kind} is called {listing}", expected, "" if names_are_tasks else "slimtune methods lists them"
        )
    for path in overrides:
        label, choices = path.partition(".")[0], [*labels, *SECTIONS]
        if label not in labels:
            message = f"--set {path}: {label!r} is neither a compared {kind} nor a section of the recipe"
            raise UsageError(message + suggest(label, choices), f"one of {format_names(choices)}")
    return labels


def _build_method_candidate(label: str, recipe_tree: Mapping[str, Any], own: Mapping[str, Any]) -> ComparisonCandidate:
    method, variant_settings = VARIANTS.get(label, (ALIASES.get(label, label), {}))
    cls = get_method_config_class(method)
    settings = {
        cls.short_names.get(name, name): value
        for part in (_select_own_settings("method", method, recipe_tree), variant_settings, own)
        for name, value in part.items()
    }
    return ComparisonCandidate(label, method, settings)


def _select_own_settings(section: str, name: str, recipe_tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's settings of a method or task if it names that one; warn of the others."""
    own = replace_recipe_values({section: recipe_tree.get(section)}, {f"{section}.name": name})[section]
    return {k: v for k, v in own.items() if k != "name"}


def _learns_pairs(objective: "type[Objective]") -> bool:
    return objective.takes_format("preference") and objective.task_type == "CAUSAL_LM"


def _build_task_candidate(label: str, recipe_tree: Mapping[str, Any], own: Mapping[str, Any]) -> ComparisonCandidate:
    name, variant_settings = TASK_VARIANTS.get(label, (label, {}))
    objective = load_objective_class(name)
    if not _learns_pairs(objective):
        message = f"the task {label} does not teach a language model from preference pairs"
        known = [n for n in list_objectives() if _learns_pairs(load_objective_class(n))]
        raise UsageError(message, f"some of {format_names(sorted([*known, *TASK_VARIANTS]))}")
    task = {"name": name, **_select_own_settings("task", name, recipe_tree), **variant_settings, **own}
    method = (recipe_tree.get("method") or {}).get("name", "lora")
    candidate = _build_method_candidate(method, {**recipe_tree, "task": task}, {})
    return dataclasses.replace(candidate, label=label, task=task)


def _set_rate(candidate: ComparisonCandidate, given: Any) -> ComparisonCandidate:
    """Return a candidate with a learning rate that the user gave."""
    try:
        rate = float(given)
    except (TypeError, ValueError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{candidate.label}.learning_rate is {given!r}", "a number above 0")
    return dataclasses.replace(candidate, learning_rate=rate, rate_source="given")


def split_settings_by_recipe_section(
    set_pairs: Iterable[tuple[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `--set` pairs into those of the recipe and those of single candidates."""
    of_recipe: dict[str, Any] = {}
    of_candidates: dict[str, Any] = {}
    for path, value in set_pairs:
        section, dot, _ = path.partition(".")
        is_recipe = section in SECTIONS or (not dot and path in SHORT_SECTIONS)
        (of_recipe if is_recipe else of_candidates)[path] = value
    return of_recipe, of_candidates
