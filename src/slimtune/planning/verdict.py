"""From what tensors take to what a device has to give, and whether it can."""

from __future__ import annotations

from collections.abc import Callable

from .allocator import Allocator
from .extrapolate import extrapolate_layers
from .gpus import Gpu
from .memory_trace import Trace
from .result import Plan, Range, Verdict
from .training_job import TrainingJob

RUNTIME = {"cuda": Range(0.25e9, 0.75e9), "mps": Range(0.2e9, 1.0e9), "cpu": Range(0.45e9, 0.8e9)}
"""Bytes that are no tensors: a CUDA context and loaded kernels; of a process on a CPU, Python and its libraries."""


GAPS = {"cuda": 0.12, "mps": 0.2, "cpu": 0.5}
"""Share of what comes and goes in a step that an allocator may hold beside it, as lengths change from step to step."""
CUBLAS = 2 * 8_519_680
"""cuBLAS keeps a workspace for the thread that goes forwards and one for that which goes backwards; so large each are
ATen's up to compute capability 8.9, 32 MiB beyond."""
WORKSPACES = 64e6
"""Bytes that matrix products may take for themselves."""


def judge_plan(plan: Plan, card: Gpu) -> Verdict:
    """Return whether a plan made for one card runs on another of the same kind of device."""
    return verdict(plan.reserved_bytes, plan.runtime_bytes, Range(*card.usable))


def judge_job(job: TrainingJob, card: Gpu) -> tuple[int, Verdict]:
    """Return a job's peak and whether it runs, from two and three layers."""
    peak, band = allocation(job, extrapolate_layers(job))
    return peak, verdict(band, RUNTIME[job.device], Range(*card.usable))


def allocation(job: TrainingJob, traced: Trace) -> tuple[int, Range]:
    """Return the bytes allocated at most, and what the allocator takes from the device for them."""
    state = sum(traced.state.values())
    if job.device != "cuda" or not traced.events:
        peak = traced.peak + other_bytes(job)
        return peak, memory_range(job, peak, state)
    allocator = Allocator()
    allocator.run(traced.events)
    peak = max(allocator.most_allocated, traced.peak) + other_bytes(job)
    return peak, Range(peak, max(allocator.most_reserved, memory_range(job, peak, state).high))


def other_bytes(job: TrainingJob) -> int:
    """Return the bytes that are allocated beside tensors."""
    return CUBLAS if job.device == "cuda" else 0


def memory_range(job: TrainingJob, peak: int, state: int) -> Range:
    """Return what the allocator may take for a peak above what is always there."""
    # Weights lie once and whole; what comes and goes leaves gaps.
    return Range(peak, peak + GAPS[job.device] * (peak - state) + WORKSPACES)


def scaled(job: TrainingJob, band: Range, was: int, now: int) -> Range:
    """Return the band of another peak of a job, from that of one that was traced."""
    return Range(now, now + (band.high - was) + GAPS[job.device] * max(0, now - was))


def verdict(band: Range, runtime: Range, usable: Range) -> Verdict:
    """Return whether a device that gives `usable` bytes runs what takes `band` and `runtime`."""
    if band.high + runtime.high <= usable.low:
        return "fits"
    return "tight" if band.low + runtime.low <= usable.high else "does not fit"


def largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, 0 where 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
