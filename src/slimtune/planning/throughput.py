"""How long a job takes, what it draws and what it costs: a roofline over its traced operators.

An operator takes as long as its arithmetic or its traffic, whichever is more, and no less than it takes to start:

    seconds = Σ max(operations / rate of its dtype, bytes / bandwidth, START)

Nothing runs quite at that pace. Of what published runs took, this sum is 0.38 to 0.95 (`UTILIZATION`), from rows of 100
tokens to 8192, 1B to 70B, Apple's M1 to an H100: that is the band.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from ..errors import UsageError
from .gpus import Gpu
from .result import Range

UTILIZATION = Range(0.38, 0.95)
"""The roofline's seconds over those of published runs (benchmarks/data/pace_points.json); it holds nine in ten."""
KERNEL_LAUNCH_S = 8e-6
"""Seconds to start an operator from eager PyTorch; rows of a few hundred tokens run at that pace (LoRA on Qwen 1.8B
took 125 ms a pass at 256 tokens, and no less at 512)."""
FUSED = 1 / 5
"""Share of the traffic of operators without arithmetic that is left when they are compiled: less than a third, as it
saved 0.25 s of a pass of 1.16 s (torchtune, Llama 3.2 3B), where all of that traffic is 0.25 s at full bandwidth."""
POWER_FRACTION = Range(0.6, 1.0)
"""Share of a board's power that it draws in training."""


Work = Mapping[tuple[int, int, torch.dtype], float]


class Price(NamedTuple):
    """What a card is rented for."""

    card: str
    dollars_per_hour: float
    provider: str
    date: str
    source: str


@dataclass(frozen=True)
class Cost:
    """What a job takes in time, energy and money.

    Args:
        hours: on the card.
        kwh: that the card draws (a Mac: all of it); None where its power is not known.
        rent: dollars for renting; None where no price is known.
        power: dollars for electricity; None without a price for it, or where the card's power is not known.
        prices: what `rent` stands on; empty where the price was given.
    """

    hours: Range
    kwh: Range | None
    rent: Range | None
    power: Range | None
    prices: tuple[Price, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; bands as `{"low", "high"}`, prices with their date and source."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["prices"] = [p._asdict() for p in self.prices]
        return {k: v._asdict() if isinstance(v, Range) else v for k, v in values.items()}


def estimate_throughput(
    work: Work,
    card: Gpu,
    tokens: int,
    *,
    compiled: bool = False,
    step_bytes: int = 0,
    passes: int = 1,
    measured_flops: float | None = None,
) -> Range | None:
    """Return trained tokens a second; None where the card's rates are not known and none was measured.

    Args:
        work: how often an operator of (operations, bytes moved, dtype) runs in one pass (`Trace.work`).
        card: what it runs on.
        tokens: trained in one pass.
        compiled: operators without arithmetic are fused (`--compile`).
        step_bytes: moved once in an optimizer step: about twice the optimizer's state, and five times what trains.
        passes: in an optimizer step.
        measured_flops: operations a second that a large matrix product reached on this machine, in the job's dtype; it
            stands in for a card's rates, and the band then goes up to 1.

    Raises:
        UsageError: a number that is out of its range.
    """
    _positive(tokens=tokens, passes=passes, measured_flops=measured_flops)
    if measured_flops is None and not card.rates:
        return None
    bandwidth = card.bandwidth or float("inf")
    seconds = step_bytes / bandwidth / passes
    for (operations, moved, dtype), times in work.items():
        fused = compiled and not operations
        arithmetic = operations / (measured_flops or _rate(card, dtype))
        traffic = (FUSED if fused else 1) * moved / bandwidth
        seconds += times * max(arithmetic, traffic, 0 if fused else KERNEL_LAUNCH_S)
    most = UTILIZATION.high if measured_flops is None else 1.0
    return Range(UTILIZATION.low * tokens / seconds, most * tokens / seconds)


def emulated(work: Work, card: Gpu) -> list[str]:
    """Return the dtypes of a job's arithmetic that a card has no units for: they run at the rate of float32."""
    used = {dtype for operations, _, dtype in work if operations}
    return sorted(_name(dtype) for dtype in used if card.rates and _name(dtype) not in card.rates)


def _rate(card: Gpu, dtype: torch.dtype) -> float:
    rates = card.rates or {}
    return rates.get(_name(dtype)) or rates["float32"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def estimate_cost(
    speed: Range,
    tokens: int,
    card: Gpu,
    *,
    dollars_per_hour: float | None = None,
    dollars_per_kwh: float | None = None,
) -> Cost:
    """Return what training so many tokens takes.

    Args:
        speed: trained tokens a second (`pace`).
        tokens: trained in the whole run, every round counted.
        card: what it runs on.
        dollars_per_hour: what the card is rented for; None: the cheapest and the dearest price of the table, if any.
        dollars_per_kwh: of electricity, for a card of one's own.

    Raises:
        UsageError: a number that is not above 0.
    """
    _positive(tokens=tokens, dollars_per_hour=dollars_per_hour, dollars_per_kwh=dollars_per_kwh)
    hours = Range(*(tokens / rate / 3600 for rate in reversed(speed)))
    kwh = None if card.watts is None else _times(hours, Range(*(share * card.watts / 1000 for share in POWER_FRACTION)))
    known = () if dollars_per_hour is not None else prices(card.name)
    asked = [p.dollars_per_hour for p in known] if dollars_per_hour is None else [dollars_per_hour]
    return Cost(
        hours=hours,
        kwh=kwh,
        rent=_times(hours, Range(min(asked), max(asked))) if asked else None,
        power=None if kwh is None or dollars_per_kwh is None else Range(*(k * dollars_per_kwh for k in kwh)),
        prices=known,
    )


@cache
def prices(card: str = "") -> tuple[Price, ...]:
    """Return the table's prices for a card, by its name in `gpus.csv`; for "", all of them."""
    text = (files(__package__) / "prices.csv").read_text(encoding="utf-8")
    rows = [Price(name, float(d), *rest) for name, d, *rest in list(csv.reader(text.splitlines()))[1:]]
    return tuple(p for p in rows if card in ("", p.card))


def _times(a: Range, b: Range) -> Range:
    return Range(a.low * b.low, a.high * b.high)


def _positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise UsageError(f"{name} is {number}", "a number above 0")
