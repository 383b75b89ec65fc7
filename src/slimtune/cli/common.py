"""What every verb shares: results, errors and exit codes, in one place around all of them.

A verb returns its result as a mapping. With `--json` that is printed as the one object on stdout, and whatever else
prints goes to stderr; without it the verb shows it to people. An exception becomes one clear message on stderr, the
exit code of its kind, and with `--json` the object `{"error": {...}}`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ..errors import RunError, SlimtuneError, UsageError
from ..utils.files import disk_full_error, is_disk_full

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or an adapter folder.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Any field of the recipe, for example train.epochs=1. Repeatable."
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="ROLE=COLUMN", help="What the rows call a column, for example messages=dialog. Repeatable."
    ),
]
INTERRUPTED = 130
# Typer carries a copy of click or uses click itself, depending on its version: the class is found through its own.
ClickError = typer.BadParameter.__mro__[2]


class NegativeResult(NamedTuple):
    """What a verb returns whose work is done and whose answer is no: exit code 1, the result printed all the same."""

    result: Any


class CommandGroup(TyperGroup):
    """The verbs, inside the one place that turns results and exceptions into output and an exit code."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Run a verb and exit: 0 done, 1 the work failed, 2 wrong use, 130 interrupted."""
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        as_json = "--json" in options
        out = sys.stdout
        extra.pop("standalone_mode", None)
        try:
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = super().main(given, standalone_mode=False, **extra)
        except (KeyboardInterrupt, typer.Abort):
            result = INTERRUPTED
        except BaseException as e:
            if isinstance(e, SystemExit):
                raise
            sys.exit(_fail(e, as_json, out))
        # Typer hands back the code of an Exit, and 130 for Ctrl-C, as an int.
        if result == INTERRUPTED:
            if os.environ.get("RANK", "0") == "0":
                error_console().print("interrupted", style="bold")
            if as_json:
                _print_json({"error": {"kind": "Interrupted", "message": "interrupted"}}, out)
        if isinstance(result, int):
            sys.exit(result)
        code = 0
        if isinstance(result, NegativeResult):
            result, code = result.result, 1
        if as_json and result is not None:
            _print_json(result, out)
        sys.exit(code)


def to_cli_error(e: BaseException) -> SlimtuneError | None:
    """Return an exception as one the user understands; None for what only a developer can."""
    if isinstance(e, SlimtuneError):
        return e
    text = str(e)
    if is_disk_full(e):
        where = getattr(e, "filename", None)
        return disk_full_error(Path(where) if isinstance(where, str | Path) else Path.cwd() / "the run's files")
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return RunError(
            f"there is not enough memory: {text.strip() or 'an allocation failed'}",
            "room for the model and a micro-batch",
            "a smaller --batch-size or --max-seq-len, --dtype bf16, or --set train.gradient_checkpointing=true",
        )
    if isinstance(e, ClickError):
        context = getattr(e, "ctx", None)
        fix = f"see `{context.command_path} --help`" if context is not None else ""
        return UsageError(e.format_message(), hint=fix)  # type: ignore[attr-defined]
    if isinstance(e, PermissionError):
        return UsageError(
            f"no permission: {e.filename or text}", "a file that may be read, a folder that may be written"
        )
    return None


def parse_column_map(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return what `--column role=column` sets in a recipe.

    Raises:
        UsageError: one of them has no `=`, no role or no column.
    """
    found = {}
    for pair in pairs or ():
        role, _, column = (part.strip() for part in pair.partition("="))
        if not role or not column:
            raise UsageError(f"--column got {pair!r}", "role=column", "for example --column messages=dialog")
        found[f"data.columns.{role}"] = column
    return found


def console() -> Console:
    """Return a console on the stdout of now."""
    return Console(highlight=False, soft_wrap=True)


def error_console() -> Console:
    """Return a console on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def be_quiet() -> None:
    """Let libraries say nothing in this process of a run: the first one lets them."""
    from transformers.utils.logging import disable_progress_bar

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table: the first column holds names, the others values."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=bool(number))
    return made


def _fail(e: BaseException, as_json: bool, out: Any) -> int:
    known = to_cli_error(e)
    if known is None:
        traceback.print_exception(e, file=sys.stderr)
        known = SlimtuneError(
            f"a fault inside slimtune: {type(e).__name__}: {e}", hint="please report it with the lines above"
        )
    if not _ours_to_say(known):
        return known.exit_code
    lines = [Text("error: ", style="bold red") + Text(known.message)]
    lines += [Text(f"  {name}: {text}") for name, text in (("expected", known.expected), ("hint", known.hint)) if text]
    for line in lines:
        error_console().print(line)
    if as_json:
        said = {"kind": type(known).__name__, "message": known.message, "expected": known.expected, "hint": known.hint}
        _print_json({"error": {**said, "exit_code": known.exit_code}}, out)
    if "RANK" in os.environ:
        from ..utils.distributed import mark_error_printed as let_know

        let_know(known)
    return known.exit_code


def _ours_to_say(error: SlimtuneError) -> bool:
    """Return whether this process of a run says the error: what all meet alike is said once."""
    if "RANK" not in os.environ:
        return True
    from ..utils.distributed import should_print_error

    return should_print_error(error)


def _print_json(values: Any, out: Any) -> None:
    from ..run_dir import to_json

    out.write(to_json(values) + "\n")
    out.flush()
