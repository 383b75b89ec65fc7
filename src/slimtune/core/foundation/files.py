"""Files that are written atomically (temporary file, fsync, rename: a reader sees the old file or the new one), JSON,
what is wrong where a disk refuses, and paths of datasets."""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where folders cannot be locked
    fcntl = None  # type: ignore[assignment]

from ...errors import RunError, SlimtuneError, UsageError, find_errno_and_file, is_disk_full
from .formatting import format_bytes
from .json_results import JsonObject, to_plain

_DATASET_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w.-]+))?(:(?P<split>[^/]+))?")
_FILE_NAME = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst|zip|arrow|xlsx?|ya?ml|jinja)$", re.IGNORECASE)
_JSON_TYPES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
DISK_ERRORS = {
    errno.EROFS: ("the file system is read-only", "give a path on a disk that can be written"),
    errno.EFBIG: (
        "the file is larger than its file system or `ulimit -f` allows",
        "raise the limit, or use another disk",
    ),
    errno.EIO: ("the disk reports an input/output error", "check the disk, or use another one"),
    errno.ESTALE: ("the network file system has lost the file", "mount it again, or use another disk"),
    errno.EXDEV: ("it cannot be renamed across file systems", "give a path whose folder is on one disk"),
    errno.EMFILE: ("too many files are open", "raise the limit: ulimit -n"),
    errno.ENFILE: ("too many files are open on this machine", "close some of them"),
    errno.ENOTEMPTY: ("another process wrote files there", "give another path"),
    errno.EEXIST: ("another process wrote it", "give another path"),
    errno.EBUSY: ("another process uses it", "wait, or give another path"),
    errno.ETIMEDOUT: ("the file system does not answer", "try again, or use another disk"),
}
"""What a disk refuses by the number of the error: the cause, and what to do about it. The work failed: exit code 1."""
PATH_ERRORS = {
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.EACCES: ("no permission", "give a file that may be read, or a folder that may be written"),
    errno.EPERM: ("no permission", "give a file that may be read, or a folder that may be written"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("it is a folder, not a file", "give the path of a file"),
    errno.ENXIO: ("it is a device, a pipe or a socket, not a file", "give the path of a file"),
    errno.ENAMETOOLONG: ("the name is too long", "most file systems take names of 255 bytes"),
    errno.ELOOP: ("a link leads in a circle, or out of its folder", "give the path of the file itself"),
}
"""The same for a wrong path. The user can give another one: exit code 2."""


# --- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: a short sentence says what is wrong: no JSON, no UTF-8, a huge integer, deep nesting.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text)
    except json.JSONDecodeError as e:
        line = f"line {e.lineno}, " if "\n" in e.doc else ""
        raise ValueError(f"it is not JSON: {e.msg}, {line}column {e.colno}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8: byte {e.start} is {text[e.start : e.start + 1]!r}") from None
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    except ValueError:  # Python's own limit
        raise ValueError(f"it contains an integer of more than {sys.get_int_max_str_digits()} digits") from None


def read_json_object(file: Path, error_class: type[SlimtuneError] = RunError) -> JsonObject:
    """Return the JSON object in a file; raise `error_class` if the file is damaged."""
    try:
        values = parse_json(read_regular_file(file))
        if not isinstance(values, dict):
            raise ValueError(f"it contains {_JSON_TYPES.get(type(values), 'a number')}")
    except (OSError, ValueError) as e:
        cause = e.strerror if isinstance(e, OSError) else e
        raise error_class(
            f"{file} is damaged: {cause}", "a JSON object", "delete the file, or create it again"
        ) from None
    return values


def write_json(file: Path, values: Any, indent: int | None = 2) -> None:
    """Write values as JSON; the file is replaced atomically. Arguments and errors as `to_json` and `write_atomic`."""
    write_atomic(file, to_json(values, indent) + "\n")


def to_json(values: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return JSON of plain values, results, mappings, lists, paths and scalar tensors; NaN and Inf become null."""
    plain = to_plain(values)
    text = json.dumps(plain, indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False, default=str)
    # Names of files that are no UTF-8 have lone surrogates, which JSON writes as \\udcff.
    return text.encode("utf-8", "backslashreplace").decode()


# --- files and folders -----------------------------------------------------------------------------------------------


def read_regular_file(path: Path) -> bytes:
    """Return the content of a file; raise OSError for a folder, a device or a pipe, whose reading might never end."""
    refuse_non_regular_file(path)
    return path.read_bytes()


def refuse_non_regular_file(path: Path, follow_links: bool = True) -> None:
    """Raise OSError if something exists at `path`, or where it links to, that is no regular file."""
    if not follow_links and path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, "it is a device, a pipe or a socket", str(path))


def require_writable(folder: Path) -> None:
    """Raise the error of `translate_os_errors` unless files can be written into a folder, which need not exist yet."""
    with translate_os_errors(folder):
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(folder)) from e


def write_atomic(path: Path, content: str | bytes | Sequence[bytes | memoryview]) -> None:
    """Write a file atomically: a text, or bytes in one or several parts. A link at `path` is replaced, not its target.

    Raises:
        RunError, UsageError: the disk is full or refuses; an old file is unchanged and no partial file remains.
    """
    # A name that is no UTF-8 becomes \\udcff in a text.
    parts = [content.encode("utf-8", "backslashreplace")] if isinstance(content, str) else content
    parts = [parts] if isinstance(parts, bytes) else parts
    with translate_os_errors(path, sum(map(len, parts))):
        refuse_non_regular_file(path)
        handle, temporary = tempfile.mkstemp(prefix=_temporary_prefix(path), dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.writelines(parts)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _fsync_folder(path: Path) -> None:
    """Make the names in a folder durable, where folders can be opened: not on Windows."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(folder: Path) -> None:
    """Make a folder and its files durable and readable by others, before it is renamed to its final name."""
    os.chmod(folder, 0o755)
    for file in folder.iterdir():
        if file.is_dir():
            _fsync_tree(file)
            continue
        os.chmod(file, 0o644)  # safetensors and mkdtemp create files that only the owner can read
        with file.open("rb") as f:
            os.fsync(f.fileno())
    _fsync_folder(folder)


@contextmanager
def atomic_folder(path: Path, needed_bytes: int = 0, hint: str = "") -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block ends without an error, and is deleted otherwise.

    Args:
        path: must not exist, or be an empty folder; missing parents are created.
        needed_bytes: bytes that will be written, roughly.
        hint: what the user can do about a full disk.

    Raises:
        RunError, UsageError: the disk is full or refuses, or another process writes to the same path.
    """
    target = Path(os.path.realpath(path))
    with translate_os_errors(target, needed_bytes, hint):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        require_disk_space(target, needed_bytes, hint)
        prefix = _temporary_prefix(target)
        for other in target.parent.glob(f"{glob.escape(prefix)}????????"):
            with contextlib.suppress(OSError):  # it ended, or is no folder
                handle = _try_lock(other)
                if handle is None:
                    message = f"another process is writing {target}"
                    raise UsageError(
                        message, "one process for a folder", "wait until it ends, or give another folder", code="resume"
                    )
                os.close(handle)  # a process that was killed left it
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        lock = _try_lock(folder)
        try:
            yield folder
            _fsync_tree(folder)
            os.replace(folder, target)
            _fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def require_disk_space(path: Path, needed_bytes: int, hint: str = "") -> None:
    """Raise RunError unless `needed_bytes` are free in the folder of `path`."""
    if shutil.disk_usage(Path(os.path.realpath(path)).parent).free < needed_bytes:
        raise _disk_full_error(path, needed_bytes, hint)


def _temporary_prefix(path: Path) -> str:
    # Names of files have at most 255 bytes, of which the temporary name adds 10.
    return f".{os.fsencode(path.name)[:240].decode('utf-8', 'ignore')}."


def _try_lock(folder: Path) -> int | None:
    """Return a handle that locks a folder until it is closed; None if another process has locked it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        pass
    return handle


@contextmanager
def translate_os_errors(path: Path, needed_bytes: int | None = None, hint: str = "") -> Iterator[None]:
    """Turn what a full disk, a file system or a wrong path raises into an error that names the file and the cause."""
    try:
        yield
    except SlimtuneError:
        raise
    except Exception as e:
        error = convert_os_error(e, path, needed_bytes, hint)
        if error is None:
            raise
        raise error from e


def convert_os_error(
    error: BaseException, path: Path | None = None, needed_bytes: int | None = None, disk_full_hint: str = ""
) -> SlimtuneError | None:
    """Return the error that says what a file system refused; None if `error` is about something else.

    Args:
        error: what Python, or a library, raised.
        path: what was being written; without it, the file that `error` names.
        needed_bytes: bytes to write.
        disk_full_hint: what the user can do about a full disk.
    """
    if is_disk_full(error):
        name = getattr(error, "filename", None)
        return _disk_full_error(
            path or Path(os.fsdecode(name) if name else Path.cwd() / "a file"), needed_bytes, disk_full_hint
        )
    number, name = find_errno_and_file(error, PATH_ERRORS)
    if (number not in PATH_ERRORS and number not in DISK_ERRORS) or (number in PATH_ERRORS and not (name or path)):
        return None
    written = False
    if path is not None:
        place, parents = path.absolute(), Path(name or path).absolute().parents
        written = place.parent in parents
        if written and place not in parents:
            name = str(path)  # not the temporary name beside it
    cause, hint = (DISK_ERRORS | PATH_ERRORS)[number]
    # Where something is written, a folder that was there has gone: no fault of the user's.
    is_usage = number in PATH_ERRORS and not (written and number == errno.ENOENT)
    message = f"{name or 'a file'}{' cannot be written' if written or not name else ''}: {cause}"
    return (UsageError if is_usage else RunError)(message, hint=hint)


def _disk_full_error(path: Path, needed: int | None = None, fix: str = "") -> RunError:
    """Return the error for a path that could not be written to a full disk, with the free and the needed bytes."""
    free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
    return RunError(
        f"the disk is full: {path} could not be written ({format_bytes(free)} free)",
        f"{format_bytes(needed)} free" if needed else "more free space",
        f"free some space, or {fix or 'give a folder on another disk'}",
        code="disk-full",
    )


def parse_hub_dataset_id_or_none(path: str | Path) -> tuple[str, str | None, str] | None:
    """Return repository, configuration and split if `path` is a Hub dataset `org/name[/config][:split]`.

    Returns None for the path of a file: a path that exists on this disk is never a dataset of the Hub.
    """
    text = str(path)
    found = _DATASET_ID.fullmatch(text)
    # os.path answers False for a name that no file system has, where Path's methods may raise.
    if found is None or os.path.exists(path) or _FILE_NAME.search(text) or os.path.isdir(text.split("/")[0]):
        return None
    return found["name"], found["config"], found["split"] or "train"
