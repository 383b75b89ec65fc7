"""A device's memory: how much is free or in use; and a simulated device, for code that chooses kernels by device."""

import contextlib
import ctypes
import functools
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

from .distributed import local_world_size

MMAP_MAX, TOP_PAD, TRIM_THRESHOLD = -4, -2, -1
"""Parameters of glibc's mallopt(3)."""
MALLOC_DEFAULTS = {MMAP_MAX: 1 << 16, TRIM_THRESHOLD: 1 << 17, TOP_PAD: 1 << 17}
_simulated: ContextVar[str | None] = ContextVar("simulated", default=None)
_host: ContextVar[bool] = ContextVar("host", default=False)
_attention: ContextVar[Counter[torch.dtype] | None] = ContextVar("attention", default=None)


@functools.cache
def disable_malloc_trim() -> bool:
    """Let this process keep freed memory for its next use; return whether it does.

    By default glibc returns every large tensor to the system and requests it again: a step of a small model then
    spends a tenth of its time on page faults. The peak is the same; between peaks less is returned. On systems without
    glibc nothing changes.
    """
    return _set_malloc_options({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 1 << 26})


def _set_malloc_options(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, which keeps less
        return False
    return all(mallopt(name, value) == 1 for name, value in options.items())


def count_free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated; the run's processes on a machine share its CPU memory equally."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has reserved and does not use is free as well.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available) // local_world_size()


def get_allocated_or_resident_bytes(device: torch.device) -> int:
    """Return the bytes in use now: allocated on the GPU, or this process's resident memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> None:
    """Let `count_peak_memory` count from now on, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def count_peak_memory(device: torch.device, *, reserved: bool = False) -> int:
    """Return the most bytes in use at once: resident in this process; on a GPU by tensors, or `reserved` by torch."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) if reserved else torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_unused_memory(device: torch.device) -> None:
    """Return memory that this process has and does not use: unreachable objects, the allocator's cache, freed pages.

    On Linux this ends `disable_malloc_trim`: kept pages break into pieces that are too small for a large tensor.
    """
    gc.collect()
    if device.type in ("cuda", "xpu", "mps"):
        torch.get_device_module(device).empty_cache()
    if _set_malloc_options(MALLOC_DEFAULTS):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def simulating_device_for_kernel_choice(device_type: str) -> Iterator[None]:
    """Choose kernels and chunks as on a device of this type ("cpu", "cuda", "mps"), wherever the tensors are."""
    before = _simulated.set(device_type)
    try:
        yield
    finally:
        _simulated.reset(before)


def get_real_or_simulated_device_type(device: torch.device) -> str:
    """Return the kind of a device, or of the simulated one."""
    return _simulated.get() or device.type


def is_device_simulated() -> bool:
    """Return whether a device is simulated: then nothing is computed, and tensors have only shapes."""
    return _simulated.get() is not None


@contextmanager
def counting_allocations_as_host() -> Iterator[None]:
    """Count what is allocated in the `with` as CPU memory when a device is simulated."""
    before = _host.set(True)
    try:
        yield
    finally:
        _host.reset(before)


def is_counting_allocations_as_host() -> bool:
    """Return whether what is allocated now counts as CPU memory."""
    return _host.get()


@contextmanager
def collect_simulated_attention_flops(flops_by_dtype: Counter[torch.dtype]) -> Iterator[None]:
    """Let `add_simulated_attention_flops` add to these floating point operations, by dtype."""
    before = _attention.set(flops_by_dtype)
    try:
        yield
    finally:
        _attention.reset(before)


def add_simulated_attention_flops(dtype: torch.dtype, operations: int) -> None:
    """Count floating point operations that a simulated kernel stands for: nothing runs that could be counted."""
    if (counter := _attention.get()) is not None:
        counter[dtype] += operations
