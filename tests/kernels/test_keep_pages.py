"""A process that keeps its pages takes them from the system once, and computes as before."""

import subprocess
import sys
from unittest.mock import patch

import pytest

from slimtune.utils.device import disable_malloc_trim

TAKE = """
import resource, sys, torch
from slimtune.utils.device import disable_malloc_trim
if sys.argv[1] == "keeping":
    assert disable_malloc_trim() and disable_malloc_trim()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return float((torch.ones(1 << 22) * 2 + 1).sum())  # three tensors of 16 MiB

step()
before = faults()
assert {step() for _ in range(5)} == {3.0 * (1 << 22)}
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_pages_are_taken_once():
    def taken(how):
        done = subprocess.run([sys.executable, "-c", TAKE, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, given_back = taken("keeping"), taken("plainly")
    assert kept < 500
    assert given_back > 2 * kept + 50  # thousands, or with huge pages a hundred


def test_elsewhere_nothing_is_done():
    with patch("ctypes.CDLL", side_effect=AssertionError("no library is looked for")):
        for platform in ("darwin", "win32"):
            with patch("sys.platform", platform):
                assert disable_malloc_trim.__wrapped__() is False
    with patch("sys.platform", "linux"), patch("ctypes.CDLL", side_effect=OSError("musl")):
        assert disable_malloc_trim.__wrapped__() is False
