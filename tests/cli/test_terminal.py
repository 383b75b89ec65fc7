"""What long commands show on a terminal of 80 columns, read back from a pseudo terminal."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

MESSAGES = ("loading the base", "writing the folder")
PROGRAM = f"""
import time
from slimtune.cli.common import print_progress, showing_progress
from slimtune.core.foundation.progress_bars import track_progress
with showing_progress():
    print_progress({MESSAGES[0]!r})
    time.sleep(0.2)
    print_progress({MESSAGES[1]!r})
    for _ in track_progress(range(3), "texts for the trained adapter"):
        time.sleep(0.1)
"""
TRAINING = """
import time
from pathlib import Path
from types import SimpleNamespace
import torch
from slimtune.cli.common import print_progress
from slimtune.core.training.progress_logger import ProgressLogger
logger = ProgressLogger(SimpleNamespace(log_file=Path("train.log")), torch.device("cpu"))
state = SimpleNamespace(step=0, max_steps=28000, tokens_per_second=123456.0, forgetting_budget=None)
logger.last_loss = 12.635
with logger.track_training(state):
    for state.step in (9, 10, 11):
        logger.update(state, 1e-3)
        print_progress("a warning of the command")
        time.sleep(0.15)
"""


def show_on_terminal(program: str, folder: Path) -> list[str]:
    """Run a program on a terminal of 80 columns; return every line as it stood when the cursor left it."""
    process, terminal = pty.fork()
    if not process:
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            os.environ.pop(name, None)
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-c", program], {**os.environ, "TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    try:
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    except OSError:  # the program has ended
        pass
    assert os.waitpid(process, 0)[1] == 0, shown.decode()
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))


@pytest.fixture
def show(tmp_path) -> Callable[[str], list[str]]:
    return lambda program: show_on_terminal(program, tmp_path)


def test_a_message_is_not_glued_to_the_bar(show):
    lines = show(PROGRAM)
    assert {*MESSAGES} <= {*lines}
    assert any("━" in line and "3/3" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_training_line_fits_with_a_bar(show):
    lines = show(TRAINING)
    steps = [line for line in lines if "/28000" in line]
    assert steps
    assert all(line.startswith("━" * 5) and line.endswith(" left") and len(line) <= 80 for line in steps)
    assert lines.count("a warning of the command") == 3
