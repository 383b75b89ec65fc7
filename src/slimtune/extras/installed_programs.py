"""Programs on this machine that are asked for facts, such as Ollama."""

import re
import subprocess
from collections.abc import Callable

PATIENCE, NO_ANSWER = 10.0, "gave no answer"
"""Seconds after which a program is ended, and what is said of it then: a driver that hangs holds those that ask it."""


def run_and_get_stdout_stderr_or_hang_note(*command: str) -> str:
    """Return what a program prints on stdout and stderr, or that it hangs; "" if it is not there."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} {NO_ANSWER} in {PATIENCE:g} s"
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def find_ollama_version(program_runner: Callable[..., str] = run_and_get_stdout_stderr_or_hang_note) -> str:
    """Return Ollama's version, "" if it is not installed."""
    version = re.search(r"\d+\.\d+\.\d+\S*", program_runner("ollama", "--version"))
    return version[0] if version else ""
