"""Declares a config's fields once: default, help, range and choices; checks, `--help` and the docs read them from here.

    r: int = setting(8, "rank of the update", ge=1)

`field_specs(LoraConfig)` yields these declarations, and `check_fields(config)` checks the values against them.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ConfigError, format_names, nearest


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Any = dataclasses.MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | Callable[[], Iterable[str]] | None = None,
    kw_only: bool = False,
) -> Any:
    """Declare a dataclass field with its help and its range.

    A `Literal` type needs no `choices`. The range holds for every number in the value: for those in a list, and for
    the values of a dictionary.

    Args:
        default: the default.
        help: what the field does, with its unit and typical values, as `--help` shows it.
        default_factory: makes the default where that is a list or a dictionary.
        ge: smallest value allowed.
        gt: the value must be larger.
        le: largest value allowed.
        lt: the value must be smaller.
        choices: strings allowed, or a function that returns them.
        kw_only: as in `dataclasses.field`.
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, kw_only=kw_only, metadata=metadata)
    return dataclasses.field(default=default, kw_only=kw_only, metadata=metadata)


@dataclass(frozen=True)
class FieldSpec:
    """One declared field of a config class.

    Args:
        name: the field's name.
        type: its resolved type, such as `int` or `Literal["none", "all"]`.
        default: its default; a fresh list or dictionary where it has a factory.
        help: what it does.
        ge, gt, le, lt: its range; None: no bound on that side.
        choices: the strings allowed; empty: any.
        declared: whether the class declares it with `setting`; only then is its value checked.
    """

    name: str
    type: Any
    default: Any
    help: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    declared: bool = True

    @property
    def range(self) -> str:
        """The range as a phrase, `"at least 1"`; empty without one."""
        bounds = (("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    @property
    def expected(self) -> str:
        """What the field takes, as a phrase: `"an integer or None, at least 1"`."""
        return ", ".join(part for part in (describe_type(self.type, self.choices), self.range) if part)

    def find_error(self, value: Any) -> ConfigError | None:
        """Return what is wrong with a value, None if nothing is."""
        if not self.declared or (_has_type(value, self.type) and self._is_in_range(value) and self._is_choice(value)):
            return None
        return ConfigError(f"{self.name} is {value!r}{nearest(str(value), self.choices)}", self.expected)

    def _is_in_range(self, value: Any) -> bool:
        return all(
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
            for number in _iterate_numbers(value)
        )

    def _is_choice(self, value: Any) -> bool:
        return not self.choices or not isinstance(value, str) or value in self.choices


@cache
def field_specs(config_class: type) -> tuple[FieldSpec, ...]:
    """Return the specs of a config class's fields, inherited ones first, in the order of the dataclass."""
    hints = typing.get_type_hints(config_class)
    specs = []
    for field in dataclasses.fields(config_class):
        declared = dict(field.metadata)
        choices = declared.pop("choices", None)
        if choices is None:
            choices = [c for c in _literal_values(hints[field.name]) if isinstance(c, str)]
        elif callable(choices):
            choices = choices()
        default = field.default_factory() if callable(field.default_factory) else field.default
        specs.append(
            FieldSpec(
                field.name, hints[field.name], default, choices=tuple(choices), declared="help" in declared, **declared
            )
        )
    return tuple(specs)


def check_fields(config: Any, config_class: type | None = None) -> None:
    """Check a config's values against its declarations.

    Sets (sorted), tuples and ranges become lists. None becomes an empty list or dictionary where the field's default
    is one: PEFT's files hold null there.

    Args:
        config: an instance of a dataclass.
        config_class: the class that declares its fields; None: its type.

    Raises:
        ConfigError: a value has another type than declared, is out of range, or is none of the choices.
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
    if origin in (typing.Union, types.UnionType):
        phrases = list(dict.fromkeys(describe_type(a, choices) for a in arguments))
        return " or ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)
    if origin is typing.Literal or (choices and isinstance(hint, type) and issubclass(hint, str)):
        return f"one of {format_names(choices or arguments, 40)}"
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"a dictionary of {_plural(arguments[1])} by {_plural(arguments[0])}"
    words = {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "a string",
        dict: "a dictionary",
        type(None): "None",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _plural(hint: Any) -> str:
    words = {bool: "booleans", int: "integers", float: "numbers", str: "strings", Any: "values"}
    if typing.get_origin(hint) is list:
        return f"lists of {_plural(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_plural(a) for a in typing.get_args(hint))
    return words.get(hint, describe_type(hint))


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has the declared type; an int is a float, a bool is no int, NaN and Inf are no floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, a) for a in arguments)
    if origin is typing.Literal:
        return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_type(v, arguments[0]) for v in value)
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(_has_type(k, key) and _has_type(v, item) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _literal_values(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [value for a in typing.get_args(hint) for value in _literal_values(a)]
    return []


def _iterate_numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield item
