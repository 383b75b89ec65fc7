"""The exceptions, and what an exception chain says about memory and disk.

SlimtuneError            exit code 1: the work failed (faulty data, a wrong adapter, no memory, a full disk)
└── UsageError           exit code 2: the user's input is wrong (flags, a recipe, a missing file, targets)

Each class has a code, which `slimtune explain CODE` explains; whoever raises one can give a more precise code, and the
field (a setting's dotted path, a column) that is wrong. No decision is taken from the wording of a message.

What PEFT raises as ValueError, TypeError or NotImplementedError is also of that kind here, so that code written for
PEFT catches it.
"""

import difflib
import errno
import os
import re
from collections.abc import Container, Iterable, Iterator
from typing import Any


class SlimtuneError(Exception):
    """The work failed.

    Attributes:
        message: what is wrong.
        expected: what would be right.
        hint: what to do about it.
        field: the setting or column that is wrong, "train.epochs"; None: the error is not about one field.
        code: the page of `slimtune explain`, the class's own by default.
    """

    exit_code = 1
    code = "internal-error"

    def __init__(
        self, message: str, expected: str = "", hint: str = "", *, field: str | None = None, code: str | None = None
    ) -> None:
        self.message, self.expected, self.hint, self.field = message, expected, hint, field
        self.code = code or type(self).code
        lines = (message, expected and f"  expected: {expected}", hint and f"  hint: {hint}")
        super().__init__("\n".join(filter(None, lines)))

    def __reduce__(self) -> Any:
        # Exception would pickle only the joined text.
        return _unpickle_error, (type(self), self.message, self.expected, self.hint, self.field, self.code)


def _unpickle_error(
    kind: type[SlimtuneError], message: str, expected: str, hint: str, field: str | None, code: str
) -> SlimtuneError:
    return kind(message, expected, hint, field=field, code=code)


def format_install_command(extra: str) -> str:
    """Return the command that adds an extra to the installed slimtune.

    slimtune is not on PyPI: pip keeps the installed one and fetches what the extra adds.
    """
    return f"pip install 'slimtune[{extra}]'"


class UsageError(SlimtuneError, ValueError):
    """The user's input cannot be carried out."""

    exit_code = 2
    code = "wrong-use"


class RecipeError(UsageError):
    """A recipe or its flags have errors; the message names all of them."""

    code = "recipe-error"


class TargetError(UsageError):
    """A target, layer index, pattern or module name matches nothing in the model."""

    code = "unknown-target"


class UnsupportedTargetError(TargetError, NotImplementedError):
    """A method cannot adapt such a module."""

    code = "unsupported-target"


class ConfigError(UsageError):
    """A method's setting is out of range or unknown."""

    code = "method-setting"


class UnknownOrMissingFieldError(ConfigError, TypeError):
    """A config has no such field, or a file lacks a required one."""


class DataError(SlimtuneError):
    """Training data are faulty; the message names file and line."""

    code = "data-error"


class ModelError(SlimtuneError):
    """A base cannot be loaded, or lacks what the work needs."""

    code = "model-error"


class AdapterError(SlimtuneError, ValueError, RuntimeError):
    """An adapter file does not fit: another base, missing or unexpected keys, wrong shapes, a pickle."""

    code = "adapter-error"


class RunError(SlimtuneError):
    """A run cannot go on: no valid checkpoint, no memory, a full disk."""

    code = "run-error"


class MixedBatchError(UsageError, TypeError):
    """A module cannot run a batch whose rows use different adapters."""


class PeftWarning(UserWarning):
    """Something that works but is probably not what was meant; PEFT's name for such warnings."""


PeftError, NoMatchingPeftModuleError = SlimtuneError, TargetError
"""PEFT's names of these exceptions."""


def suggest(name: object, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name nearest to `name`, or `""`."""
    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def format_names(names: Iterable[object], most: int = 12) -> str:
    """Return names as a short readable list: `'a', 'b', … (14 more)`."""
    every = [repr(str(n)) for n in names]
    rest = f"… ({len(every) - most} more)"
    if len(", ".join(every[most:])) <= len(rest):  # as short as the count, or empty
        return ", ".join(every)
    return ", ".join([*every[:most], rest])


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, outermost first, up to a SlimtuneError, which explains its own cause."""
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen and not isinstance(step, SlimtuneError):
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # torch's allocator on Linux and macOS
    "not enough memory: you tried to allocate",  # on Windows
    "backend out of memory",  # MPS
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS's and cuDNN's own workspaces
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which hides the reason; seen in bf16 on CPUs without free memory
    "could not create a memory object",
    "could not execute a primitive",
    "Cannot allocate memory",  # strerror(ENOMEM), where a library passes on only its text
)
"""Substrings of out-of-memory messages that are raised as plain RuntimeError."""
DISK_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded")  # safetensors gives only a text


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, means that a device or the CPU has no memory left."""
    kinds = ("MemoryError", "OutOfMemoryError")  # the second is torch's, which this module does not import
    return _chain_says(error, (errno.ENOMEM,), OUT_OF_MEMORY_TEXTS, kinds)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, means that the disk is full."""
    return _chain_says(error, (errno.ENOSPC, errno.EDQUOT), DISK_FULL_TEXTS)


def find_errno_and_file(error: BaseException, only_direct_errnos: Container[int] = ()) -> tuple[int | None, str | None]:
    """Return number and file name of the OSError in an exception or its causes; None where there is none.

    Libraries in Rust give the number only in a text. One of `only_direct_errnos` counts only for the exception itself:
    a file that is missing may have been handled, and what was raised then is another fault.
    """
    for e in exception_chain(error):
        found = re.search(r"\(os error (\d+)\)", str(e))
        number = e.errno if isinstance(e, OSError) else int(found[1]) if found else None
        if str(e).startswith("Symlink loop"):  # pathlib's RuntimeError
            number = errno.ELOOP
        if number is not None and (e is error or number not in only_direct_errnos):
            name = getattr(e, "filename", None)
            return number, os.fsdecode(name) if isinstance(name, str | bytes) else None
    return None, None


def _chain_says(
    error: BaseException, codes: tuple[int, ...], texts: tuple[str, ...], kinds: tuple[str, ...] = ()
) -> bool:
    return any(
        (isinstance(e, OSError) and e.errno in codes)
        or any(kind.__name__ in kinds for kind in type(e).__mro__)
        or any(text in str(e) for text in texts)
        for e in exception_chain(error)
    )
