"""Flags generated from the recipe's settings.

    @add_recipe_flags("model", "train.batch_size")
    def command(settings: dict[str, Any], as_json: Json = False): ...

The flags are built from `config.schema` when the command runs or shows its help, not when the module is imported:
`slimtune --help` does without it.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.foundation.remote_code import allowing_remote_code
from .column_flags import parse_column_flags
from .command_help import build_parameters_later, refuse_repeated_flags

if TYPE_CHECKING:
    from ..core.adapters.config_fields import SettingSpec

PANELS = {
    "model": "Base model", "data": "Data", "task": "Task", "method": "Method", "train": "Training",
    "output_dir": "Output",
}  # fmt: skip
METHOD_FLAGS = {"rank": "rank of the methods that have one", "alpha": "alpha of the methods that have one"}
"""Short names of method settings that have a flag of their own, and their help."""
SET_OPTION = typer.Option("--set", metavar="PATH=VALUE", help="Any setting, such as method.dropout=0.1. Repeatable.")


def add_recipe_flags(*paths: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add flags for settings, and `--set`, to a command, which gets what was given as `settings`: value by dotted path.

    `--set` overrides the flags. Values of the flags are read as YAML, as `--set` reads them, unless they are text.

    Args:
        paths: dotted paths of settings, or names of whole sections.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name != "settings"]

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            flags = {name: given.pop(name) for name in list(given) if name not in signature.parameters}
            settings = _read_settings(flags, paths)
            with allowing_remote_code(settings.get("model.trust_remote_code") is True):
                return command(settings=settings, **given)

        def list_parameters() -> list[inspect.Parameter]:
            flags = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                for name, annotation in _iterate_options(paths)
            ]
            return [*own, *flags]

        return build_parameters_later(run, own, list_parameters)

    return decorate


def _list_flags(paths: Collection[str]) -> list["SettingSpec"]:
    """Return the settings that have a flag; `paths` are dotted paths, or names of whole sections."""
    from ..core.adapters.config_fields import SettingSpec, list_settings
    from ..core.config import Recipe

    flags: list[SettingSpec] = []
    for setting in list_settings(Recipe):
        if setting.path in paths or setting.section in paths:
            flags.append(setting)
            own = METHOD_FLAGS.items() if setting.path == "method.name" else ()
            flags += [SettingSpec(path=f"method.{n}", type=float, flag=f"--{n}", help=text) for n, text in own]
    return flags


def _find_option_type(setting: "SettingSpec") -> tuple[Any, str | None]:
    """Return what typer reads, text unless it is a switch or repeatable, and the placeholder of the value."""
    if bool in setting.kinds:
        return bool, None
    if (origin := typing.get_origin(setting.type)) in (list, dict):
        return list[str], "NAME" if origin is list else "ROLE=COLUMN"
    metavars = {Path: "PATH", str: "NAME" if setting.choices else "TEXT", int: "INTEGER", float: "NUMBER"}
    return str, next((metavar for kind, metavar in metavars.items() if kind in setting.kinds), "NAME")


def _describe_flag(setting: "SettingSpec", metavar: str | None) -> str:
    from ..core.foundation.type_hints import describe_type_hint

    notes = [setting.expected if metavar == "NAME" else setting.limits]
    if typing.get_origin(setting.type) is list:
        item = describe_type_hint(typing.get_args(setting.type)[0], in_yaml=True)
        notes = [item * (item != "text"), "repeatable"]
    if (default := setting.default) not in (None, [], {}):
        notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    noted = "; ".join(filter(None, notes))
    return f"{setting.description[0].upper()}{setting.description[1:]}." + (f" [{noted}]" if noted else "")


def _iterate_options(paths: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield name and type of a command's parameter for each setting; the name is the path with `__` for the dots."""
    for setting in _list_flags(paths):
        kind, metavar = _find_option_type(setting)
        option: Any = typer.Option(
            setting.flag if kind is not bool else f"{setting.flag}/--no-{setting.flag[2:]}",
            help=_describe_flag(setting, metavar),
            metavar=metavar,
            show_default=False,
            rich_help_panel=PANELS[setting.section],
        )
        yield setting.path.replace(".", "__"), Annotated[kind | None, option]
    yield "set_", Annotated[list[str] | None, SET_OPTION]


def _read_settings(given: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Return the values that were given, by dotted path."""
    from ..core.config.recipe_loading import parse_override_path_and_value
    from ..core.foundation.strict_yaml import parse_yaml

    overrides = [parse_override_path_and_value(text) for text in given["set_"] or []]
    refuse_repeated_flags(f"--set {path}" for path, _ in overrides)
    values: dict[str, Any] = {}
    for setting in _list_flags(paths):
        value, (kind, metavar) = given[setting.path.replace(".", "__")], _find_option_type(setting)
        if value is None or value == []:
            continue
        if metavar == "ROLE=COLUMN":
            values |= {f"{setting.path}.{role}": column for role, column in parse_column_flags(value).items()}
        elif kind is not str or (metavar in ("PATH", "TEXT") and value != "null"):
            values[setting.path] = value
        else:
            values[setting.path] = parse_yaml(value, setting.flag)
    return values | dict(overrides)
