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


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_an_attacked_server_answers_the_others(engine: str):
    script = Path(__file__).with_name("fuzz_server.py")
    command = [sys.executable, script, "--engine", engine, "--cases", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
