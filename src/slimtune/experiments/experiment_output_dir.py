"""The folder of a comparison or a search: it records what it holds, so that only the same command continues in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from ..core.foundation.files import parse_json, read_json_object, require_writable, to_json, write_json
from ..core.foundation.json_results import JsonObject
from ..core.training.run_dir import LOCK_FILE, WRITER_FILE
from ..errors import UsageError, format_names
from ..extras.run_lock import FolderLock

SETTINGS_FILE = "settings.json"
COMMANDS = {"comparison": "compare", "search": "tune"}
"""What a folder holds, and the command that works in it."""


def require_same_settings_and_merge_methods(folder: Path, settings: Mapping[str, Any], experiment: str) -> JsonObject:
    """Check that a folder is new or holds the same work, and return the settings to record in it; write nothing.

    Args:
        folder: of the work.
        settings: what determines its results. Those of single `methods` may be added later, so only those that both
            have must agree; the others are kept.
        experiment: a key of `COMMANDS`, for messages.
    """
    other = "give another --out"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "a folder", other)
    require_writable(folder)
    current: JsonObject = parse_json(to_json(settings))
    if not (folder / SETTINGS_FILE).is_file():
        if content := sorted(p.name for p in folder.glob("*") if p.name not in (LOCK_FILE, WRITER_FILE)):
            message = f"{folder} contains {format_names(content)}, which belongs to no {experiment}"
            raise UsageError(message, f"an empty or new folder, or the folder of a {experiment} to resume", other)
        return current
    recorded = read_json_object(folder / SETTINGS_FILE)
    methods, added = recorded.get("methods", {}), current.get("methods", {})
    shared = methods.keys() & added.keys()
    before, now = ({**s, "methods": {k: s.get("methods", {})[k] for k in shared}} for s in (recorded, current))
    if differences := _list_differences(before, now):
        message = f"{folder} holds another {experiment}: {'; '.join(differences[:8])}"
        more = "; methods and seeds may be added" if added else ""
        raise UsageError(message, f"the command that started it{more}", other)
    return {**current, "methods": {**methods, **added}} if methods else current


@contextmanager
def lock_output_dir_and_write_settings(folder: Path, settings: Mapping[str, Any], experiment: str) -> Iterator[None]:
    """Lock an output folder while the block runs, and write the settings into it, after checking it as above.

    Raises:
        UsageError: another process works in the folder.
    """
    require_same_settings_and_merge_methods(folder, settings, experiment)  # before the folder is made
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"another slimtune {COMMANDS[experiment]} works in {folder}", "one at a time") from None
    try:
        write_json(folder / SETTINGS_FILE, require_same_settings_and_merge_methods(folder, settings, experiment))
        yield
    finally:
        lock.release()


def _list_differences(recorded: Any, current: Any, path: str = "") -> list[str]:
    """Return what differs between two trees, each as `train.batch_size: 8 before, 4 now`."""
    if not (isinstance(recorded, Mapping) and isinstance(current, Mapping)):
        return [] if recorded == current else [f"{path}: {recorded!r} before, {current!r} now"]
    # A recipe field that was not recorded is new in this version; the recorded run used its default.
    keys = list(recorded) if path in ("model", "data", "train") else list(dict.fromkeys([*recorded, *current]))
    differences: list[str] = []
    for key in keys:
        differences += _list_differences(recorded.get(key), current.get(key), f"{path}.{key}" if path else key)
    return differences
