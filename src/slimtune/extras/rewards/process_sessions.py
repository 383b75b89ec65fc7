"""Ends a process and everything that it has started."""

import os
import signal
import subprocess


def kill_session(process: "subprocess.Popen[str]") -> None:
    """Kill a process that leads a session, and all others in it; return when it has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):  # it has ended, or this is Windows
        process.kill()
    process.wait()
