"""What every command shares: how results and exceptions become output and an exit code.

A command returns its result as a dataclass or a mapping. With `--json` it is printed as the one JSON object on stdout,
and all other output goes to stderr; without `--json` the command prints it for people. An exception becomes one message
on stderr and, with `--json`, the object `{"error": {...}}`.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text
from rich.theme import Theme
from typer import Abort, Argument, BadParameter, Option
from typer.core import TyperGroup

from ..core.foundation.files import convert_os_error, to_json
from ..core.foundation.formatting import escape_control_characters
from ..core.foundation.progress_bars import displaying_progress, live_consoles
from ..diagnostics.knowledge import infer_error_code
from ..errors import RunError, SlimtuneError, UsageError, exception_chain, format_install_command, is_out_of_memory

Json = Annotated[bool, Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


def read_adapter_of_mlx_lm(path: Path | None) -> Path | None:
    """Return a run or adapter folder as it is; of an adapter of mlx-lm, the folder in the cache with PEFT's files."""
    if path is None or not (path / "adapters.safetensors").is_file() or (path / "adapter_model.safetensors").exists():
        return path
    from ..extras.mlx_adapter import get_or_make_peft_folder

    return get_or_make_peft_folder(path, log=print_progress)


Run = Annotated[
    Path,
    Argument(
        metavar="RUN",
        help="A run folder, or an adapter folder.",
        show_default=False,
        callback=read_adapter_of_mlx_lm,
    ),
]
Device = Annotated[str | None, Option(help="Device to run on: auto, cpu, cuda, cuda:N or mps. Default: the run's.")]
ERROR, WARNING, GOOD = "bold red3", "dark_orange3", "green4"
"""Colors that can be read on white and on black; a terminal's own yellow and green cannot."""
INTERRUPTED = 130
SECONDS_BETWEEN_LINES = 10.0
PACKAGES = {"multipart": "python-multipart"}
"""Packages that have another name than their module."""
PACKAGE = Path(__file__).parents[1]
# Typer has a copy of click or uses click itself, depending on its version.
ClickError: Any = BadParameter.__mro__[2]


class NegativeVerdictResult(NamedTuple):
    """Result of a command that ran, with a negative verdict (exit code 1)."""

    result: Any


class CommandGroup(TyperGroup):
    """The commands. Its `main` turns their results and exceptions into output and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that the arguments name, with the flags of its recipe settings, and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        build_command = getattr(getattr(command, "callback", None), "build_command", None)
        if build_command is not None:
            command = build_command(name, getattr(command, "epilog", None))
        if command is not None:
            from .command_help import require_flags_given_once

            require_flags_given_once(command, rest)
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands by group, with their whole first sentences."""
        commands: Any = self.commands
        width = max(map(len, commands))
        for group, members in itertools.groupby(commands.items(), lambda item: item[1].rich_help_panel):
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), c.get_short_help_str(1000)) for name, c in members])

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Run a command and exit: 0 done, 1 the work failed, 2 wrong use, 130 interrupted."""
        args = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in (args[: args.index("--")] if "--" in args else args)
        stdout, code = sys.stdout, 0
        extra.pop("standalone_mode", None)
        try:
            with _print_warnings(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = super().main(args, standalone_mode=False, **extra)
            # Typer returns the code of an Exit, and 130 for Ctrl-C, as an int.
            if result == INTERRUPTED:
                raise KeyboardInterrupt
        except (KeyboardInterrupt, Abort):
            code, result = INTERRUPTED, {"error": {"kind": "Interrupted", "message": "interrupted"}}
            if os.environ.get("RANK", "0") == "0":
                make_error_console().print("interrupted", style="bold")
        except SystemExit:
            raise
        except BaseException as e:
            code, result = _report_error(e)
        if isinstance(result, int):
            sys.exit(result)
        if isinstance(result, NegativeVerdictResult):
            code, result = 1, result.result
        if as_json and result is not None:
            from ..core.foundation.json_results import to_json_dict

            result = to_json_dict(result) if is_dataclass(result) else result
            stdout.write(to_json(result) + "\n")
            stdout.flush()
        sys.exit(code)


def require_installed_packages(command: str, extra: str, modules: Iterable[str]) -> None:
    """Raise UsageError unless what a command imports is installed; nothing is imported.

    Args:
        command: its name.
        extra: the extra of slimtune that brings the packages.
        modules: what it imports of them.
    """
    if missing := [m for m in modules if importlib.util.find_spec(m) is None]:
        message = f"{command} needs {' and '.join(PACKAGES.get(m, m) for m in missing)}, not installed here"
        raise UsageError(message, hint=format_install_command(extra))


def _report_error(error: BaseException) -> tuple[int, dict[str, Any] | None]:
    """Print an exception on stderr; return its exit code and what `--json` prints."""
    known = to_user_error(error)
    if known is None:
        make_error_console().print("".join(traceback.format_exception(error)), end="")
        message = f"a bug in slimtune: {type(error).__name__}: {error}"
        known = SlimtuneError(message, hint=f"please report it with the lines above{_find_address()}")
    if "RANK" in os.environ:
        from ..core.foundation import distributed

        if not distributed.wait_to_claim_printing_new_error(known):
            return known.exit_code, None
    screen = make_error_console()
    screen.print(Text.assemble(("error: ", ERROR), escape_control_characters(known.message)))
    for name in ("expected", "hint"):
        if text := getattr(known, name):
            # A hint may be a command to copy, which a terminal must not get in several lines.
            screen.print(f"  {name}: {text}", soft_wrap=name == "hint" or None)
    code = find_error_page_code(error, known)
    screen.print(f"  more: slimtune explain {code}", soft_wrap=True)
    fields = {name: getattr(known, name) for name in ("message", "expected", "hint", "exit_code")} | {"code": code}
    return known.exit_code, {"error": {"kind": type(known).__name__, **fields}}


def find_error_page_code(error: BaseException, slimtune_error: SlimtuneError) -> str:
    """Return the page for an error: the code that was given where it was raised, else by a foreign cause's text.

    torch, CUDA and the Hub have no codes, so the pages have patterns for their texts. Ours are not searched.
    """
    if slimtune_error.code != type(slimtune_error).code:
        return slimtune_error.code
    start = error.__cause__ or error.__context__ if error is slimtune_error else error
    foreign = [f"{type(e).__name__}: {e}" for e in exception_chain(start)] if start is not None else []
    return infer_error_code("\n".join(foreign), slimtune_error.code) if foreign else slimtune_error.code


def _find_address() -> str:
    """Return where bugs are reported, as the installed package says."""
    try:
        urls = importlib.metadata.metadata("slimtune").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    places = {label.strip().lower(): url.strip() for label, _, url in (line.partition(",") for line in urls)}
    url = next((places[label] for label in ("issues", "bug tracker", "repository") if label in places), "")
    return f" at {url}" if url else ""


def to_user_error(error: BaseException) -> SlimtuneError | None:
    """Return the error to show the user for any exception; None for a bug, which only a developer understands."""
    if isinstance(error, SlimtuneError):
        return error
    if (refused := convert_os_error(error)) is not None:
        return refused
    if is_out_of_memory(error):
        message = f"there is not enough memory: {str(error).strip() or 'an allocation failed'}"
        hint = "a smaller --batch-size or --max-seq-len, --dtype bf16, or --gradient-checkpointing"
        return RunError(message, "memory for the model and a micro-batch", hint, code="system-memory")
    if isinstance(error, ClickError):
        ctx = getattr(error, "ctx", None)
        return UsageError(error.format_message(), hint=f"see `{ctx.command_path} --help`" if ctx is not None else "")
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        start = max(error.start - 40, 0)
        text = ascii(error.object[start : error.end + 40])
        return UsageError(f"a name or text is no UTF-8: {text}", "UTF-8", "rename the file, or save it as UTF-8")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return UsageError("a path contains a NUL character", "a path without it")
    return None


@contextlib.contextmanager
def _print_warnings() -> Iterator[None]:
    """Print warnings of this package as one line, without file and line number."""
    with warnings.catch_warnings():
        default, shown = warnings.showwarning, set()

        def show(message: Any, category: Any, filename: str, *rest: Any) -> None:
            if Path(filename).is_relative_to(PACKAGE):
                if str(message) not in shown:  # a recipe is read several times
                    make_error_console().print(escape_control_characters(f"warning: {message}"), style=WARNING)
                shown.add(str(message))
            else:
                default(message, category, filename, *rest)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


class ControlEscapingConsole(Console):
    """A console that writes control characters out: rows, names and messages of others must not steer a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string; rich itself would drop some control characters without a word."""
        return super().render_str(escape_control_characters(text), **options)

    def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
        """Render an object; its segments of text are escaped, its colors are not."""
        for segment in super().render(*args, **options):
            yield segment if segment.control else segment._replace(text=escape_control_characters(segment.text))


def make_console(stderr: bool = False) -> Console:
    """Return a console on the current stdout or stderr. A terminal gets lines of whole words, a pipe long lines."""
    made = ControlEscapingConsole(stderr=stderr, highlight=False, markup=False)
    made.soft_wrap = not made.is_terminal
    return made


def make_error_console() -> Console:
    """Return a console on the current stderr: that of the bar which is shown there, if there is one."""
    return live_consoles[-1] if live_consoles else make_console(stderr=True)


class ConsoleLogHandler(logging.Handler):
    """Prints the messages of loggers without a handler; Python's own prints lines that a terminal cuts within words."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message on stderr."""
        make_error_console().print(escape_control_characters(record.getMessage()))


def print_progress(text: str) -> None:
    """Print a line about the work in progress on stderr."""
    make_error_console().print(escape_control_characters(text), style="dim")


@contextlib.contextmanager
def showing_progress() -> Iterator[None]:
    """Show the progress of the work inside: a bar on a terminal, a line every ten seconds in a pipe or a log file."""
    if not sys.stderr.isatty():
        with displaying_progress(PeriodicProgressPrinter()):
            yield
        return
    what = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))  # cut where it is too long
    columns = (BarColumn(20), CountColumn(), TimeElapsedColumn(), what)
    screen = make_error_console()
    # rich's own are yellow and light green, which cannot be read on white.
    screen.push_theme(Theme({"progress.elapsed": "dim", "progress.download": "dim"}))
    with Progress(*columns, console=screen, transient=True, expand=True) as bars:
        task = bars.add_task("loading", total=None)
        shown = ""

        def display(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown or not done:
                shown = what
                bars.reset(task, description=what, total=total)
            bars.update(task, completed=done)

        live_consoles.append(screen)
        try:
            with displaying_progress(display):
                yield
        finally:
            live_consoles.remove(screen)


class CountColumn(MofNCompleteColumn):
    """Shows how many of how many are done; nothing before the number is known."""

    def render(self, task: Task) -> Text:
        """Render the count of a task."""
        return super().render(task) if task.total is not None else Text()


class PeriodicProgressPrinter:
    """Prints a line when ten seconds have passed since the last one, or since the work began."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print_progress(f"{what}: {done} of {total} ({now - self.start:.0f} s so far)")


def make_table(*columns: str, text_column_indices: Sequence[int] = (), rows: Iterable[Iterable[str]] = ()) -> Table:
    """Return a table. The first column and those in `text_column_indices` are text, which wraps; the others numbers.

    Without any text in `columns`, the headings, no heading is shown. `text_column_indices` counts from 0.
    """
    made = Table(box=None, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        is_text = number in text_column_indices
        made.add_column(
            column, justify="left" if is_text or not number else "right", no_wrap=not is_text, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(escape_control_characters(cell)) for cell in row))
    return made


def print_fields(fields: Iterable[tuple[str, str]], gap: int = 2) -> None:
    """Print labels and values in two columns, `gap` apart; long values wrap, labels never do."""
    screen, rows = make_console(), list(fields)
    indent = max((len(label) for label, _ in rows), default=0) + gap
    for label, value in rows:
        room = max(screen.width - indent, 20)
        lines = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False)
        screen.print(label.ljust(indent) + f"\n{' ' * indent}".join(lines))


def print_outdated_figures_notice(dates: Iterable[str]) -> None:
    """Say how many of the shown figures may be out of date."""
    from ..planning.gpu_specs import MAX_AGE, is_date_outdated

    if old := sum(map(is_date_outdated, dates)):
        make_console().print(
            f"{old} of these figures were checked more than {MAX_AGE} days ago: --sources says when", style=WARNING
        )
