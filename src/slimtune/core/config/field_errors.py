"""Errors in a recipe. All of them are found first, then raised as one RecipeError."""

import reprlib
import typing
from collections.abc import Iterable
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from ...errors import RecipeError, format_names, nearest
from .schema import iterate_settings

MOST = 20
"""Errors that a message lists."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3


class FieldError(NamedTuple):
    """An error in one setting: its dotted path, what is wrong, and what it takes."""

    path: str
    message: str
    expected: str = ""


def raise_errors(errors: Iterable[FieldError], source: str) -> None:
    """Raise one RecipeError with every error; do nothing if there is none."""
    every = list(errors)
    lines = [
        f"\n  {e.path[:200]}: {e.message}" + (f"; expected: {e.expected}" if e.expected else "") for e in every[:MOST]
    ]
    if lines:
        number = "1 problem" if len(lines) == 1 else f"{len(every)} problems"
        lines += [f"\n  … and {len(every) - MOST} more"] if len(every) > MOST else []
        hint = "correct it there, or override it: --set path.to.field=value"
        raise RecipeError(f"{source}: {number}:{''.join(lines)}", hint=hint)


def format_value(value: object, limit: int = 60) -> str:
    """Return a value as short text."""
    text = repr(value[:limit]) if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def unknown_field_error(path: str, names: Iterable[str], paths: Iterable[str] = ()) -> FieldError:
    """Return the error for an unknown field: with a field of the same name in `paths`, else the nearest of `names`."""
    name = path.rpartition(".")[2]
    elsewhere = {known.rpartition(".")[2]: known for known in paths}
    suggestion = f"; did you mean {elsewhere[name]!r}?" if name in elsewhere else nearest(name, names)
    return FieldError(path, f"no such field{suggestion}", "" if suggestion else f"one of {format_names(names, 40)}")


def collect_field_errors(error: ValidationError, recipe: type[BaseModel], paths: Iterable[str]) -> list[FieldError]:
    """Return pydantic's errors in a recipe in the words of the settings; `paths` of all fields are for suggestions."""
    settings = {s.path: s for s in iterate_settings(recipe)}
    found: dict[str, FieldError] = {}  # by path: a union reports each of its members
    for detail in error.errors():
        parts, value = [str(part) for part in detail["loc"]], detail["input"]
        location = ".".join(parts)
        # An error in an item of a list is an error in the list's setting.
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in settings), location)
        got = f"got {format_value(value)}"
        if detail["type"] == "extra_forbidden":
            listed = len(found) < MOST  # the others are only counted
            names = _field_names(recipe, parts[:-1]) if listed else []
            found[location] = unknown_field_error(location, names, paths) if listed else FieldError(location, "")
        elif detail["type"] == "missing":
            missing = [s for s in settings.values() if s.required and f"{s.path}.".startswith(f"{location}.")]
            found |= {s.path: FieldError(s.path, f"missing (flag {s.flag})", s.help) for s in missing}
        elif path in settings:
            members = [settings[path].annotation, *typing.get_args(settings[path].annotation)]
            choices = [c for m in members if typing.get_origin(m) is typing.Literal for c in typing.get_args(m)]
            similar = nearest(value, choices) if isinstance(value, str) else ""
            found[path] = FieldError(path, got + similar, settings[path].expected)
        else:
            found[path] = FieldError(path, got, f"a section with {format_names(_field_names(recipe, parts))}")
    return list(found.values())


def _field_names(section: type[BaseModel], parts: Iterable[str]) -> list[str]:
    for part in parts:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return list(section.model_fields)
