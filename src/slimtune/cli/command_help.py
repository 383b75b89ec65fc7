"""What commands have in common beside their results: the look of their help, flags given twice, trust in a base."""

import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..core.foundation.remote_code import allowing_remote_code
from ..errors import UsageError
from ..extras.accepted_changes import accept_changes, parse_accepted_parts

TYPE_WORDS = {
    **dict.fromkeys(("int", "int range"), "INTEGER"), **dict.fromkeys(("float", "float range"), "NUMBER"),
    **dict.fromkeys(("str", "list[str]"), "TEXT"), "path": "PATH",
}  # fmt: skip
"""Placeholders of values by typer's names of their types, as flags of recipe settings have them."""
TrustFlag = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the base.", show_default=False),
]

AcceptFlag = Annotated[
    str | None,
    typer.Option(
        "--accept-changed",
        metavar="PARTS",
        help="What may have changed since the training: weights, config, tokenizer, template, rows; with commas.",
        show_default=False,
    ),
]


class CommandWithOptionGroups(TyperCommand):
    """A command whose help lists its options by group, and whose numbers are finite."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the flags; raise UsageError for one that is NaN or Inf: no comparison would refuse NaN."""
        rest = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            value = ctx.params.get(param.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{param.opts[0]} is {value:g}", "a finite number")
        return rest

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


def refuse_repeated_flags(given_flags: Iterable[str]) -> None:
    """Raise UsageError for a flag that is given twice: one of the two would be ignored."""
    for name, count in Counter(given_flags).items():
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
    refuse_repeated_flags(given)


def add_flags_of_loaded_runs(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add to a command that loads a run what no folder can say itself: that its base's code or changes are fine."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(trust_remote_code: bool = False, accept_changed: str | None = None, **given: Any) -> Any:
        with allowing_remote_code(trust_remote_code), accept_changes(parse_accepted_parts(accept_changed)):
            return command(**given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    flags = [
        inspect.Parameter("trust_remote_code", keyword, default=False, annotation=TrustFlag),
        inspect.Parameter("accept_changed", keyword, default=None, annotation=AcceptFlag),
    ]
    *own, as_json = signature.parameters.values()
    own = [p.replace(kind=keyword) for p in (*own, *flags, as_json)]
    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return run


def build_parameters_later(
    command: Any,
    own: Sequence[inspect.Parameter],
    list_parameters: Callable[[], Sequence[inspect.Parameter]],
    decorate: Callable[..., Any] = lambda command: command,
) -> Any:
    """Give a command its parameters when it runs or shows its help; until then it has its `own` ones.

    `decorate` changes the command that is then built.
    """

    def build_command(name: str, epilog: str | None) -> Any:
        command.__signature__ = inspect.Signature(list_parameters())
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command(name, cls=CommandWithOptionGroups, epilog=epilog)(decorate(command))
        return typer.main.get_command(app)

    command.__signature__, command.build_command = inspect.Signature(own), build_command
    return command
