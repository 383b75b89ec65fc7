"""What a run is doing, as its folder and its process say: so any tab, and a page that was started later, can tell."""

import contextlib
import os
import signal
import socket
from datetime import datetime
from typing import Any, Literal, NamedTuple

import psutil

from ..errors import RunError
from ..run_dir import WRITER_FILE, RunDir
from ..utils.files import read_json, require_regular

State = Literal["training", "done", "stopped", "killed", "elsewhere"]
LOG_BYTES = 1 << 14
"""Bytes at the end of a log that are shown."""
WORDS = {
    "training": "trains",
    "done": "finished",
    "stopped": "stopped before its end",
    "killed": "was killed; what is after its last checkpoint is lost",
    "elsewhere": "trains on another machine, or did when that machine went",
}


class RunStatus(NamedTuple):
    """State of a run, and the process that trains it."""

    state: State
    process: int | None  # of this machine; None if none trains

    @property
    def words(self) -> str:
        """The state, as the end of a sentence."""
        return WORDS[self.state]


def read_status(run: RunDir) -> RunStatus:
    """Return the state of a run."""
    file = run.path / WRITER_FILE
    if file.is_file():
        try:
            writer: dict[str, Any] = read_json(file)
        except RunError:
            writer = {}
        if writer.get("host") not in (None, socket.gethostname()):
            return RunStatus("elsewhere", None)
        if is_training(writer):
            return RunStatus("training", writer["process"])
        return RunStatus("done" if run.result_file.is_file() else "killed", None)
    return RunStatus("done" if run.result_file.is_file() else "stopped", None)


def is_training(writer: dict[str, Any]) -> bool:
    """Return whether the process that a run's writer file names is still the one that wrote it."""
    try:
        process = psutil.Process(writer["process"])
        # Numbers of processes are used again: a later process is another one.
        is_same = process.create_time() <= datetime.fromisoformat(writer["started"]).timestamp() + 1
        return is_same and process.status() != psutil.STATUS_ZOMBIE and "slimtune" in " ".join(process.cmdline())
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def stop_training(run: RunDir) -> bool:
    """Send Ctrl-C to the process that trains a run, which writes a checkpoint; return whether there is one."""
    process = read_status(run).process
    if process is None:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGINT)
    return True


def read_log(run: RunDir) -> list[str]:
    """Return the last lines of a run's log, from its last `LOG_BYTES`."""
    try:
        require_regular(run.log_file, follow_links=False)
        with run.log_file.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - LOG_BYTES))
            lines = f.read(LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > LOG_BYTES else lines
