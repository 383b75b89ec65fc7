"""Type hints at run time: whether a value has a type, and what a type is in words."""

import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from ...errors import format_names

_PYTHON_WORDS = {
    bool: "True or False", int: "an integer", float: "a number", str: "a string", dict: "a dictionary",
    type(None): "None",
}  # fmt: skip
_YAML_WORDS = _PYTHON_WORDS | {bool: "true or false", str: "text", type(None): "null", Path: "a path"}
_UNIONS = (typing.Union, types.UnionType)


def iterate_union_members(hint: Any) -> Iterator[Any]:
    """Yield the types of a union, or the type itself, without what annotates them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    for member in arguments[:1] if origin is Annotated else arguments if origin in _UNIONS else ():
        yield from iterate_union_members(member)
    if origin is not Annotated and origin not in _UNIONS:
        yield hint


def has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has a type; an int is a float, a bool is no int, NaN and Inf are no floats."""
    return any(_is_of_kind(value, kind) for kind in iterate_union_members(hint))


def _is_of_kind(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in arguments)
    if origin is list:
        return isinstance(value, list) and all(has_type(v, arguments[0]) for v in value)
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(has_type(k, key) and has_type(v, item) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # UTF-8 has none of them
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def describe_type_hint(hint: Any, in_yaml: bool = False, choices: tuple[Any, ...] = ()) -> str:
    """Return a type as a phrase: `"an integer or None"`; `choices` are the strings that a text may be."""
    return " or ".join(dict.fromkeys(_describe_kind(kind, in_yaml, choices) for kind in iterate_union_members(hint)))


def _describe_kind(kind: Any, in_yaml: bool, choices: tuple[Any, ...]) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    words = _YAML_WORDS if in_yaml else _PYTHON_WORDS
    if origin is Literal or (choices and isinstance(kind, type) and issubclass(kind, str)):
        given = choices or arguments
        names = ", ".join(map(str, given)) if in_yaml else format_names(given, 40)
        return names if in_yaml and len(given) == 1 else f"one of {names}"
    if origin is list and in_yaml:
        return f"a list of {', '.join(typing.get_args(arguments[0])) or words[arguments[0]]}"
    if origin is dict and in_yaml:
        return f"a mapping of {' to '.join(describe_type_hint(a, in_yaml) for a in arguments)}"
    return words.get(kind) or str(kind if arguments else getattr(kind, "__name__", kind))
