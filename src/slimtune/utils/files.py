"""Write files atomically: temporary file, fsync, rename. A reader sees the old file or the new one."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunError, is_disk_full
from .formatting import format_bytes

_OTHER_DISK = "give a folder on another disk"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically.

    Raises:
        RunError: the disk is full; an old file is unchanged and no partial file remains.
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
    """Make a folder and its files durable and readable by others, before it is renamed to its final name."""
    os.chmod(folder, 0o755)
    for file in folder.iterdir():
        if file.is_dir():
            fsync_tree(file)
            continue
        os.chmod(file, 0o644)  # safetensors and mkdtemp create files that only the owner can read
        with file.open("rb") as f:
            os.fsync(f.fileno())
    fsync_folder(folder)


@contextmanager
def atomic_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block ends without an error, and is deleted otherwise.

    Args:
        path: must not exist, or be an empty folder; missing parents are created.
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
def translate_disk_full(path: Path, needed: int | None = None, fix: str = _OTHER_DISK) -> Iterator[None]:
    """Turn "no space left on device" into a RunError that gives the free and the needed bytes."""
    try:
        yield
    except Exception as e:
        if not is_disk_full(e):
            raise
        raise disk_full_error(path, needed, fix) from e


def disk_full_error(path: Path, needed: int | None = None, fix: str = _OTHER_DISK) -> RunError:
    """Return the error for a file or folder that could not be written to a full disk."""
    free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
    return RunError(
        f"the disk is full: {path} could not be written ({format_bytes(free)} free)",
        f"{format_bytes(needed)} free" if needed else "more free space",
        f"free some space, or {fix}",
    )
