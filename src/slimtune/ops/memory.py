"""Memory of a device: what is free; and a CPU's pages, kept from step to step."""

from __future__ import annotations

import ctypes
import functools
import sys

import psutil
import torch

from .processes import beside

_MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -4, -2, -1
"""glibc's parameters of mallopt(3)."""


@functools.cache
def keep_pages() -> bool:
    """Let this process keep freed memory for its next use, and return whether it does.

    By default glibc gives every large tensor back to the system and takes it anew: a step of a small model then
    spends a tenth of its time on tens of thousands of page faults. The peak is the same; in between less is given back.
    Nothing is done on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 1 << 26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; of an unknown kind: of the machine, shared by a run's
    processes on it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds and does not use, it can use again.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available) // beside()
