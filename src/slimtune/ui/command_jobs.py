"""Commands that run: each is a child process `slimtune … --json`, of which the page shows messages and result.

A job lives in the memory of the page's server, so every tab sees the same, and needs no disk. A training also outlives
the server: it has a session of its own, and everything about it is in its run folder.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from ..core.foundation.files import parse_json
from ..errors import UsageError

SLIMTUNE = (sys.executable, "-m", "slimtune")
MAX_OUTPUT = 1 << 25
"""Bytes of a result; the rest is dropped, and the result is damaged."""
MAX_LINES, MAX_LINE = 200, 2000
"""Last messages of a command that are kept, and the characters of each."""

_PATIENCE = 3
"""Seconds in which a command that another one replaces may end by itself."""
_PROGRESS = re.compile(r"(\d+) of (\d+)\b")

State = Literal["running", "done", "negative", "failed", "stopped", "killed"]


class StartedCommand:
    """A command that was started.

    Args:
        kind: what it is for; only one of a kind runs at a time.
        args: of `slimtune`, without `--json`.
        working_folder: where it runs.
        program: `slimtune`.
        subject: the run that it is about.
    """

    def __init__(
        self, kind: str, args: Sequence[str], working_folder: Path, program: Sequence[str], subject: str = ""
    ) -> None:
        self.kind, self.args, self.subject = kind, list(args), subject
        self.started, self.ended = time.time(), 0.0
        self.messages: deque[str] = deque(maxlen=MAX_LINES)
        self._output = bytearray()
        self.stop_requested = False
        # Its own session: Ctrl-C in the page's terminal is for the page, which then decides what to stop.
        self.process = subprocess.Popen(
            [*program, *self.args[:1], "--json", *self.args[1:]],
            cwd=working_folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        readers = [
            threading.Thread(target=self._read_output, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._read_messages, args=(self.process.stderr,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        self._waiter = threading.Thread(target=self._wait, args=(readers,), daemon=True)
        self._waiter.start()

    def _read_output(self, stream: IO[bytes]) -> None:
        with stream:
            while block := stream.read1(1 << 16):  # type: ignore[attr-defined]
                self._output += block[: MAX_OUTPUT - len(self._output)]

    def _read_messages(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(4 * MAX_LINE):
                self.messages.append(line.decode("utf-8", "replace").rstrip()[:MAX_LINE])

    def _wait(self, readers: Sequence[threading.Thread]) -> None:
        self.process.wait()
        for reader in readers:
            reader.join()
        self.ended = time.time()

    @property
    def command(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(["slimtune", *self.args])

    @property
    def progress(self) -> tuple[int, int] | None:
        """How much of what it does now is done, and all of it, as its last message says; None: it does not say."""
        found = _PROGRESS.search(self.messages[-1]) if self.messages else None
        return (int(found[1]), int(found[2])) if found and 0 < int(found[2]) >= int(found[1]) else None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self.ended or time.time()) - self.started

    @property
    def printed(self) -> Mapping[str, Any]:
        """The JSON object that it printed; empty if it printed none."""
        if not self.ended:
            return {}
        try:
            values = parse_json(bytes(self._output))
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def state(self) -> State:
        """What became of it; "negative": it ran, and its verdict is no."""
        code = self.process.returncode
        if not self.ended or code is None:
            return "running"
        if code == 0:
            return "done"
        if code in (-signal.SIGINT, 128 + signal.SIGINT):  # the first one before Python handles signals
            return "stopped"
        if code < 0:
            return "killed"
        if self.stop_requested and not self.printed:  # Ctrl-C while Python starts can end it with 1
            return "stopped"
        return "negative" if code == 1 and self.printed and "error" not in self.printed else "failed"

    @property
    def error(self) -> Mapping[str, str]:
        """What to show if it failed or was killed: `message`, `expected`, `hint`, `code`; else empty."""
        match self.state:
            case "failed" if isinstance(error := self.printed.get("error"), dict):
                return error
            case "failed":
                last = "\n".join([*self.messages][-5:])
                return {"message": f"the command ended with exit code {self.process.returncode}: {last}"}
            case "killed":
                name = signal.Signals(-self.process.returncode).name
                why = (
                    "; the system does so when memory runs out" if name == "SIGKILL" and not self.stop_requested else ""
                )
                return {"message": f"the command was killed by {name}{why}", "hint": "start it again"}
        return {}

    def has_process(self, process: int) -> bool:
        """Return whether a process is the command's own, or one that it started."""
        try:
            return self.process.pid in (process, *(parent.pid for parent in psutil.Process(process).parents()))
        except psutil.Error:
            return False

    def stop(self) -> None:
        """Send it Ctrl-C; a second call kills it."""
        with contextlib.suppress(ProcessLookupError):
            if self.state == "running":
                self.process.send_signal(signal.SIGKILL if self.stop_requested else signal.SIGINT)
        self.stop_requested = True

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended."""
        self._waiter.join(seconds)


class LatestCommandJobs:
    """The last job of each kind."""

    def __init__(self, folder: Path, program: Sequence[str] = SLIMTUNE) -> None:
        self.folder, self.program = folder, program
        self._jobs: dict[str, StartedCommand] = {}
        self._lock = threading.Lock()  # two tabs may start a job at once

    def get(self, kind: str) -> StartedCommand | None:
        """Return the last job of a kind."""
        return self._jobs.get(kind)

    def start(self, kind: str, args: Sequence[str], subject: str = "", in_place: bool = False) -> StartedCommand:
        """Start a command; while another of its kind runs raise UsageError, or, if `in_place`, end that one.

        `in_place` is for commands that write nothing. One with the same arguments goes on.
        """
        with self._lock:
            job = self._jobs.get(kind)
            if in_place and job is not None and job.state == "running":
                if job.args == list(args):
                    return job
                for _ in range(2):  # Ctrl-C, then a kill
                    job.stop()
                    job.wait(_PATIENCE)
            if job is not None and job.state == "running":
                raise UsageError(f"this runs already: {job.command}", "one at a time", "wait until it ends, or stop it")
            job = self._jobs[kind] = StartedCommand(kind, args, self.folder, self.program, subject)
        return job

    def stop_all(self) -> list[StartedCommand]:
        """Stop every job but trainings, which go on by themselves; return those."""
        running = [job for job in self._jobs.values() if job.state == "running"]
        for job in running:
            if job.kind != "train":
                job.stop()
        return [job for job in running if job.kind == "train"]
