"""A cell's process: what becomes of it, however it ends. Small scripts stand in for cells."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from slimtune.comparison import launch as launching
from slimtune.comparison.launch import launch


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Return `run(code, **how)`: launch with a script in a cell's place."""

    def run(code: str, **how):
        monkeypatch.setattr(launching, "CELL", (sys.executable, "-c", code))
        return launch(tmp_path / "r.yaml", tmp_path / "log", **how)

    return run


def test_done_and_told_how(script, tmp_path):
    code = "import sys; print(sys.argv[1:], file=sys.stderr)"
    assert script(code, full=True, trial=True)[:2] == ("", False)
    assert (tmp_path / "log").read_text().strip() == str([str(tmp_path / "r.yaml"), "--full", "--trial"])


def test_an_error_is_one_line(script):
    ended = script("""print('{"message": "no\\\\nrows", "expected": "some", "hint": ""}'); raise SystemExit(1)""")
    assert ended.fault == "no rows; expected: some"


def test_a_death_is_named(script, tmp_path):
    ended = script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.fault == f"its process was killed by signal 9; {tmp_path / 'log'} holds what it said"
    assert script("raise SystemExit(3)").fault.startswith("its process ended with code 3")


def test_stopped(script):
    began = time.monotonic()
    assert script("import time; time.sleep(60)", stop=lambda: time.monotonic() - began > 0.5).stopped
    assert time.monotonic() - began < 30


def test_an_interruption_is_passed_on_and_waited_for(script, tmp_path):
    code = f"""
import pathlib, time
try:
    pathlib.Path({str(tmp_path / "up")!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "checkpoint")!r}).touch()
    raise SystemExit(130)
"""

    def stop() -> bool:
        if (tmp_path / "up").exists():
            raise KeyboardInterrupt  # as the parent gets it
        return False

    with pytest.raises(KeyboardInterrupt):
        script(code, stop=stop)
    assert (tmp_path / "checkpoint").exists()


def test_a_cell_ends_with_its_parent():
    code = "import slimtune.comparison.worker as c; c._end_with_the_parent()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1
