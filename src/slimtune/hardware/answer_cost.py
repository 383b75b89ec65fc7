"""What a million tokens of answers cost: on a machine of one's own, on a rented one, at services that serve the base.

It imports no torch. Prices of services are in `answer_prices.csv`, which benchmarks/answer_prices.py writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ..planning.gpu_specs import GpuSpec
from ..planning.interval import Interval
from .hardware_results import MILLION
from .machine_choice import BreakEven
from .run_cost import estimate_run_cost, list_rent_prices, read_price_rows


@dataclass(frozen=True)
class AnswerPrice:
    """What a service takes for answers of a base, without an adapter."""

    base: str
    """The base's short name."""
    service: str
    """Who serves it."""
    dollars_read: float
    """Dollars for a million tokens of prompts."""
    dollars_written: float
    """Dollars for a million tokens of answers."""
    date: str
    """Of the price, as 2026-11-10."""
    source: str
    """Where the price was read."""


@dataclass(frozen=True)
class MachineAnswerCost:
    """What a million tokens cost on a machine, one request at a time."""

    name: str
    """Whose machine it is: electricity of one's own, or who rents it out."""
    read: Interval
    """Dollars for a million tokens of prompts."""
    written: Interval
    """Dollars for a million tokens of answers."""


@dataclass(frozen=True)
class AnswerCostResult:
    """What `cost --serve --json` prints."""

    model: str
    """The base."""
    gpu: str
    """The machine's GPU."""
    engine: str
    """That serves it."""
    precision: str
    """Of the served weights."""
    decode: Interval
    """Tokens a second that are written."""
    prefill: Interval
    """Tokens a second of a prompt that are read."""
    evidence: str
    """The kind of evidence of both."""
    dollars: Interval | None
    """Price of the machine; null: not known."""
    machine: list[MachineAnswerCost]
    """The machine bought, then rented."""
    services: list[AnswerPrice]
    """The services, the cheapest first."""
    million_tokens_to_break_even: BreakEven | None
    """Millions of written tokens after which buying costs less than the cheapest service; null: never, or not known."""


@cache
def list_answer_prices(base: str) -> tuple[AnswerPrice, ...]:
    """Return the prices of services for a base, by its short name; the cheapest writer first."""
    rows = (r for r in read_price_rows("answer_prices.csv") if r["base"] == base)
    prices = (
        AnswerPrice(base, r["service"], float(r["dollars_read"]), float(r["dollars_written"]), r["date"], r["source"])
        for r in rows
    )
    return tuple(sorted(prices, key=lambda p: (p.dollars_written, p.dollars_read)))


def list_machine_answer_costs(
    gpu: GpuSpec, decode: Interval, prefill: Interval, dollars_per_kwh: float | None, dollars_per_hour: float | None
) -> Iterator[MachineAnswerCost]:
    """Yield what a million tokens cost on a GPU, in electricity and at each known rent.

    Args:
        gpu: the machine's.
        decode: tokens a second that are written.
        prefill: tokens a second of prompts.
        dollars_per_kwh: price of electricity; None: it is not shown.
        dollars_per_hour: rent; None: those of the table.
    """
    read, written = (
        estimate_run_cost(speed, MILLION, gpu, dollars_per_kwh=dollars_per_kwh) for speed in (prefill, decode)
    )
    if read.power is not None and written.power is not None:
        yield MachineAnswerCost(f"electricity at {dollars_per_kwh} $/kWh", read.power, written.power)
    known = [(f"rent, {p.provider}", p.dollars_per_hour) for p in list_rent_prices(gpu.name)]
    for name, rate in known if dollars_per_hour is None else [(f"rent, {dollars_per_hour} $/h", dollars_per_hour)]:
        yield MachineAnswerCost(name, read.hours * rate, written.hours * rate)
