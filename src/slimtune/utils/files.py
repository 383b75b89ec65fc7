"""Writing files whole: a temporary file beside it, fsync, rename. A reader sees the old file or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunError, SlimtuneError
from .formatting import format_bytes


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole.

    Raises:
        RunError: the disk is full; the old file, if any, is untouched and nothing half-written is left.
    """
    data = content.encode() if isinstance(content, str) else content
    with translate_disk_full(path, len(data)):
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


def fsync_tree(folder: Path) -> None:
    """Make a folder written under a temporary name ready to be renamed: readable as others are, and durable."""
    os.chmod(folder, 0o755)
    for file in folder.iterdir():
        if file.is_dir():
            fsync_tree(file)
            continue
        os.chmod(file, 0o644)  # safetensors and mkdtemp leave them to the owner alone
        with file.open("rb") as f:
            os.fsync(f.fileno())
    fsync_folder(folder)


@contextmanager
def atomic_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` if the block ends without an error, and is deleted otherwise.

    Args:
        path: it does not exist yet, or is an empty folder; missing parents are made.
        needed: bytes that will be written, roughly.

    Raises:
        RunError: the disk is full.
    """
    target = path.resolve()
    with translate_disk_full(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            fsync_tree(folder)
            os.replace(folder, target)
            fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def translate_disk_full(
    path: Path, needed: int | None = None, fix: str = "give a folder on another disk"
) -> Iterator[None]:
    """Turn "no space left on device" into a RunError that says how much is free and needed (bytes)."""
    try:
        yield
    except Exception as e:
        if not is_disk_full(e):
            raise
        raise disk_full_error(path, needed, fix) from e


def disk_full_error(path: Path, needed: int | None = None, fix: str = "give a folder on another disk") -> RunError:
    """Return the error for a file or folder that a full disk did not take."""
    free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
    wanted = f"{format_bytes(needed)} free" if needed else "more free space"
    got = f"the disk is full: {path} could not be written ({format_bytes(free)} free)"
    return RunError(got, wanted, f"free some space, or {fix}")


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error comes from a full disk (safetensors says so only in its text, in an error of its own)."""
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, SlimtuneError):
            return False
        if isinstance(step, OSError) and step.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(t in str(step) for t in ("No space left on device", "os error 28", "Disk quota exceeded")):
            return True
        step = step.__cause__ or step.__context__
    return False
