"""A lock for file systems without locks: a file that names its owner, who writes a new number every ten seconds.

    free     ─▶ the file is created; of several processes only one can create it (O_EXCL)
    owned    ─▶ the owner of this machine is asked for; of another machine's, the number is watched for a minute
    stale    ─▶ the file is renamed, compared with what was watched, deleted, and the lock is free

filelock's SoftFileLease does the same, but takes over a stale file only by exchanging two names (RENAME_EXCHANGE),
which NFS and most FUSE file systems cannot: there a killed run could never be resumed. flufl.lock needs hard links and
equal clocks. Nothing here compares the clocks of two machines, and the content is read, not the time, which NFS caches.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import Timeout

from ..core.foundation.files import parse_json, read_regular_file

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_BEATS = 6
"""A number that is read so often, `BEAT_SECONDS` apart, and is still the same, is that of an owner who is gone."""
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM}
"""What a file system answers to a call that it does not have."""


def make_this_writer_record() -> dict[str, Any]:
    """Return what a writer file says of this process: its number, its host, and that it writes from now on."""
    started = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "started": started}


def describe_lock_writer(file: Path) -> str:
    """Return which process a writer file names, and since when it writes; "another process" if it cannot be read."""
    owner = _parse_owner(_read(file) or b"")
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('started')})"


class HeartbeatLock:
    """A lock that is a file with its owner's heartbeat.

    Attributes:
        is_locked: whether this object has the lock.
        is_lost: whether another process has taken the lock over, because this one stood still for a minute.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.is_locked, self.is_lost = file, False, False
        self._token, self._count, self._released = secrets.token_hex(8), 0, threading.Event()
        self._owner = {**make_this_writer_record(), "machine": _identify_process_table(), "token": self._token}

    def acquire(self) -> None:
        """Take the lock; of an owner on another machine it takes a minute to see that he is gone.

        Raises:
            Timeout: another process has it.
            OSError: the file system cannot do it.
        """
        self._delete_stale_file()
        self._create_file()
        try:
            self._beat()
        except OSError:
            self.file.unlink(missing_ok=True)
            raise
        self.is_locked = True
        threading.Thread(target=self._keep_beating, name="heartbeat of the lock", daemon=True).start()

    def release(self) -> None:
        """Delete the file, if this object has the lock."""
        self._released.set()
        if self.is_locked and self._token in str(_read(self.file)):
            self.file.unlink(missing_ok=True)
        self.is_locked = False

    def _create_file(self) -> None:
        try:
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise Timeout(str(self.file)) from None
        with open(handle, "wb") as f:
            f.write(self._format_next())
            f.flush()
            os.fsync(f.fileno())

    def _format_next(self) -> bytes:
        self._count += 1  # of the same length each time, so that a new number replaces the old one whole
        return (json.dumps({**self._owner, "heartbeat": f"{self._count:012}"}) + "\n").encode()

    def _beat(self) -> None:
        """Write the next number into the file if it is this owner's; create the file again if somebody deleted it."""
        try:
            with open(self.file, "r+b") as f:
                if self._token.encode() not in f.read():
                    raise Timeout(str(self.file))
                f.seek(0)
                f.write(self._format_next())
                f.flush()
                os.fsync(f.fileno())
        except FileNotFoundError:
            self._create_file()

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                self._beat()
            except Timeout:
                self.is_lost, self.is_locked = True, False
                return
            except OSError:  # the next one may reach the disk
                continue

    def _delete_stale_file(self) -> None:
        """Delete the file of an owner who is gone; raise Timeout for one who is not."""
        seen = _read(self.file)
        if seen is None or not self._is_stale(seen):
            return
        aside = self.file.with_name(f".{self.file.name}.{self._token}")
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if found != seen:  # another process was faster, and this is its file
            with contextlib.suppress(OSError):
                os.link(aside, self.file)
        aside.unlink(missing_ok=True)
        if found != seen:
            raise Timeout(str(self.file))

    def _is_stale(self, seen: bytes) -> bool:
        """Return whether the owner of a file is gone, False if the file is gone; raise Timeout if he is there."""
        owner = _parse_owner(seen)
        if owner.get("machine") and owner["machine"] == self._owner["machine"]:
            if _is_alive(owner):
                raise Timeout(str(self.file))
            return True
        log.warning(
            "%s may still write %s: watching for %.0f s whether it does",
            describe_lock_writer(self.file), self.file.parent, STALE_BEATS * BEAT_SECONDS,
        )  # fmt: skip
        for _ in range(STALE_BEATS):
            time.sleep(BEAT_SECONDS)
            now = _read(self.file)
            if now is None:
                return False
            if now != seen:
                raise Timeout(str(self.file))
        return True


def _read(file: Path) -> bytes | None:
    try:
        return read_regular_file(file)
    except FileNotFoundError:
        return None


def _parse_owner(content: bytes) -> dict[str, Any]:
    try:
        owner = parse_json(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(owner["process"])
        started = datetime.fromisoformat(owner["started"]).timestamp()
        # Numbers of processes are used again: one that began after the lock was taken is another process.
        return process.create_time() <= started + 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _identify_process_table() -> str:
    """Return what two processes have in common if they see each other's numbers; "" where that cannot be known.

    A host's name does not tell: containers may share it, and have process numbers of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
