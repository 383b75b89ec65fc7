"""The cores of a CPU: how many this process may use, and how libraries use them."""

import os

CPU_SETTINGS = {"GOMP_SPINCOUNT": "8000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Environment of libgomp and oneDNN, which they read when torch is loaded or first multiplies.

A thread that waits at a barrier spins so many rounds and then sleeps: with libgomp's 300,000 it would keep a core from
the other processes that the barrier waits for. Both caches hold compiled products by shape, and each micro-batch has
a length of its own: 15 products of one length are used again in all layers, those of older lengths seldom, yet 1,024 of
them would be kept, 13 MiB more with each step.
"""


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
