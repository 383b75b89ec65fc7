"""Declares settings, once: default, help, range and choices. Checks, flags, forms and the docs read them from here.

    @dataclass
    class LoraConfig(DeclaredSettings):
        r: int = config_field(8, "rank of the update", ge=1)

`list_settings(LoraConfig)` returns the declarations. `LoraConfig(r=0)` raises at the first error of the values;
`LoraConfig.find_errors({"r": 0})` returns all of them, each with its field. The sections of the recipe, the methods'
configs and the objectives are declared so. This module imports no torch.
"""

import copy
import dataclasses
import math
import operator
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from ...errors import ConfigError, format_names, nearest
from ..foundation.formatting import format_short_value

MAX_NUMBER = 1e9
"""Largest size of a number in a setting that declares no smaller bound: products of two still fit in fp32."""
_BOUNDS = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt), "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}  # fmt: skip
_PYTHON_WORDS = {
    bool: "True or False", int: "an integer", float: "a number", str: "a string", dict: "a dictionary",
    type(None): "None",
}  # fmt: skip
_YAML_WORDS = {
    bool: "true or false", int: "an integer", float: "a number", str: "text",
    type(None): "null",
}  # fmt: skip
_UNIONS = (typing.Union, types.UnionType)


def config_field(
    default: Any,
    help: str,
    *,
    when_null: str = "",
    see: str = "",
    flag: str = "",
    expected: str = "",
    pattern: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | Callable[[], Iterable[str]] | None = None,
    kw_only: bool | None = None,
) -> Any:
    """Declare a field of a `DeclaredSettings` dataclass.

    Args:
        default: its default; `...`: it must be given. A list or dictionary is copied.
        help: what the field does, with its unit and typical values.
        when_null: what null, or None, means.
        see: where more is said, a clause: "docs/recipe.md lists the others".
        flag: the command-line flag of a recipe's setting; by default its name, `--batch-size`.
        expected: what it takes, where its type and limits do not say it.
        pattern: a regular expression that a text matches.
        ge, gt, le, lt: bounds of every number in the value, also of those in a list or among a dictionary's values.
        choices: strings allowed, or a function that returns them; a `Literal` type needs none.
        kw_only: as in `dataclasses.field`.
    """
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    metadata = {"help": help, "when_null": when_null, "see": see, "flag": flag, "takes": expected, "pattern": pattern,
                "bounds": bounds, "given_choices": choices}  # fmt: skip
    how: dict[str, Any] = {"metadata": metadata} | ({} if kw_only is None else {"kw_only": kw_only})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), **how)
    return dataclasses.field(**how) if default is ... else dataclasses.field(default=default, **how)


class FieldError(NamedTuple):
    """What is wrong with a setting, for an answer that lists several and for an exception about one."""

    field: str  # its dotted path: "r" of a config, "method.r" of a recipe
    problem: str  # a clause without the field's name: "got -1", "no such field"
    expected: str = ""
    hint: str = ""
    sentence: str = ""  # the problem with the field's name, "r is -1"; empty: the problem is a sentence itself

    def within(self, section: str) -> "FieldError":
        """Return the error of a section's field as one of the recipe."""
        return self._replace(field=f"{section}.{self.field}")

    def to_exception(self) -> ConfigError:
        """Return the error as an exception."""
        return ConfigError(self.sentence or self.problem, self.expected, self.hint, field=self.field)


def make_invalid_value_error(field: str, value: object, expected: str, hint: str = "", more: str = "") -> FieldError:
    """Return the error for a value; `more` goes on after it: ", and train.fsdp is true"."""
    text = format_short_value(value) + more
    return FieldError(field, f"got {text}", expected, hint, f"{field} is {text}")


def _make_unknown_field_error(path: str, names: Iterable[str], paths: Iterable[str] = ()) -> FieldError:
    """Return the error for an unknown field: with a field of the same name in `paths`, else the nearest of `names`."""
    name = path.rpartition(".")[2]
    elsewhere = {known.rpartition(".")[2]: known for known in paths}
    suggestion = f"; did you mean {elsewhere[name]!r}?" if name in elsewhere else nearest(name, names)
    return FieldError(path, f"no such field{suggestion}", "" if suggestion else f"one of {format_names(names, 40)}")


@dataclass(frozen=True)
class SettingSpec:
    """One declared field, as commands, messages and the documentation show it."""

    path: str  # dotted, "train.epochs"; in a config the name
    type: Any
    default: Any  # None also where it is required
    required: bool = False
    help: str = ""
    when_null: str = ""
    see: str = ""
    flag: str = ""
    takes: str = ""
    pattern: str = ""
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    given_choices: Any = None
    words: Mapping[Any, str] = dataclasses.field(default_factory=lambda: _PYTHON_WORDS, repr=False)
    declared: bool = True  # whether by `config_field`; others are not checked

    @property
    def name(self) -> str:
        """Its name in its section."""
        return self.path.rpartition(".")[2]

    @property
    def description(self) -> str:
        """Its help as one sentence without a stop: what it does, where more is said, what null means."""
        null = f"{self.words[type(None)]}: {self.when_null}" if self.when_null else ""
        return "; ".join(filter(None, (self.help, self.see, null)))

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The strings allowed; empty: any."""
        given = self.given_choices
        if given is not None:
            return tuple(given() if callable(given) else given)
        literals = [t for t in _members(self.type) if typing.get_origin(t) is Literal]
        return tuple(c for t in literals for c in typing.get_args(t) if isinstance(c, str))

    @property
    def limits(self) -> str:
        """Its range, `"at least 1"`, without upper limits that nobody reaches."""
        return _describe_bounds({name: bound for name, bound in self.bounds.items() if bound < 10**6})

    @property
    def item_expected(self) -> str:
        """What an item of a list is, `"one of wandb, trackio"`."""
        return describe_type_hint(typing.get_args(self.type)[0], self.words)

    @property
    def expected(self) -> str:
        """What it takes, `"an integer or None, at least 1"`."""
        kind = describe_type_hint(self.type, self.words, self.choices)
        return self.takes or ", ".join(filter(None, (kind, _describe_bounds(self.bounds))))

    def read(self, value: Any) -> Any:
        """Return a value in the form that configs have.

        Sets (sorted), tuples and ranges become lists. None becomes an empty list or dictionary where the default is
        one: PEFT's files hold null there. A reader in an `Annotated` type converts what a file says.
        """
        if isinstance(value, set | frozenset):
            value = sorted(value)
        elif isinstance(value, tuple | range):
            value = list(value)
        elif value is None and isinstance(self.default, list | dict):
            value = type(self.default)()
        for reader in (r for member in _members(self.type) for r in getattr(member, "__metadata__", ())):
            value = reader(value)
        return value

    def find_error(self, value: Any) -> FieldError | None:
        """Return what is wrong with a value that was read, None if nothing is."""
        if not self.declared:
            return None
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        numbers = [x for x in items if isinstance(x, int | float) and not isinstance(x, bool)]
        in_range = all(_BOUNDS[name][1](x, bound) for name, bound in self.bounds.items() for x in numbers)
        largest = MAX_NUMBER if not {"le", "lt"} & set(self.bounds) else math.inf
        if not all(-MAX_NUMBER <= x <= largest for x in numbers):  # not NaN, either
            return make_invalid_value_error(self.name, value, f"{self.expected}; at most {MAX_NUMBER:g} in size")
        if _has_type(value, self.type) and in_range and (not isinstance(value, str) or self._takes_text(value)):
            return None
        near = nearest(value, self.choices) if isinstance(value, str) else ""
        return make_invalid_value_error(self.name, value, self.expected, more=near)

    def _takes_text(self, value: str) -> bool:
        matches = not self.pattern or bool(re.fullmatch(self.pattern, value, re.DOTALL))
        return matches and (not self.choices or value in self.choices)


class DeclaredSettings:
    """Base of dataclasses whose fields are declared with `config_field`."""

    yaml_words: ClassVar[bool] = False
    """Whether messages say null and true, as a recipe does, instead of None and True."""

    def __post_init__(self) -> None:
        self.check_fields()

    def check_fields(self) -> None:
        """Read all values into the form that configs have; raise the first error as a ConfigError."""
        for spec in list_settings(type(self).get_declaring_class()):
            value = spec.read(getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)  # some are frozen
            if (error := spec.find_error(value)) is not None:
                raise error.to_exception()
        self.check_conflicts()

    def check_conflicts(self) -> None:
        """Give fields their plain form; raise the first error that involves several of them."""
        self.normalize()
        for error in self.find_conflicts():
            raise error.to_exception()

    def check_required(self) -> None:
        """Raise ConfigError if a required field is missing; called before attaching."""
        for error in self.find_missing():
            raise error.to_exception()

    @classmethod
    def find_errors(cls, values: Mapping[str, Any]) -> list[FieldError]:
        """Return every error in the values of some fields; the others have their defaults.

        Conflicts are looked for among the values that are right by themselves.
        """
        settings, errors = {s.name: s for s in list_settings(cls)}, []
        trial = object.__new__(cls)  # without __init__, which raises at the first error
        for spec in settings.values():
            value = spec.read(values[spec.name]) if spec.name in values else copy.deepcopy(spec.default)
            error = spec.find_error(value) if spec.name in values else None
            errors += [error] if error is not None else []
            object.__setattr__(trial, spec.name, value if error is None else copy.deepcopy(spec.default))
        faulty = {e.field for e in errors}
        with warnings.catch_warnings(action="ignore"):  # creating the config shows them
            trial.normalize()
            found = [*trial.find_missing(), *trial.find_conflicts()]
        return errors + [e for e in found if e.field not in faulty]

    def error(self, name: str, expected: str, hint: str = "", more: str = "") -> FieldError:
        """Return the error for the value that a field has."""
        return make_invalid_value_error(name, getattr(self, name), expected, hint, more)

    @classmethod
    def get_declaring_class(cls) -> type:
        """Return the class that declares the fields: this one, unless a subclass was made to register it elsewhere."""
        return cls

    # --- what a class adds ------------------------------------------------------------------------------------------

    def normalize(self) -> None:
        """Give fields their plain form, and fill in what follows from others; every value is right by itself."""

    def find_missing(self) -> Iterator[FieldError]:
        """Yield the errors for required fields that have no value, where the class can exist without one."""
        return iter(())

    def find_conflicts(self) -> Iterator[FieldError]:
        """Yield the errors that involve several fields. It runs on values that are right by themselves."""
        return iter(())


def list_settings(cls: Any) -> tuple[SettingSpec, ...]:
    """Return the settings of a dataclass in its order, inherited ones first; those of a section in place of it."""
    return _list_settings(cls, "")


@cache
def _list_settings(cls: Any, prefix: str) -> tuple[SettingSpec, ...]:
    hints: dict[str, Any] = typing.get_type_hints(cls, include_extras=True)
    in_yaml = getattr(cls, "yaml_words", False)
    found: list[SettingSpec] = []
    for field in dataclasses.fields(cls):
        hint, metadata = hints[field.name], dict(field.metadata)
        if in_yaml and _is_section(hint):
            found += _list_settings(hint, f"{prefix}{field.name}.")
            continue
        if in_yaml and not metadata:
            continue  # a method's or a task's own settings, which another class declares
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default_factory() if callable(field.default_factory) else field.default
        metadata["flag"] = metadata.get("flag") or f"--{field.name.replace('_', '-')}"
        found.append(SettingSpec(f"{prefix}{field.name}", hint, None if required else default, required,
                             words=_YAML_WORDS if in_yaml else _PYTHON_WORDS,
                             declared="help" in metadata, **metadata))  # fmt: skip
    return tuple(found)


def parse_section_settings(
    known: Mapping[str, SettingSpec],
    given: Mapping[str, Any],
    section: str,
    short_names: Mapping[str, str] | None = None,
    names: Iterable[str] = (),
    paths: Iterable[str] = (),
    most: int = 20,
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the values of a recipe's section by full name, and every error in it.

    Args:
        known: the settings that the section has, by name.
        given: what the recipe says.
        section: its name; empty: the recipe itself.
        short_names: full names of settings by their short ones.
        names: names to suggest; by default those of the settings.
        paths: paths of all settings, for suggestions.
        most: errors that get a suggestion, which takes a while.
    """
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    short_names, seen = short_names or {}, set()
    for name, value in given.items():
        full_name, path = short_names.get(name, name), f"{section}.{name}" if section else name
        if full_name not in known:
            suggests = len(errors) < most
            error = (
                _make_unknown_field_error(path, names or [*known, *short_names], paths)
                if suggests
                else FieldError(path, "")
            )
            errors.append(error)
            continue
        if full_name in seen:
            errors.append(FieldError(path, f"given twice, also as {full_name} or its short name"))
            continue
        seen.add(full_name)
        read = known[full_name].read(value)
        if (found := known[full_name].find_error(read)) is None:
            values[full_name] = read
        else:
            errors.append(found.within(section) if section else found)
    return values, errors


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, DeclaredSettings)


def describe_type_hint(hint: Any, words: Mapping[Any, str] = _PYTHON_WORDS, choices: Iterable[str] = ()) -> str:
    """Return a type as a phrase: `"an integer or None"`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    in_yaml = words is _YAML_WORDS
    if origin is Annotated:
        return describe_type_hint(arguments[0], words, choices)
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(describe_type_hint(a, words, choices) for a in arguments))
    if origin is Literal or (choices and isinstance(hint, type) and issubclass(hint, str)):
        return _describe_choices(tuple(choices or arguments), in_yaml)
    if origin is list and in_yaml:
        is_choice = typing.get_origin(arguments[0]) is Literal
        return f"a list of {', '.join(typing.get_args(arguments[0])) if is_choice else words[arguments[0]]}"
    if origin is dict and in_yaml:
        return f"a mapping of {' to '.join(describe_type_hint(a, words) for a in arguments)}"
    if in_yaml:
        return words.get(hint) or "a path"
    return words.get(hint) or str(hint if arguments else getattr(hint, "__name__", hint))


def _describe_choices(choices: tuple[Any, ...], in_yaml: bool) -> str:
    if not in_yaml:
        return f"one of {format_names(choices, 40)}"
    return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])


def _describe_bounds(bounds: Mapping[str, float]) -> str:
    words = [(_BOUNDS[name][0], bound) for name, bound in bounds.items() if math.isfinite(bound)]
    return " and ".join(f"{word} {bound if abs(bound) < 1e15 else f'{bound:g}'}" for word, bound in words)


def _members(hint: Any) -> Iterator[Any]:
    """Yield a type, the members of a union, and what an `Annotated` annotates."""
    yield hint
    if typing.get_origin(hint) in _UNIONS:
        for member in typing.get_args(hint):
            yield from _members(member)
    elif typing.get_origin(hint) is Annotated:
        yield typing.get_args(hint)[0]


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has the declared type; an int is a float, a bool is no int, NaN and Inf are no floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _has_type(value, arguments[0])
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
    if hint is str:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # UTF-8 has none of them
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
