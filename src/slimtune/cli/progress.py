"""Progress on stderr: a bar on a terminal, a line every ten seconds in a pipe or a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.theme import Theme

from ..utils.progress import display_progress
from .common import error_console, print_progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress() -> Iterator[None]:
    """Show the progress of the work inside."""
    if not sys.stderr.isatty():
        with display_progress(LinePrinter()):
            yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = error_console()
    # rich's own are yellow and light green, which cannot be read on white.
    screen.push_theme(Theme({"progress.elapsed": "dim", "progress.download": "dim"}))
    with Progress(*columns, console=screen, transient=True) as bars:
        task = bars.add_task("", total=None)
        shown = ""

        def display(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown or not done:
                shown = what
                bars.reset(task, description=what, total=total)
            bars.update(task, completed=done)

        with display_progress(display):
            yield


class LinePrinter:
    """Prints a line when ten seconds have passed since the last one, or since the work began."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print_progress(f"{what}: {done} of {total} ({now - self.start:.0f} s so far)")
