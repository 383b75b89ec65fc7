"""Memory of a device: what is free, whether it ran out; and a CPU's pages, kept from step to step or given back."""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import sys

import psutil
import torch

from ..errors import SlimtuneError
from .distributed import local_world_size

_TEXTS = (
    "can't allocate memory",  # torch's allocator on Linux and macOS
    "not enough memory: you tried to allocate",  # on Windows
    "backend out of memory",  # MPS
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS's and cuDNN's own workspaces
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which hides why; seen in bf16 on CPUs as memory ran out
    "could not create a memory object",
    "could not execute a primitive",
    "Cannot allocate memory",  # strerror(ENOMEM), where a library hands on nothing but its text
)
"""What is said where memory ran out and the kind of the error does not tell."""
_MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -4, -2, -1
"""glibc's parameters of mallopt(3)."""
_DEFAULTS = {_MMAP_MAX: 1 << 16, _TRIM_THRESHOLD: 1 << 17, _TOP_PAD: 1 << 17}


@functools.cache
def disable_malloc_trim() -> bool:
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


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; of an unknown kind: of the machine, shared by a run's
    processes on it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds and does not use, it can use again.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available) // local_world_size()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is memory that ran out: a device's or the machine's."""
    step: BaseException | None = error
    seen: set[int] = set()
    while step is not None and id(step) not in seen and not isinstance(step, SlimtuneError):
        seen.add(id(step))
        if isinstance(step, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(step, OSError) and step.errno == errno.ENOMEM:
            return True
        if any(text in str(step) for text in _TEXTS):
            return True
        step = step.__cause__ or step.__context__
    return False


def release_cached_memory(device: torch.device) -> None:
    """Give back what this process holds and does not use: unreachable objects, an allocator's cache, freed pages.

    On Linux `keep_pages` ends with it: kept pages fall into pieces too small for a large tensor, and count as held.
    """
    gc.collect()
    if device.type in ("cuda", "xpu", "mps"):
        torch.get_device_module(device).empty_cache()
    if sys.platform.startswith("linux"):
        try:
            libc = ctypes.CDLL("libc.so.6")
            for name, value in _DEFAULTS.items():
                libc.mallopt(name, value)
            libc.malloc_trim(0)
        except (OSError, AttributeError):  # another C library, which keeps less
            return
