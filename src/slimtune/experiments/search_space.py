"""The settings that a search varies, as `slimtune tune --over` gives them.

    train.learning_rate=log:1e-5..1e-2    numbers between two ends, on a logarithmic scale
    train.warmup_ratio=0..0.2             numbers between two ends; whole ones for a setting that takes no others
    method.r=8,16,32                      some values, each read as YAML

This module imports neither torch nor Optuna, so that a wrong range is reported at once.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.config.recipe_loading import SHORT_SECTIONS
from ..core.foundation.files import to_json
from ..core.foundation.strict_yaml import parse_yaml
from ..errors import RecipeError, UsageError

SAME_ROWS = ("data", "task", "output_dir", "model.name", "model.revision")
"""Settings, or sections, that are the same in every trial: others would measure a loss on other tokens."""
MOST_COMBINATIONS = 1000
"""Combinations of ends and choices that are checked before the search begins."""
EXAMPLE = "for example --over train.learning_rate=log:1e-5..1e-2 --over method.r=8,16,32"


@dataclass(frozen=True)
class SettingRange:
    """What a search may set one setting to: one of `choices`, or a number from `low` to `high`."""

    path: str  # dotted, as in a recipe
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False  # whole numbers only

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(map(format_setting_value, self.choices))
        return f"{'log:' if self.log else ''}{self.low:g}..{self.high:g}"

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are checked before the search begins: if they are valid, so are those between them."""
        return self.choices or (self.low, self.high)

    @property
    def size(self) -> float:
        """The number of values; infinite for a range of fractions."""
        return len(self.choices) or (self.high - self.low + 1 if self.whole else math.inf)

    def contains(self, value: Any) -> bool:
        """Return whether a value can be drawn."""
        if self.choices:
            return value in self.choices
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high and (not self.whole or value == int(value))

    def is_edge(self, value: Any) -> bool:
        """Return whether a value lies within a tenth of the range from an end; never true of a choice."""
        if self.choices:
            return False
        scale: Callable[[float], float] = math.log if self.log else float
        position = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return not 0.1 < position < 0.9


def parse_setting_ranges(texts: Iterable[str]) -> list[SettingRange]:
    """Return the ranges that `PATH=RANGE` texts describe; raise UsageError for one that is none."""
    ranges: dict[str, SettingRange] = {}
    for text in texts:
        found = _parse_range(text)
        if found.path in ranges:
            raise UsageError(f"--over {found.path} is given twice", "once", "leave one out")
        ranges[found.path] = found
    if not ranges:
        raise UsageError("there is nothing to search", "--over PATH=RANGE, once or several times", EXAMPLE)
    return list(ranges.values())


def _parse_range(text: str) -> SettingRange:
    path, _, value = (part.strip() for part in text.partition("="))
    if not path or not value:
        raise UsageError(f"--over got {text!r}", "PATH=LOW..HIGH, PATH=log:LOW..HIGH or PATH=A,B,C", EXAMPLE)
    path += f".{SHORT_SECTIONS[path]}" if path in SHORT_SECTIONS else ""
    if fixed := next((p for p in SAME_ROWS if path == p or path.startswith(f"{p}.")), None):
        reason = "the losses of the trials must be of the same rows, tokens and objective"
        reason = "the trials have their own run folders" if fixed == "output_dir" else reason
        raise UsageError(f"--over {path}: {reason}", "settings of train, method, model.dtype or model.quantization")
    log = value.startswith("log:")
    low, dots, high = value.removeprefix("log:").partition("..")
    ends = [parse_yaml(end.strip(), f"--over {path}") if dots else None for end in (low, high)]
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if log or numbers:
        wrong = f"--over {path} got {value!r}"
        if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
            raise UsageError(wrong, "two numbers, as log:1e-5..1e-2 or 0..0.2", EXAMPLE)
        if numbers[0] >= numbers[1]:
            raise UsageError(f"{wrong}: {numbers[0]:g} is not below {numbers[1]:g}", "the lower end first")
        if log and numbers[0] <= 0:
            raise UsageError(f"{wrong}: a logarithmic scale has no {numbers[0]:g}", "a lower end above 0")
        return SettingRange(path, low=numbers[0], high=numbers[1], log=log)
    choices = list({to_json(choice): choice for choice in parse_yaml(f"[{value}]", f"--over {path}")}.values())
    if len(choices) < 2:
        message, hint = f"--over {path} has one value, {value}: there is nothing to search", f"--set {path}={value}"
        raise UsageError(message, "two values or more, or a range, as 1e-5..1e-2", hint)
    return SettingRange(path, choices=tuple(choices))


def validate_and_mark_integer_ranges(
    ranges: Sequence[SettingRange], check_values: Callable[[Mapping[str, Any]], Any]
) -> list[SettingRange]:
    """Check every combination of ends and choices, and return the ranges, those of integers marked as `whole`.

    `check_values` raises RecipeError for values, by path, that a recipe cannot have.
    """
    try:
        for values in itertools.islice(itertools.product(*(r.ends for r in ranges)), MOST_COMBINATIONS):
            check_values(dict(zip((r.path for r in ranges), values, strict=True)))
    except RecipeError as e:
        raise RecipeError(e.message, e.expected, EXAMPLE) from None
    return [r if r.choices else dataclasses.replace(r, whole=_takes_whole_numbers(r, check_values)) for r in ranges]


def _takes_whole_numbers(searched: SettingRange, check: Callable[[Mapping[str, Any]], Any]) -> bool:
    if not (isinstance(searched.low, int) and isinstance(searched.high, int)):
        return False
    try:
        check({searched.path: searched.low + 0.5})
    except RecipeError:
        return True
    return False


def format_setting_values(values_by_path: Mapping[str, Any]) -> str:
    """Return values as text: `train.learning_rate 0.0002, method.r 8`."""
    return ", ".join(f"{path} {format_setting_value(value)}" for path, value in values_by_path.items())


def format_setting_value(value: Any) -> str:
    """Return the value of a setting as a short text."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else to_json(value)
