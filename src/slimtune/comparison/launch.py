"""Starting a cell's process, watching it, and what became of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CELL = (sys.executable, "-m", f"{__package__}.cell")
"""What a cell's process runs."""
LOOK = 0.2
"""Seconds between looks at a cell that runs."""
PATIENCE = 120.0
"""Seconds in which an interrupted cell may finish its step and write a checkpoint."""


class Ended(NamedTuple):
    """What became of a cell.

    Args:
        fault: why it failed, as one line; "": it did not.
        stopped: whether it was ended because `stop` said so.
        seconds: it took, by the clock.
    """

    fault: str
    stopped: bool
    seconds: float


def launch(
    recipe_file: Path,
    log: Path,
    *,
    full: bool = False,
    trial: bool = False,
    force: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Ended:
    """Run a cell in a process of its own and wait for it.

    Args:
        recipe_file: the cell's recipe.
        log: what the cell says is appended here.
        full: every weight trains.
        trial: no test rows.
        force: train on data that a survey finds faulty.
        stop: asked now and then; True ends the cell at once.

    Raises:
        KeyboardInterrupt: Ctrl-C; the cell was told, and given the time to write a checkpoint.
    """
    flags = [f for f, on in (("--full", full), ("--trial", trial), ("--force", force)) if on]
    began = time.perf_counter()
    with (
        log.open("a") as said,
        # Its stdin stays open for as long as this process lives: the cell ends when it closes. In a session of its own
        # a terminal's Ctrl-C does not reach it, which would come twice otherwise.
        subprocess.Popen(
            [*CELL, str(recipe_file), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            while process.poll() is None:
                if stop is not None and stop():
                    process.kill()
                    process.wait()
                    return Ended("", True, time.perf_counter() - began)
                time.sleep(LOOK)
        except KeyboardInterrupt:
            try:
                process.send_signal(signal.SIGINT)
                process.wait(PATIENCE)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
            raise
        told = process.stdout.read() if process.stdout is not None else ""
    if process.returncode == 130:
        raise KeyboardInterrupt
    return Ended(_fault(process.returncode, told, log), False, time.perf_counter() - began)


def _fault(code: int, told: str, log: Path) -> str:
    if code == 0:
        return ""
    try:
        error = json.loads(told.strip().splitlines()[-1])
        more = [f"{name}: {error[name]}" for name in ("expected", "hint") if error[name]]
        return "; ".join(" ".join(part.split()) for part in (error["message"], *more))
    except (IndexError, ValueError, KeyError):
        killed = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {killed}; {log} holds what it said"
