"""One writer per folder: a lock of the operating system, else one with a heartbeat, else none, and the user is told."""

import logging
import os
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # on Windows, where FileLock has another way
    fcntl = None  # type: ignore[assignment]

from ..core.foundation.files import write_json
from ..core.training.run_dir import LOCK_FILE, WRITER_FILE, RunDir
from ..errors import RunError, UsageError
from .heartbeat_lock import UNSUPPORTED, HeartbeatLock, describe_lock_writer, make_this_writer_record

log = logging.getLogger(__name__)


class FolderLock:
    """The lock of a folder, which must exist.

    `.lock` is locked, and stays: whoever deleted it could let two processes lock two files of that name. The operating
    system releases it when the process ends. Where the file system has no locks, `.writer.json` has a heartbeat.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / LOCK_FILE
        self._lock = FileLock(self._file)
        self._heartbeat = HeartbeatLock(folder / WRITER_FILE)
        self._opened: BinaryIO | None = None  # `.lock`: who has it open is the one that trains (ui/run_pages.py)

    def acquire(self) -> None:
        """Take the lock; raise Timeout if another process has it."""
        if not _lacks_locks(self._file):
            self._lock.acquire(timeout=0)
            return
        try:
            self._heartbeat.acquire()
        except OSError as error:
            if error.errno not in UNSUPPORTED:  # Timeout has no number
                raise
            log.warning(
                "the file system of %s has no locks (%s): nothing keeps a second process from writing there",
                self.folder, error.strerror,
            )  # fmt: skip
        self._opened = self._file.open("rb")

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        self._lock.release()
        self._heartbeat.release()
        if self._opened is not None:
            self._opened.close()


class RunLock(FolderLock):
    """The lock of a run folder; `.writer.json` says which process has it."""

    def __init__(self, run: RunDir) -> None:
        super().__init__(run.path)
        self._writer = run.path / WRITER_FILE

    def acquire(self) -> None:
        """Take the lock; raise UsageError, which names the process, if another one has it."""
        try:
            super().acquire()
        except Timeout:
            raise UsageError(
                f"{describe_lock_writer(self._writer)} is training in {self.folder}",
                "one process that writes a run folder",
                "wait until it has ended, or stop it with Ctrl-C or SIGTERM, which write a checkpoint; then --resume",
            ) from None
        if not self._heartbeat.is_locked:
            write_json(self._writer, make_this_writer_record())

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self._lock.is_locked:
            self._writer.unlink(missing_ok=True)
        super().release()

    def require_held(self) -> None:
        """Raise RunError if another process has taken the run folder over while this one stood still."""
        if self._heartbeat.is_lost:
            raise RunError(
                f"{describe_lock_writer(self._writer)} has taken over {self.folder}, because this process stood still",
                "one process that writes a run folder",
                "let the other one go on",
            )


def _lacks_locks(file: Path) -> bool:
    """Return whether a file's file system has no locks; creates the file. Other errors are left to who locks it."""
    if fcntl is None:
        return False
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in UNSUPPORTED
    finally:
        os.close(handle)
    return False
