"""Declares a config's fields once: default, help, range and choices; checks, `--help` and the docs read them from here.

    r: int = setting(8, "rank of the update", ge=1)

`field_specs(LoraConfig)` yields these declarations, and `check_fields(config)` checks the values against them.
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Literal

from ...errors import ConfigError, format_names, nearest

_UNIONS = (typing.Union, types.UnionType)
_TYPE_NAMES = {
    bool: "True or False", int: "an integer", float: "a number", str: "a string", dict: "a dictionary",
    type(None): "None",
}  # fmt: skip
MAX_NUMBER = 1e9
"""Largest size of a number in a setting that declares no smaller bound: products of two still fit in fp32."""
_BOUNDS = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt), "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}  # fmt: skip


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    default_factory: Any = MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | Callable[[], Iterable[str]] | None = None,
    kw_only: bool = False,
) -> Any:
    """Declare a dataclass field with its help and its range.

    Args:
        default, default_factory, kw_only: as in `dataclasses.field`.
        help: what the field does, with its unit and typical values, as `--help` shows it.
        ge, gt, le, lt: bounds of every number in the value, also of those in a list or among a dictionary's values.
        choices: strings allowed, or a function that returns them; a `Literal` type needs none.
    """
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    metadata = {"help": help, "bounds": bounds, "choices": choices}
    given = {"default": default} if default_factory is MISSING else {"default_factory": default_factory}
    return dataclasses.field(**given, kw_only=kw_only, metadata=metadata)


@dataclass(frozen=True)
class FieldSpec:
    """One field of a config class: its resolved type, its default, and what `setting` declares.

    `choices` are the strings allowed; empty: any. Only a field that is `declared` with `setting` is checked.
    """

    name: str
    type: Any
    default: Any
    help: str = ""
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] = ()
    declared: bool = True

    @property
    def range_text(self) -> str:
        """The range as a phrase, `"at least 1"`; empty without one."""
        return " and ".join(f"{_BOUNDS[name][0]} {bound:g}" for name, bound in self.bounds.items())

    @property
    def expected(self) -> str:
        """What the field takes, as a phrase: `"an integer or None, at least 1"`."""
        return ", ".join(part for part in (describe_type(self.type, self.choices), self.range_text) if part)

    def find_error(self, value: Any) -> ConfigError | None:
        """Return what is wrong with a value, None if nothing is."""
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        numbers = [x for x in items if isinstance(x, int | float) and not isinstance(x, bool)]
        in_range = all(_BOUNDS[name][1](x, bound) for name, bound in self.bounds.items() for x in numbers)
        largest = MAX_NUMBER if not {"le", "lt"} & set(self.bounds) else math.inf
        if self.declared and not all(-MAX_NUMBER <= x <= largest for x in numbers):  # not NaN, either
            return ConfigError(f"{self.name} is {_shorten(value)}", f"{self.expected}; at most {MAX_NUMBER:g} in size")
        is_choice = not self.choices or not isinstance(value, str) or value in self.choices
        if not self.declared or (_has_type(value, self.type) and is_choice and in_range):
            return None
        return ConfigError(f"{self.name} is {_shorten(value)}{nearest(str(value), self.choices)}", self.expected)


@cache
def field_specs(config_class: type) -> tuple[FieldSpec, ...]:
    """Return the specs of a config class's fields, inherited ones first, in the order of the dataclass."""
    hints = typing.get_type_hints(config_class)
    specs = []
    for field in dataclasses.fields(config_class):
        declared, hint = dict(field.metadata), hints[field.name]
        choices = declared.pop("choices", None)
        if choices is None:
            literals = [t for t in (hint, *typing.get_args(hint)) if typing.get_origin(t) is Literal]
            choices = [c for t in literals for c in typing.get_args(t) if isinstance(c, str)]
        choices = tuple(choices() if callable(choices) else choices)
        default = field.default_factory() if callable(field.default_factory) else field.default
        specs.append(FieldSpec(field.name, hint, default, choices=choices, declared="help" in declared, **declared))
    return tuple(specs)


def check_fields(config: Any, config_class: type | None = None) -> None:
    """Check a dataclass's values against the declarations of `config_class` (None: its type).

    Sets (sorted), tuples and ranges become lists. None becomes an empty list or dictionary where the field's default
    is one: PEFT's files hold null there.

    Raises:
        ConfigError: a value has another type than declared, is out of range, or not one of the choices.
    """
    for spec in field_specs(config_class or type(config)):
        value = getattr(config, spec.name)
        if isinstance(value, set | frozenset):
            value = sorted(value)
        elif isinstance(value, tuple | range):
            value = list(value)
        elif value is None and isinstance(spec.default, list | dict):
            value = type(spec.default)()
        setattr(config, spec.name, value)
        error = spec.find_error(value)
        if error is not None:
            raise error


def describe_type(hint: Any, choices: Iterable[str] = ()) -> str:
    """Return a type as a phrase: `"an integer or None"`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(describe_type(a, choices) for a in arguments))
    if origin is Literal or (choices and isinstance(hint, type) and issubclass(hint, str)):
        return f"one of {format_names(choices or arguments, 40)}"
    return _TYPE_NAMES.get(hint) or str(hint if arguments else getattr(hint, "__name__", hint))


def _shorten(value: Any) -> str:
    # Python refuses to print integers of over 4,300 digits.
    huge = isinstance(value, int) and abs(value) > 1e100
    text = f"an integer of {value.bit_length()} bits" if huge else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has the declared type; an int is a float, a bool is no int, NaN and Inf are no floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in _UNIONS:
        return any(_has_type(value, a) for a in arguments)
    if origin is Literal:
        return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_type(v, arguments[0]) for v in value)
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(_has_type(k, key) and _has_type(v, item) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
