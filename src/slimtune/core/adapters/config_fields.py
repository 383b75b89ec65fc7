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
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from ...errors import ConfigError, SlimtuneError, format_names, suggest
from ..foundation.formatting import format_short_value
from ..foundation.type_hints import describe_type_hint, has_type, iterate_union_members

MAX_NUMBER = 1e9
"""Largest size of a number in a setting that declares no smaller bound: products of two still fit in fp32."""
MOST_ERRORS = 20
"""Errors that a message lists, and unknown fields for which the nearest name is looked up, which takes a while."""
_BOUNDS = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt), "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}  # fmt: skip


def config_field(default: Any, help: str, *, kw_only: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """Declare a field of a `DeclaredSettings` dataclass.

    Args:
        default: its default; `...`: it must be given. A list or dictionary is copied.
        help: what the field does, with its unit and typical values.
        kw_only: as in `dataclasses.field`.
        declared: the first fields of `SettingSpec`: bounds, choices, what null means, the flag.
    """
    how = {} if default is ... else {"default": default}
    if isinstance(default, list | dict):
        how = {"default_factory": lambda: copy.deepcopy(default)}
    metadata = {"setting": SettingSpec(help=help, **declared)}
    return dataclasses.field(kw_only=kw_only, metadata=metadata, **how)


class FieldError(NamedTuple):
    """What is wrong with a setting, for an answer that lists several and for an exception about one."""

    field: str  # its dotted path: "r" of a config, "method.r" of a recipe
    problem: str  # a clause without the field's name: "got -1", "no such field"
    expected: str = ""
    hint: str = ""
    sentence: str = ""  # the problem with the field's name, "r is -1"; empty: the problem is a sentence itself
    cause: SlimtuneError | None = None  # raised itself where it is the only error

    def within(self, section: str) -> "FieldError":
        """Return the error of a section's field as one of the recipe."""
        return self._replace(field=f"{section}.{self.field}")

    def to_exception(self) -> ConfigError:
        """Return the error as an exception."""
        return ConfigError(self.sentence or self.problem, self.expected, self.hint, field=self.field)


def make_invalid_value_error(field: str, value: object, expected: str, hint: str = "", suffix: str = "") -> FieldError:
    """Return the error for a value; `suffix` goes on after it: ", and train.fsdp is true"."""
    text = format_short_value(value) + suffix
    return FieldError(field, f"got {text}", expected, hint, f"{field} is {text}")


@dataclass(frozen=True, kw_only=True)
class SettingSpec:
    """One declared field, as checks, commands, forms and the documentation read it."""

    help: str = ""  # empty: the field is not declared, and not checked
    ge: float | None = None  # bounds of every number in the value, also of those in a list or a dictionary's values
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Any = None  # strings allowed, or a function that returns them; a `Literal` type needs none
    pattern: str = ""  # a regular expression that a text matches
    takes: str = ""  # what it takes, where its type and limits do not say it
    when_null: str = ""  # what null, or None, means
    see: str = ""  # where more is said, a clause: "docs/recipe.md lists the others"
    flag: str = ""  # the command-line flag of a recipe's setting; by default its name, `--batch-size`
    in_recipe: bool = True  # whether a recipe may set it

    # What the dataclass says, filled in by `list_settings`:
    path: str = ""  # dotted, "train.epochs"; in a config the name
    type: Any = None
    default: Any = None  # None also where it is required
    required: bool = False
    in_yaml: bool = False  # whether messages say null and true instead of None and True

    @property
    def name(self) -> str:
        """Its name in its section."""
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        """The section of the recipe that it is in; a setting in none is its own."""
        return self.path.partition(".")[0]

    @property
    def description(self) -> str:
        """Its help as one sentence without a stop: what it does, where more is said, what null means."""
        null = f"{'null' if self.in_yaml else 'None'}: {self.when_null}" if self.when_null else ""
        return "; ".join(filter(None, (self.help, self.see, null)))

    @cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have: `(int, NoneType)` of an integer that may be null."""
        return tuple(iterate_union_members(self.type))

    def list_choices(self) -> tuple[str, ...]:
        """Return the strings allowed; empty: any."""
        if self.choices is not None:
            return tuple(self.choices() if callable(self.choices) else self.choices)
        literals = [kind for kind in self.kinds if typing.get_origin(kind) is Literal]
        return tuple(c for kind in literals for c in typing.get_args(kind) if isinstance(c, str))

    @cached_property
    def bounds(self) -> dict[str, float]:
        """Its bounds by their names."""
        return {name: bound for name in _BOUNDS if (bound := getattr(self, name)) is not None}

    @property
    def limits(self) -> str:
        """Its range, `"at least 1"`, without upper limits that nobody reaches."""
        return _describe_bounds({name: bound for name, bound in self.bounds.items() if bound < 10**6})

    @property
    def expected(self) -> str:
        """What it takes, `"an integer or None, at least 1"`."""
        kind = describe_type_hint(self.type, self.in_yaml, self.list_choices())
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
        for member in (self.type, *typing.get_args(self.type)):
            for reader in getattr(member, "__metadata__", ()):
                value = reader(value)
        return value

    def find_error(self, value: Any) -> FieldError | None:
        """Return what is wrong with a value that was read, None if nothing is."""
        if not self.help:
            return None  # not declared by `config_field`
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        numbers = [x for x in items if isinstance(x, int | float) and not isinstance(x, bool)]
        largest = MAX_NUMBER if not {"le", "lt"} & set(self.bounds) else math.inf
        if not all(-MAX_NUMBER <= x <= largest for x in numbers):  # not NaN, either
            return make_invalid_value_error(self.name, value, f"{self.expected}; at most {MAX_NUMBER:g} in size")
        in_range = all(_BOUNDS[name][1](x, bound) for name, bound in self.bounds.items() for x in numbers)
        choices = self.list_choices() if isinstance(value, str) else ()
        fits_pattern = not self.pattern or not isinstance(value, str) or re.fullmatch(self.pattern, value, re.DOTALL)
        if has_type(value, self.type) and in_range and fits_pattern and (not choices or value in choices):
            return None
        near = suggest(value, choices) if choices else ""
        return make_invalid_value_error(self.name, value, self.expected, suffix=near)


class DeclaredSettings:
    """Base of dataclasses whose fields are declared with `config_field`."""

    yaml_words: ClassVar[bool] = False
    """Whether messages say null and true, as a recipe does, instead of None and True."""
    short_names: ClassVar[dict[str, str]] = {}
    """Short names of fields for recipes and flags: `{"rank": "r"}`."""

    def __post_init__(self) -> None:
        self.check_fields()

    def check_fields(self) -> None:
        """Read all values into the form that configs have; raise the first error as a ConfigError."""
        for error in self._read_fields(vars(self)):
            raise error.to_exception()
        self.check_conflicts()

    def _read_fields(self, values: Mapping[str, Any]) -> Iterator[FieldError]:
        """Set every field to its value as configs have it; yield the errors, in place of which defaults are set."""
        cls: Any = type(self)
        for spec in list_settings(cls):
            is_given, error, value = spec.name in values, None, None
            if is_given:
                value = spec.read(values[spec.name])
                error = spec.find_error(value)
            if not is_given or error is not None:
                value = copy.deepcopy(spec.default)
            object.__setattr__(self, spec.name, value)  # some are frozen
            if error is not None:
                yield error

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
        trial = object.__new__(cls)  # without __init__, which raises at the first error
        errors = {error.field: error for error in trial._read_fields(values)}
        with warnings.catch_warnings(action="ignore"):  # creating the config shows them
            trial.normalize()
            found = [*trial.find_missing(), *trial.find_conflicts()]
        return [*errors.values(), *(e for e in found if e.field not in errors)]

    def error(self, name: str, expected: str, hint: str = "", more: str = "") -> FieldError:
        """Return the error for the value that a field has."""
        return make_invalid_value_error(name, getattr(self, name), expected, hint, more)

    # --- what a class adds ------------------------------------------------------------------------------------------

    def normalize(self) -> None:
        """Give fields their plain form, and fill in what follows from others; every value is right by itself."""

    def find_missing(self) -> Iterator[FieldError]:
        """Yield the errors for required fields that have no value, where the class can exist without one."""
        return iter(())

    def find_conflicts(self) -> Iterator[FieldError]:
        """Yield the errors that involve several fields. It runs on values that are right by themselves."""
        return iter(())


@cache
def list_settings(cls: Any, prefix: str = "") -> tuple[SettingSpec, ...]:
    """Return the settings of a dataclass in its order, inherited ones first; those of a section in place of it."""
    cls = next(c for c in cls.__mro__ if "__dataclass_fields__" in vars(c))  # a subclass may only register it elsewhere
    hints: dict[str, Any] = typing.get_type_hints(cls, include_extras=True)
    in_yaml = getattr(cls, "yaml_words", False)
    found: list[SettingSpec] = []
    for field in dataclasses.fields(cls):
        hint: Any = hints[field.name]
        spec = field.metadata.get("setting")
        if in_yaml and isinstance(hint, type) and DeclaredSettings in hint.__mro__:
            found += list_settings(hint, f"{field.name}.")
        elif not in_yaml or spec is not None:  # the others are a method's or a task's own, which another class declares
            default = field.default_factory() if callable(field.default_factory) else field.default
            required = default is dataclasses.MISSING
            said: dict[str, Any] = {"type": hint, "default": None if required else default, "required": required}
            spec = spec or SettingSpec(in_recipe=False)
            spec = dataclasses.replace(spec, path=f"{prefix}{field.name}", in_yaml=in_yaml, **said)
            found.append(spec if spec.flag else dataclasses.replace(spec, flag=f"--{field.name.replace('_', '-')}"))
    return tuple(found)


def map_settings_by_name(settings_class: Any) -> dict[str, SettingSpec]:
    """Return the settings of a section, a method or a task that a recipe may set, by their names and short names."""
    settings = {s.name: s for s in list_settings(settings_class) if s.in_recipe}
    return settings | {short: settings[name] for short, name in settings_class.short_names.items()}


def read_section_and_errors(
    specs: Mapping[str, SettingSpec | None], tree: Mapping[str, Any], section: str, all_paths: Sequence[str] = ()
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the values of a recipe's section by full name, and every error in it.

    Args:
        specs: the settings that the section has, by their names and short names; None: the name is only suggested.
        tree: what the recipe says.
        section: its name; empty: the recipe itself.
        all_paths: dotted paths of all settings, for suggestions.
    """
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    seen: set[str] = set()
    for name, value in tree.items():
        path = f"{section}.{name}" if section else str(name)
        if (spec := specs.get(name)) is None:
            elsewhere = [p for p in all_paths if p.rpartition(".")[2] == name]
            near = f"; did you mean {elsewhere[-1]!r}?" if elsewhere else ""
            near = near or (suggest(name, specs) if len(errors) < MOST_ERRORS else "")
            errors.append(FieldError(path, f"no such field{near}", "" if near else f"one of {format_names(specs, 40)}"))
        elif spec.name in seen:
            errors.append(FieldError(path, f"given twice, also as {spec.name} or its short name"))
        else:
            seen.add(spec.name)
            values[spec.name] = spec.read(value)
            if (error := spec.find_error(values[spec.name])) is not None:
                errors.append(error.within(section) if section else error)
                del values[spec.name]
    return values, errors


def _describe_bounds(bounds: Mapping[str, float]) -> str:
    words = [(_BOUNDS[name][0], bound) for name, bound in bounds.items() if math.isfinite(bound)]
    return " and ".join(f"{word} {bound if abs(bound) < 1e15 else f'{bound:g}'}" for word, bound in words)
