"""What becomes of a field of another trainer's config: a rule for each, and the three outcomes that a rule can have.

learning_rate: 1e-4     take("train.learning_rate")          taken as this setting of the recipe
max_samples: 1000       lack("give a file with fewer rows")   no equivalent, and why; not needed if it is off
overwrite_cache: true   skip("nothing is cached")             changes nothing here, and why
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.foundation.json_results import JsonObject
from ...errors import RecipeError

Outcome = Literal["taken", "no-equivalent", "not-needed", "unknown"]


@dataclass(frozen=True)
class FieldOutcome:
    """What became of one value."""

    outcome: Outcome
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, by dotted path
    reason: str = ""


Rule = Callable[[Any, JsonObject], FieldOutcome]
"""Of a value, and of all values of the config by field."""


def take(path: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """Return the rule of a field that is a setting of the recipe, converted."""
    return lambda value, _: FieldOutcome("taken", {path: convert(value)})


def choose(path: str, choices: Mapping[Any, Any]) -> Rule:
    """Return the rule of a field whose values have names of their own here; another value has no equivalent."""

    def apply(value: Any, _: JsonObject) -> FieldOutcome:
        if value in choices:
            return FieldOutcome("taken", {path: choices[value]})
        return FieldOutcome("no-equivalent", reason=f"{path} has no such value")

    return apply


def skip(reason: str) -> Rule:
    """Return the rule of a field that changes nothing here."""
    return lambda _value, _values: FieldOutcome("not-needed", reason=reason)


def lack(reason: str) -> Rule:
    """Return the rule of a field that slimtune has not; where it is off, nothing is lacking."""

    def apply(value: Any, _: JsonObject) -> FieldOutcome:
        is_off = value in (None, False, 0, "", "none", "no", "disable") or value in ([], {})
        return (
            FieldOutcome("not-needed", reason="it is off") if is_off else FieldOutcome("no-equivalent", reason=reason)
        )

    return apply


def expect(values: Collection[Any], reason: str, otherwise: str) -> Rule:
    """Return the rule of a field whose usual values change nothing here; any other has no equivalent."""

    def apply(value: Any, _: JsonObject) -> FieldOutcome:
        usual = value in values
        return FieldOutcome("not-needed" if usual else "no-equivalent", reason=reason if usual else otherwise)

    return apply


def refuse(field_name: str, value: Any, expected: str) -> RecipeError:
    """Return the error of a config that trains something else than slimtune can."""
    return RecipeError(f"{field_name} is {value!r}, which slimtune does not train", expected)


def to_bool(value: Any) -> bool:
    """Return a switch, also from the text of a command line."""
    return value if isinstance(value, bool) else str(value).lower() in ("true", "1", "yes", "on")


def to_list(value: Any) -> list[Any]:
    """Return a list, also from one value, or text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def to_targets(value: Any) -> Any:
    """Return target modules: all-linear, a pattern, or a list of names."""
    names = to_list(value)
    if [n.lower() for n in map(str, names)] in (["all"], ["all-linear"], ["auto"]):
        return "all-linear"
    is_pattern = len(names) == 1 and any(c in str(names[0]) for c in "*()|\\")
    return names[0] if is_pattern else names
