"""Names of layers as people write them: a name, a dotted suffix, or a regular expression (PEFT's rules)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

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
