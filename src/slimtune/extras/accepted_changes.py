"""Which parts of what an adapter was trained on may have changed: the user says so for one command. No torch here.

The parts are those of `TrainingFingerprint` (training_fingerprint.py), which compares them.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import UsageError, format_names, suggest

BASE_PARTS = ("weights", "config", "tokenizer", "template")
PARTS = (*BASE_PARTS, "rows", "recipe")
_accepted: ContextVar[frozenset[str]] = ContextVar("accepted_changes", default=frozenset())


def parse_accepted_parts(text: str | None) -> list[str]:
    """Return the names in the value of `--accept-changed`; raise UsageError for an unknown one."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    _require_known_parts(names)
    return names


@contextmanager
def accept_changes(parts: Collection[str]) -> Iterator[None]:
    """Let these parts differ where adapters are loaded in the block."""
    token = _accepted.set(combine_with_accepted_changes(parts))
    try:
        yield
    finally:
        _accepted.reset(token)


def combine_with_accepted_changes(parts: Collection[str]) -> frozenset[str]:
    """Return these parts and those of `accept_changes`; raise UsageError for an unknown one."""
    _require_known_parts(parts)
    return _accepted.get() | frozenset(parts)


def _require_known_parts(parts: Collection[str]) -> None:
    for name in parts:
        if name not in PARTS:
            message = f"{name!r} is nothing that can be accepted as changed{suggest(name, PARTS)}"
            raise UsageError(message, f"one or more of {format_names(PARTS)}", "--accept-changed weights,config")
