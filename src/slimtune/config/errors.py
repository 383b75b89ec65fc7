"""Errors in a recipe. All of them are found first, then raised as one RecipeError."""

import typing
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError, format_names, nearest
from .schema import Setting, iterate_settings


@dataclass(frozen=True)
class FieldError:
    """An error in one setting: its dotted path, what is wrong, and what it takes."""

    path: str
    message: str
    expected: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f"; expected: {self.expected}" if self.expected else "")


def raise_errors(errors: Iterable[FieldError], source: str) -> None:
    """Raise one RecipeError with every error; do nothing if there is none."""
    found = list(errors)
    if found:
        number = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        lines = "".join(f"\n  {error}" for error in found)
        raise RecipeError(
            f"{source}: {number}:{lines}", hint="correct it there, or override it: --set path.to.field=value"
        )


def format_value(value: object, limit: int = 60) -> str:
    """Return a value as short text."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def unknown_field_error(path: str, names: Iterable[str], paths: Iterable[str]) -> FieldError:
    """Return the error for an unknown field, with the nearest known name.

    Args:
        path: dotted path of the unknown field.
        names: names that its section has.
        paths: dotted paths of all settings; one with the same name in another section is suggested.
    """
    name = path.rpartition(".")[2]
    elsewhere = {known.rpartition(".")[2]: known for known in paths}
    suggestion = f"; did you mean {elsewhere[name]!r}?" if name in elsewhere else nearest(name, names)
    return FieldError(path, f"no such field{suggestion}", "" if suggestion else f"one of {format_names(names, 40)}")


def collect_field_errors(error: ValidationError, recipe: type[BaseModel], paths: Iterable[str]) -> list[FieldError]:
    """Return pydantic's errors as FieldErrors in the words of the settings.

    Args:
        error: what pydantic raised.
        recipe: the model that it validated.
        paths: dotted paths of all settings, for suggestions.
    """
    settings = {s.path: s for s in iterate_settings(recipe)}
    found: dict[str, FieldError] = {}  # by path: a union reports each of its members
    for detail in error.errors():
        parts = [str(part) for part in detail["loc"]]
        location = ".".join(parts)
        # An error in an item of a list is an error in the list's setting.
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in settings), location)
        got = f"got {format_value(detail['input'])}"
        if detail["type"] == "extra_forbidden":
            found[location] = unknown_field_error(location, _field_names(recipe, parts[:-1]), paths)
        elif detail["type"] == "missing":
            missing = [s for s in settings.values() if s.required and f"{s.path}.".startswith(f"{location}.")]
            found |= {s.path: FieldError(s.path, f"missing (flag {s.flag})", s.help) for s in missing}
        elif path in settings:
            found[path] = FieldError(
                path, got + _nearest_choice(settings[path], detail["input"]), settings[path].expected
            )
        else:
            found[path] = FieldError(path, got, f"a section with {format_names(_field_names(recipe, parts), 40)}")
    return list(found.values())


def _nearest_choice(setting: Setting, value: object) -> str:
    options = [setting.annotation, *typing.get_args(setting.annotation)]
    choices = [c for option in options if typing.get_origin(option) is typing.Literal for c in typing.get_args(option)]
    return nearest(value, choices) if isinstance(value, str) else ""


def _field_names(section: type[BaseModel], parts: Iterable[str]) -> list[str]:
    for part in parts:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return list(section.model_fields)
