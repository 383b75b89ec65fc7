"""One tree of exceptions. Each says what it got, what it wanted, and how to fix it.

SlimtuneError            exit code 1: what the work found (faulty data, a wrong adapter, no memory, a full disk)
└── UsageError           exit code 2: what the user typed (flags, a recipe, a missing file, targets)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlimtuneError(Exception):
    """The work found a fault.

    Args:
        message: what was found, with its numbers and names, as one sentence.
        expected: what would have been right.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, expected: str = "", hint: str = "") -> None:
        self.message, self.expected, self.hint = message, expected, hint
        super().__init__(
            "\n".join(p for p in (message, expected and f"  expected: {expected}", hint and f"  hint: {hint}") if p)
        )

    def __reduce__(self) -> tuple[type[SlimtuneError], tuple[str, str, str]]:
        """Be the same error after a copy, in another process too."""
        return type(self), (self.message, self.expected, self.hint)


class UsageError(SlimtuneError):
    """What the user typed cannot be carried out."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or its flags hold faults; all of them are named at once."""


class TargetError(UsageError, ValueError):
    """A target, layer index, pattern or module name matches nothing in the model."""


class ConfigError(UsageError, ValueError):
    """A method's setting is out of its range, or unknown."""


class DataError(SlimtuneError):
    """Training data are faulty; the file and the line are named."""


class ModelError(SlimtuneError):
    """A base cannot be loaded, or lacks what the work needs."""


class AdapterError(SlimtuneError):
    """An adapter file does not fit: another base, missing or unexpected keys, wrong shapes, a pickle."""


class RunError(SlimtuneError):
    """A run could not go on: no valid checkpoint, no memory, a full disk."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name nearest to `name`, or `""`."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def format_names(names: Iterable[object], most: int = 12) -> str:
    """Return names as a short readable list: `'a', 'b', … (14 more)`."""
    every = [str(n) for n in names]
    rest = f", … ({len(every) - most} more)" if len(every) > most else ""
    return ", ".join(repr(n) for n in every[:most]) + rest
