"""A process that keeps freed memory requests it from the system once, and computes as before."""

import subprocess
import sys
from unittest.mock import patch

import pytest

from slimtune.utils.device import disable_malloc_trim

PROGRAM = """
import resource, sys, torch
from slimtune.utils.device import disable_malloc_trim
if sys.argv[1] == "keep":
    assert disable_malloc_trim() and disable_malloc_trim()

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return float((torch.ones(1 << 22) * 2 + 1).sum())  # three tensors of 16 MiB

step()
before = page_faults()
assert {step() for _ in range(5)} == {3.0 * (1 << 22)}
print(page_faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_page_faults():
    def count(mode):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, trimmed = count("keep"), count("trim")
    assert kept < 500
    assert trimmed > 2 * kept + 50  # thousands, or with huge pages a hundred


def test_other_platforms():
    with patch("ctypes.CDLL", side_effect=AssertionError("no library may be loaded")):
        for platform in ("darwin", "win32"):
            with patch("sys.platform", platform):
                assert disable_malloc_trim.__wrapped__() is False
    with patch("sys.platform", "linux"), patch("ctypes.CDLL", side_effect=OSError("musl")):
        assert disable_malloc_trim.__wrapped__() is False
