"""A part of `make fuzz`: no damaged input ends in a traceback, a hang, or a wrong result."""

import subprocess
import sys
from pathlib import Path

import pytest
from kinds import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(kind: str):
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run([sys.executable, script, "--kinds", kind, "--cases", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
