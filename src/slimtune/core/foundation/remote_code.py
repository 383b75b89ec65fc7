"""Whether the Python code that comes with a base may run.

The user says so for one command, by `--trust-remote-code`, or in Python by an argument. A file cannot: recipes and run
folders come from other people, together with the base whose code would run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_allowed = ContextVar("remote_code_allowed", default=False)


@contextmanager
def allowing_remote_code(condition: bool = True) -> Iterator[None]:
    """Let bases that are loaded in the block run code of their own; with `condition` false nothing changes."""
    token = _allowed.set(condition or _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(token)


def remote_code_allowed() -> bool:
    """Return whether a base may run code of its own although the call that loads it does not say so."""
    return _allowed.get()
