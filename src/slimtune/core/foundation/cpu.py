"""This machine's CPU: its name and instruction sets, the cores that this process may use, how libraries use them."""

import os
import platform
import re
from pathlib import Path

CPU_SETTINGS = {"GOMP_SPINCOUNT": "8000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Environment of libgomp and oneDNN, which they read when torch is loaded or first multiplies.

A thread that waits at a barrier spins so many rounds and then sleeps: with libgomp's 300,000 it would keep a core from
the other processes that the barrier waits for. Both caches hold compiled products by shape, and each micro-batch has
a length of its own: 15 products of one length are used again in all layers, those of older lengths seldom, yet 1,024 of
them would be kept, 13 MiB more with each step.
"""

_CPUINFO = Path("/proc/cpuinfo")


def read_processor_name() -> str:
    """Return the name of the processor."""
    return _read_cpu_line("model name") or platform.processor() or platform.machine()


def read_linux_cpu_flags_or_none() -> list[str] | None:
    """Return the instruction sets that Linux names; None on other systems."""
    if not _CPUINFO.is_file():
        return None
    return (_read_cpu_line("flags") or _read_cpu_line("Features")).split()


def read_amd_family() -> int:
    """Return the number of the family of a processor by AMD, 25 for Zen 3 and 4; 0 for other makers."""
    if _read_cpu_line("vendor_id") == "AuthenticAMD":
        return int(_read_cpu_line("cpu family") or 0)
    found = re.search(r"Family (\d+) .*AuthenticAMD", platform.processor())  # Windows
    return int(found[1]) if found else 0


def _read_cpu_line(name: str) -> str:
    """Return the value of the first line with this name in /proc/cpuinfo; "" if there is none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def count_usable_cpus() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
