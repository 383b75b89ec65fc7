"""One writer per run folder: a lock that the operating system releases when the process ends, even by SIGKILL.

`.lock` is locked, and stays: whoever deleted it could let two processes lock two files of that name. `.writer.json`
says which process has the lock.
"""

import os
import socket
from datetime import datetime
from typing import Any

from filelock import FileLock, Timeout

from ..errors import RunError, UsageError
from ..run_dir import LOCK_FILE, WRITER_FILE, RunDir
from ..utils.files import read_json, write_json


class RunLock:
    """The lock of a run folder, which must exist."""

    def __init__(self, run: RunDir) -> None:
        self.run, self._writer = run, run.path / WRITER_FILE
        self._lock = FileLock(run.path / LOCK_FILE)

    def acquire(self) -> None:
        """Take the lock; raise UsageError, which names the process, if another one has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self._describe_writer()} is training in {self.run.path}",
                "one process that writes a run folder",
                "wait until it has ended, or stop it with Ctrl-C or SIGTERM, which write a checkpoint; then --resume",
            ) from None
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        write_json(self._writer, {"process": os.getpid(), "host": socket.gethostname(), "started": started})

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self._lock.is_locked:
            self._writer.unlink(missing_ok=True)
            self._lock.release()

    def _describe_writer(self) -> str:
        try:
            writer: dict[str, Any] = read_json(self._writer)
        except RunError:
            return "another process"
        return f"process {writer.get('process')} on {writer.get('host')} (since {writer.get('started')})"
