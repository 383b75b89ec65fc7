"""Writing files whole: a temporary file beside it, fsync, rename. A reader sees the old file or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunError
from ..units import bytes_text


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole.

    Raises:
        RunError: the disk is full; the old file, if any, is untouched and nothing half-written is left.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_full_is_an_error(path, len(data)):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_full_is_an_error(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn "no space left on device" into a RunError that says how much is free and needed (bytes)."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
        wanted = f"{bytes_text(needed)} free" if needed else "more free space"
        raise RunError(
            f"the disk is full: {path} could not be written ({bytes_text(free)} free)",
            wanted,
            "free some space, or give a folder on another disk",
        ) from e
