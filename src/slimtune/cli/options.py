"""Flags generated from the recipe's settings.

    @recipe_flags("model", "train.batch_size")
    def command(settings: dict[str, Any], as_json: Json = False): ...

The flags are built from `config.schema` when the command runs or shows its help, not when the module is imported: the
schema imports pydantic, which would make `slimtune --help` twice as slow.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import UsageError

if TYPE_CHECKING:
    from ..config.schema import Setting

PANELS = {"model": "Base model", "data": "Data", "method": "Method", "train": "Training"}
METHOD_FLAGS = {"rank": "rank of the methods that have one", "alpha": "alpha of the methods that have one"}
"""Short names of method settings that have a flag of their own, and their help."""
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Any setting, such as method.dropout=0.1. Repeatable."),
]


def recipe_flags(*paths: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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
            return command(settings=_read_settings(flags), **given)

        def build_command(name: str) -> Any:
            run.__signature__ = signature.replace(parameters=[*own, *_flag_parameters(paths)])  # type: ignore[attr-defined]
            app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            app.command(name, cls=GroupedCommand)(run)
            return typer.main.get_command(app)

        run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        run.build_command = build_command  # type: ignore[attr-defined]
        return run

    return decorate


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one list of options for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                fallback = "Arguments" if param.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(param, "rich_help_panel", None) or fallback, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def parse_column_map(pairs: Iterable[str]) -> dict[str, str]:
    """Return the column names of `--column role=column` by role.

    Raises:
        UsageError: a pair has no `=`, no role or no column.
    """
    columns = {}
    for pair in pairs:
        role, _, column = (part.strip() for part in pair.partition("="))
        if not role or not column:
            raise UsageError(f"--column got {pair!r}", "role=column", "for example --column messages=dialog")
        columns[role] = column
    return columns


def _selected_settings(paths: Iterable[str]) -> Iterator[Setting]:
    from ..config import Recipe
    from ..config.schema import iterate_settings

    for setting in iterate_settings(Recipe):
        if any(setting.path == path or setting.path.startswith(f"{path}.") for path in paths):
            yield setting


def _flag_parameters(paths: Iterable[str]) -> Iterator[inspect.Parameter]:
    """Yield a parameter for each setting, named by its path with `__` for the dots."""
    for setting in _selected_settings(paths):
        kind, metavar = _flag_type(setting.annotation)
        names = [setting.flag] if kind is not bool else [f"{setting.flag}/--no-{setting.flag[2:]}"]
        help = setting.help[0].upper() + setting.help[1:]
        notes = [setting.expected] if metavar == "NAME" else [setting.limits] if setting.limits else []
        if setting.default not in (None, [], {}):
            notes.append(f"default: {str(setting.default).lower() if kind is bool else setting.default}")
        section = setting.path.partition(".")[0]
        option = typer.Option(
            *names,
            help=f"{help}." + (f" [{'; '.join(notes)}]" if notes else ""),
            metavar=metavar,
            show_default=False,
            rich_help_panel=PANELS.get(section, "Run"),
        )
        yield _parameter(setting.path.replace(".", "__"), Annotated[kind | None, option])
        if setting.path == "method.name":
            for name, text in METHOD_FLAGS.items():
                option = typer.Option(
                    f"--{name}", help=f"{text.capitalize()}.", metavar="NUMBER", rich_help_panel=PANELS["method"]
                )
                yield _parameter(f"method__{name}", Annotated[str | None, option])
    yield _parameter("set_", SetOption)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag_type(annotation: Any) -> tuple[Any, str | None]:
    """Return the type of a flag for typer, text unless it is a switch or repeatable, and its placeholder."""
    if annotation is bool:
        return bool, None
    if typing.get_origin(annotation) is list:
        return list[str], "NAME"
    if typing.get_origin(annotation) is dict:
        return list[str], "ROLE=COLUMN"
    types = {annotation, *typing.get_args(annotation)}
    for known, metavar in ((Path, "PATH"), (str, "TEXT"), (int, "INTEGER"), (float, "NUMBER")):
        if known in types or any(known in typing.get_args(t) for t in types):
            return str, metavar
    return str, "NAME"


def _read_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the values that were given, by dotted path, with old names replaced."""
    from ..config import Recipe
    from ..config.aliases import rename_setting
    from ..config.loading import parse_yaml, read_override
    from ..config.schema import iterate_settings

    overrides = [read_override(text) for text in flags.pop("set_", None) or []]
    known = {s.path: s for s in iterate_settings(Recipe)}
    values: dict[str, Any] = {}
    for name, value in flags.items():
        path = name.replace("__", ".", 1)
        if value is None or value == []:
            continue
        annotation = known[path].annotation if path in known else None
        kind, metavar = _flag_type(annotation)
        if metavar == "ROLE=COLUMN":
            values |= {f"{path}.{role}": column for role, column in parse_column_map(value).items()}
        elif kind is not str or (metavar in ("PATH", "TEXT") and value != "null"):
            values[path] = value
        else:
            values[path] = parse_yaml(value, known[path].flag if path in known else f"--{name.partition('__')[2]}")
    return dict(rename_setting(path, value) for path, value in [*values.items(), *overrides])
