"""Write files atomically (temporary file, fsync, rename: a reader sees the old file or the new one); dataset paths."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunError, is_disk_full
from .formatting import format_bytes

_DATASET_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w.-]+))?(:(?P<split>[^/]+))?")
_FILE_NAME = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst|zip|arrow|xlsx?|ya?ml|jinja)$", re.IGNORECASE)


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
def atomic_folder(path: Path, needed: int = 0, fix: str = "") -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block ends without an error, and is deleted otherwise.

    Args:
        path: must not exist, or be an empty folder; missing parents are created.
        needed: bytes that will be written, roughly.
        fix: what the user can do about a full disk.

    Raises:
        RunError: the disk is full.
    """
    target = path.resolve()
    with translate_disk_full(target, needed, fix):
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
def translate_disk_full(path: Path, needed: int | None = None, fix: str = "") -> Iterator[None]:
    """Turn "no space left on device" into `disk_full_error`."""
    try:
        yield
    except Exception as e:
        if not is_disk_full(e):
            raise
        raise disk_full_error(path, needed, fix) from e


def disk_full_error(path: Path, needed: int | None = None, fix: str = "") -> RunError:
    """Return the error for a path that could not be written to a full disk, with the free and the needed bytes."""
    free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
    return RunError(
        f"the disk is full: {path} could not be written ({format_bytes(free)} free)",
        f"{format_bytes(needed)} free" if needed else "more free space",
        f"free some space, or {fix or 'give a folder on another disk'}",
    )


def parse_dataset_id(path: str | Path) -> tuple[str, str | None, str] | None:
    """Return repository, configuration and split if `path` is a Hub dataset `org/name[/config][:split]`.

    Returns None for the path of a file: a path that exists on this disk is never a dataset of the Hub.
    """
    text = str(path)
    found = _DATASET_ID.fullmatch(text)
    if found is None or Path(path).exists() or _FILE_NAME.search(text) or Path(text.split("/")[0]).is_dir():
        return None
    return found["name"], found["config"], found["split"] or "train"
