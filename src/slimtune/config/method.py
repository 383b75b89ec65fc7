"""The `method` section: its fields, short names and defaults are what the method's config class declares.

Nothing here knows a method by name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from ..adapters.config import PeftConfig
from ..errors import ConfigError, format_names
from ..methods import config_class
from .errors import FieldError, format_value, unknown


def known_fields(cls: type[PeftConfig]) -> tuple[str, ...]:
    """Return the names of the fields a recipe may set: the method's own, and the task type."""
    # The rest of PeftConfig is filled in by attaching and saving; a recipe that set it would be overwritten.
    shared = {f.name for f in dataclasses.fields(PeftConfig)} - {"task_type"}
    return tuple(f.name for f in dataclasses.fields(cls) if f.init and f.name not in shared)


def spelled(given: Mapping[str, Any], cls: type[PeftConfig]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the settings by their full names, and the faults: names unknown, or given in two spellings."""
    short = getattr(cls, "short_names", {})
    known = known_fields(cls)
    settings: dict[str, Any] = {}
    faults = []
    for name, value in given.items():
        full = short.get(name, name)
        if full not in known:
            faults.append(unknown(str(name), "method", [*known, *short], ()))
        elif full in settings:
            faults.append(FieldError(f"method.{name}", f"given twice, as {full} and by a short name", "one of the two"))
        else:
            settings[full] = value
    return settings, faults


def checked(settings: Mapping[str, Any], cls: type[PeftConfig]) -> list[FieldError]:
    """Return every fault in the values: of type as the fields declare, of range as the class checks."""
    hints, defaults = typing.get_type_hints(cls), getattr(cls, "recipe_defaults", {})
    faults = [
        FieldError(f"method.{name}", f"got {format_value(value)}", _type_text(hints[name]))
        for name, value in settings.items()
        if not _fits(value, hints[name])
    ]
    wrong = {f.path.removeprefix("method.") for f in faults}
    sound = {k: v for k, v in settings.items() if k not in wrong}
    sound |= {k: v for k, v in defaults.items() if k in wrong and not callable(v)}
    # A class raises at its first fault: take that field out and ask again, until all are found.
    while True:
        try:
            cls(**sound)
            return faults
        except ConfigError as e:
            name = e.message.split(" ", 1)[0]
            at = f"method.{name}" if name in sound else "method"
            got = e.message.replace(f"{name} is ", "got ", 1) if name in sound else e.message
            faults.append(FieldError(at, got, "; ".join(t for t in (e.expected, e.hint) if t)))
            start = defaults.get(name)
            if start is not None and not callable(start) and sound.get(name) not in (None, start):
                sound[name] = start  # what is needed must stay there, or its lack would be a second fault
            elif sound.pop(name, None) is None:
                return faults


def resolved(settings: Mapping[str, Any], cls: type[PeftConfig]) -> dict[str, Any]:
    """Return the settings with the method's recipe defaults filled in, plain ones before computed ones."""
    defaults = getattr(cls, "recipe_defaults", {})
    filled = {**{k: v for k, v in defaults.items() if not callable(v)}, **settings}
    computed = {k: v(filled) for k, v in defaults.items() if callable(v) and k not in filled}
    order = known_fields(cls)
    return dict(sorted({**filled, **computed}.items(), key=lambda item: order.index(item[0])))


def method_section(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the `method` section resolved, and every fault in it."""
    name = given.get("name", "lora")
    try:
        cls = config_class(name)
    except ConfigError as e:
        return {"name": str(name)}, [FieldError("method.name", e.message, e.expected)]
    settings, faults = spelled({k: v for k, v in given.items() if k != "name"}, cls)
    plain = {k: v for k, v in getattr(cls, "recipe_defaults", {}).items() if not callable(v)}
    wrong = checked({**plain, **settings}, cls)
    if not faults and not wrong:
        settings = resolved(settings, cls)
        wrong = checked(settings, cls)
    return {"name": cls.name, **settings}, faults + wrong


def _fits(value: Any, hint: Any) -> bool:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return True  # what pydantic cannot read the class checks itself
    try:
        read = adapter.validate_python(value)
    except ValidationError:
        return False
    # A number in quotes, or true for 1, is converted by pydantic and is no number here.
    plain = isinstance(value, str | int | float)
    return not plain or (read == value and isinstance(read, bool) == isinstance(value, bool))


def _type_text(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and not typing.get_args(hint):
        words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
        return words.get(hint.__name__, hint.__name__)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {format_names(typing.get_args(hint))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(h) for h in typing.get_args(hint))
    return str(hint)
