"""Progress of long work: a loop reports it by `track_progress`, and a command displays it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Display = Callable[[str, int, int], None]
"""Gets what is done (such as "rows"), how many are done, and how many there are."""
live_consoles: list[Any] = []
"""rich's consoles with a bar at the bottom, the innermost last: what another one prints is glued to the bar."""
_displays: list[Display] = []
_names: list[str] = []


def track_progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items, and report how many are done; without a display nothing happens."""
    for number, item in enumerate(items):
        _report(label, number, len(items))
        yield item
    _report(label, len(items), len(items))


@contextmanager
def displaying_progress(display: Display) -> Iterator[None]:
    """Show what `track_progress` reports meanwhile."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)


@contextmanager
def using_progress_prefix(prefix: str) -> Iterator[None]:
    """Put a name before what `track_progress` reports meanwhile: one of several passes over the same rows."""
    _names.append(prefix)
    try:
        yield
    finally:
        _names.pop()


def _report(what: str, done: int, total: int) -> None:
    for display in _displays:
        display(": ".join((*_names, what)), done, total)
