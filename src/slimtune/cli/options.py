"""Flags generated from the recipe's settings.

    @add_recipe_flags("model", "train.batch_size")
    def command(settings: dict[str, Any], as_json: Json = False): ...

The flags are built from `config.schema` when the command runs or shows its help, not when the module is imported:
`slimtune --help` does without it.
"""

import functools
import inspect
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..core.foundation.remote_code import allow_remote_code
from ..errors import UsageError

PANELS = {
    "model": "Base model", "data": "Data", "task": "Task", "method": "Method", "train": "Training",
    "output_dir": "Output",
}  # fmt: skip
TYPE_WORDS = {
    **dict.fromkeys(("int", "int range"), "INTEGER"), **dict.fromkeys(("float", "float range"), "NUMBER"),
    **dict.fromkeys(("str", "list[str]"), "TEXT"), "path": "PATH",
}  # fmt: skip
"""Placeholders of values by typer's names of their types, as flags of recipe settings have them."""
METHOD_FLAGS = {"rank": "rank of the methods that have one", "alpha": "alpha of the methods that have one"}
"""Short names of method settings that have a flag of their own, and their help."""
TrustFlag = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the base.", show_default=False),
]
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
            settings = _read_settings(flags)
            with allow_remote_code(settings.get("model.trust_remote_code") is True):
                return command(settings=settings, **given)

        def build_command(name: str, epilog: str | None) -> Any:
            flags = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                for name, annotation in _iterate_flags(paths)
            ]
            run.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
            app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            app.command(name, cls=CommandWithOptionGroups, epilog=epilog)(run)
            return typer.main.get_command(app)

        run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        run.build_command = build_command  # type: ignore[attr-defined]
        return run

    return decorate


def _refuse_repeated_flags(names: Iterable[str]) -> None:
    """Raise UsageError for a flag that is given twice: one of the two would be ignored."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"{name} is given {'twice' if count == 2 else f'{count} times'}", "once", "leave one out")


def require_flags_given_once(command: Any, args: Sequence[str]) -> None:
    """Raise UsageError if the arguments give a flag twice that takes one value, or a switch both ways."""
    params = {flag: param for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    given, rest = [], iter(args)
    for arg in rest:
        flag, equals, _ = arg.partition("=")
        if arg == "--":
            break
        if (param := params.get(flag)) is None or not flag.startswith("--"):
            continue
        if not param.is_flag and not equals:
            next(rest, None)  # its value may look like a flag
        if not param.multiple:
            given.append(param.opts[0])
    _refuse_repeated_flags(given)


def add_trust_remote_code_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--trust-remote-code` to a command that loads the base of a run: a run folder cannot say so itself."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(trust_remote_code: bool = False, **given: Any) -> Any:
        with allow_remote_code(trust_remote_code):
            return command(**given)

    flag = inspect.Parameter("trust_remote_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=TrustFlag)
    *own, as_json = signature.parameters.values()
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, flag, as_json)]
    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return run


class CommandWithOptionGroups(TyperCommand):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one list of options for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                is_argument = param.param_type_name == "argument"
                fallback = "Arguments" if is_argument else "Options"
                groups.setdefault(getattr(param, "rich_help_panel", None) or fallback, []).append(
                    _reword(*record, is_argument)
                )
        for group, records in sorted(groups.items(), key=lambda item: item[0] == "Options"):  # the others first
            with formatter.section(group):
                formatter.write_dl(records)


def _reword(names: str, text: str, is_argument: bool) -> tuple[str, str]:
    """Return an entry of a help page with words in place of typer's types (`<int range>`) and ranges (`x>=1`)."""
    names = re.sub(r" ?<([^>]*)>", lambda found: "" if is_argument else f" {TYPE_WORDS.get(found[1], found[1])}", names)
    text = re.sub(r"x>=([\d.]+)", r"at least \1", text)
    return names, re.sub(r" +\[", " [", text)


def _iterate_flags(paths: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield name and type of a command's parameter for each setting; the name is the path with `__` for the dots."""
    from ..core.adapters.config_fields import list_settings
    from ..core.config import Recipe

    for setting in list_settings(Recipe):
        section = setting.path.partition(".")[0]
        if setting.path not in paths and section not in paths:
            continue
        kind, metavar = _flag_type(setting.type)
        notes = [setting.expected] if metavar == "NAME" else [setting.limits] if setting.limits else []
        if typing.get_origin(setting.type) is list:
            notes = [setting.item_expected, "repeatable"] if setting.item_expected != "text" else ["repeatable"]
        if setting.default not in (None, [], {}):
            notes.append(f"default: {str(setting.default).lower() if kind is bool else setting.default}")
        option = typer.Option(
            setting.flag if kind is not bool else f"{setting.flag}/--no-{setting.flag[2:]}",
            help=f"{setting.description[0].upper()}{setting.description[1:]}."
            + (f" [{'; '.join(filter(None, notes))}]" if notes else ""),
            metavar=metavar,
            show_default=False,
            rich_help_panel=PANELS[section],
        )
        yield setting.path.replace(".", "__"), Annotated[kind | None, option]
        for name, text in METHOD_FLAGS.items() if setting.path == "method.name" else ():
            flag: Any = typer.Option(
                f"--{name}", help=f"{text.capitalize()}.", metavar="NUMBER", rich_help_panel="Method"
            )
            yield f"method__{name}", Annotated[str | None, flag]
    yield "set_", Annotated[list[str] | None, SET_OPTION]


def _flag_type(annotation: Any) -> tuple[Any, str | None]:
    """Return the type of a flag for typer, text unless it is a switch or repeatable, and its placeholder."""
    repeatable = {list: "NAME", dict: "ROLE=COLUMN"}
    if annotation in (bool, bool | None):
        return bool, None
    if (origin := typing.get_origin(annotation)) in repeatable:
        return list[str], repeatable[origin]
    members = typing.get_args(annotation)
    types = {annotation, *members, *(t for member in members for t in typing.get_args(member))}
    metavars = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "NUMBER"}
    return str, next((metavar for kind, metavar in metavars.items() if kind in types), "NAME")


def _read_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the values that were given, by dotted path."""
    from ..core.adapters.config_fields import list_settings
    from ..core.config import Recipe
    from ..core.config.recipe_loading import parse_override
    from ..core.foundation.strict_yaml import parse_yaml

    overrides = [parse_override(text) for text in flags.pop("set_", None) or []]
    _refuse_repeated_flags(f"--set {path}" for path, _ in overrides)
    known = {s.path: s for s in list_settings(Recipe)}
    values: dict[str, Any] = {}
    for name, value in flags.items():
        path = name.replace("__", ".", 1)
        if value is None or value == []:
            continue
        kind, metavar = _flag_type(known[path].type if path in known else None)
        if metavar == "ROLE=COLUMN":
            for pair in value:
                role, _, column = (part.strip() for part in pair.partition("="))
                if not role or not column:
                    raise UsageError(f"--column got {pair!r}", "role=column", "for example --column messages=dialog")
                values[f"{path}.{role}"] = column
        elif kind is not str or (metavar in ("PATH", "TEXT") and value != "null"):
            values[path] = value
        else:
            values[path] = parse_yaml(value, known[path].flag if path in known else f"--{name.partition('__')[2]}")
    return values | dict(overrides)
