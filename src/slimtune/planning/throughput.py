"""Training speed, energy and cost: a roofline over the traced operators.

An operator takes as long as its arithmetic or its memory traffic, whichever is more, and at least a kernel launch:

    seconds = Σ max(operations / rate of its dtype, bytes / bandwidth, KERNEL_LAUNCH_S)

Real runs take longer. This sum is 0.38 to 0.95 of what published runs took (`UTILIZATION`), from rows of 100 tokens to
8192, 1B to 70B, Apple's M1 to an H100. That is the range of an estimate.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ..core.foundation.dtype_names import dtype_name
from ..errors import UsageError
from .gpu_specs import Gpu, read_table
from .plan_result import Range, Workload, fields_as_dict

UTILIZATION = Range(0.38, 0.95)
"""The roofline's seconds divided by those of published runs (benchmarks/data/pace_points.json), nine in ten of them."""
KERNEL_LAUNCH_S = 8e-6
"""Seconds to launch a kernel from eager PyTorch; it limits rows of a few hundred tokens (LoRA on Qwen 1.8B took 125 ms
a micro-batch at 256 tokens, and no less at 512)."""
POWER_FRACTION = Range(0.6, 1.0)
"""Share of a board's power that it draws in training."""


class Price(NamedTuple):
    """What a GPU costs to rent."""

    card: str
    dollars_per_hour: float
    provider: str
    date: str
    source: str


@dataclass(frozen=True)
class Cost:
    """What a run takes in time, energy and money."""

    hours: Range  # on the GPU
    kwh: Range | None  # of the GPU (of a Mac: of the machine); None if its power is unknown
    rent: Range | None  # dollars; None if no price is known
    power: Range | None  # dollars for electricity; None without a price for it
    prices: tuple[Price, ...] = ()  # of the table, that `rent` is based on

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; ranges as `{"low", "high"}`, prices with their date and source."""
        return fields_as_dict(self, prices=[p._asdict() for p in self.prices])


def estimate_speed(work: Workload, gpu: Gpu) -> Range | None:
    """Return trained tokens a second of a run on a GPU; None if the GPU's rates are unknown.

    Only a measured GPU has a speed for fused attention; for the others it is part of `UTILIZATION`.
    """
    if gpu.measured is not None:
        seconds = gpu.measured.estimate_step_seconds(work)
        return Range(*(end * work.tokens / seconds for end in gpu.measured.training.spread))
    if not gpu.rates:
        return None
    bandwidth = gpu.bandwidth or float("inf")
    seconds = work.optimizer_step_bytes / bandwidth / work.micro_batches
    for (operations, moved, dtype), count in work.operator_counts.items():
        # A dtype that the GPU has no units for runs at the rate of float32.
        rate = gpu.rates.get(dtype_name(dtype)) or gpu.rates["float32"]
        seconds += count * max(operations / rate, moved / bandwidth, KERNEL_LAUNCH_S)
    return Range(UTILIZATION.low * work.tokens / seconds, UTILIZATION.high * work.tokens / seconds)


def estimate_cost(
    speed: Range,
    tokens: int,
    gpu: Gpu,
    *,
    dollars_per_hour: float | None = None,
    dollars_per_kwh: float | None = None,
) -> Cost:
    """Return what training on so many tokens takes.

    Args:
        speed: trained tokens a second.
        tokens: trained in the whole run, over all epochs.
        gpu: where it runs.
        dollars_per_hour: rent of the GPU; None: the lowest and the highest price of the table, if any.
        dollars_per_kwh: price of electricity, for a GPU of one's own.

    Raises:
        UsageError: a price or the number of tokens is not above 0.
    """
    numbers = {"tokens": tokens, "dollars_per_hour": dollars_per_hour, "dollars_per_kwh": dollars_per_kwh}
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise UsageError(f"{name} is {number}", "a number above 0")
    hours = Range(*(tokens / rate / 3600 for rate in reversed(speed)))
    kwh = power = rent = None
    if gpu.watts is not None:
        kwh = Range(*(h * share * gpu.watts / 1000 for h, share in zip(hours, POWER_FRACTION, strict=True)))
        power = None if dollars_per_kwh is None else Range(*(k * dollars_per_kwh for k in kwh))
    known = prices(gpu.name) if dollars_per_hour is None else ()
    hourly = [p.dollars_per_hour for p in known] if dollars_per_hour is None else [dollars_per_hour]
    if hourly:
        rent = Range(hours.low * min(hourly), hours.high * max(hourly))
    return Cost(hours, kwh, rent, power, known)


@cache
def prices(gpu: str = "") -> tuple[Price, ...]:
    """Return the prices of `prices.csv` for a GPU, by its name in `gpus.csv`; for "", all of them."""
    rows = ([*row.values()] for row in read_table("prices.csv"))
    return tuple(Price(name, float(d), *rest) for name, d, *rest in rows if gpu in ("", name))
