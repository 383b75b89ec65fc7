"""A process that keeps freed memory requests it from the system once, and computes as before."""

import subprocess
import sys
from unittest.mock import patch

import pytest

from slimtune.core.foundation.device import disable_malloc_trim

PROGRAM = """
import resource, sys, torch
from slimtune.core.foundation.device import disable_malloc_trim
if sys.argv[1] == "keep":
    assert disable_malloc_trim() and disable_malloc_trim()

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return float((torch.ones(1 << 22) * 2 + 1).sum())  # three tensors of 16 MiB

counts = []
for _ in range(7):
    before = page_faults()
    assert step() == 3.0 * (1 << 22)
    counts.append(page_faults() - before)
print(sorted(counts)[3])  # the first steps may still request memory: where it is fragmented, one buffer more
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_page_faults():
    def count(mode):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, trimmed = count("keep"), count("trim")
    assert kept < 100
    assert trimmed > 2 * kept + 10  # thousands, or with huge pages two dozen


def test_other_platforms():
    with patch("ctypes.CDLL", side_effect=AssertionError("no library may be loaded")):
        for platform in ("darwin", "win32"):
            with patch("sys.platform", platform):
                assert disable_malloc_trim.__wrapped__() is False
    with patch("sys.platform", "linux"), patch("ctypes.CDLL", side_effect=OSError("musl")):
        assert disable_malloc_trim.__wrapped__() is False
