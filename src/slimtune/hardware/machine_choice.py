"""Machines beside each other: what each costs, how fast it serves, and how fast and how dear it trains a run.

It imports no torch: plans are made elsewhere and given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ..planning.gpu_specs import Gpu, read_table
from ..planning.plan_result import Plan, Range, Verdict
from ..planning.serving_speed import ServingSpeed, estimate_serving_speed
from ..planning.throughput import Cost, estimate_cost

REFERENCE: dict[str, Any] = {
    "read_bytes": 4.61e9, "cache_bytes": 0.54e9, "weights": 6.98e9, "layers": 32, "vocab_size": 128256
}  # fmt: skip
"""An 8B model (Llama 3.1) in Q4_K_M behind 4096 tokens, as `plan --serve` computes it."""
REFERENCE_BYTES = 6.0e9
"""What it needs on the device at most."""
WHOLE_MACHINES = ("laptop", "mac", "mini")
"""Kinds whose price is of the machine; others need a computer around the card."""


class Purchase(NamedTuple):
    """What a machine costs to buy."""

    card: str
    dollars: float
    condition: str  # launch (the vendor's price then), new or used
    date: str
    source: str


class ApiPrice(NamedTuple):
    """What a service takes for fine-tuning."""

    service: str
    max_billions: float | None  # of parameters; None: a model of the service's own
    dollars_per_million: float  # training tokens
    date: str
    source: str


@cache
def purchases(gpu: str = "") -> tuple[Purchase, ...]:
    """Return the prices of `purchases.csv` for a GPU, by its name; for "", all of them."""
    rows = ([*row.values()] for row in read_table("purchases.csv"))
    return tuple(Purchase(name, float(d), *rest) for name, d, *rest in rows if gpu in ("", name))


@cache
def api_prices() -> tuple[ApiPrice, ...]:
    """Return the prices of `api_prices.csv`."""
    rows = ([*row.values()] for row in read_table("api_prices.csv"))
    return tuple(ApiPrice(name, float(size) if size else None, float(d), *rest) for name, size, d, *rest in rows)


@dataclass(frozen=True)
class Machine:
    """A machine, and what a run takes on it."""

    gpu: Gpu
    purchases: tuple[Purchase, ...]
    serving: ServingSpeed | None  # of an 8B model in Q4_K_M; None if it does not fit or is not known
    plan: Plan | None = None  # of the run; None if no run is asked about
    verdict: Verdict | None = None  # of the run
    cost: Cost | None = None  # of the run; None if its speed is not known

    @property
    def price(self) -> Range | None:
        """Dollars to buy it: prices paid where some were found, else the price at its launch."""
        paid = [p.dollars for p in self.purchases if p.condition != "launch"]
        known = paid or [p.dollars for p in self.purchases]
        return Range(min(known), max(known)) if known else None

    @property
    def electricity_dollars(self) -> Range | None:
        """Dollars of electricity for the run; None without a price of it."""
        return self.cost.power if self.cost is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "card": self.gpu.name,
            "kind": self.gpu.kind,
            "released": self.gpu.released,
            "memory_bytes": self.gpu.memory,
            "bytes_per_second": self.gpu.bandwidth,
            "flops": self.gpu.rates,
            "watts": self.gpu.watts,
            "price": self.price._asdict() if self.price else None,
            "purchases": [p._asdict() for p in self.purchases],
            "serving": {
                "decode_tokens_per_second": self.serving.decode._asdict(),
                "prefill_tokens_per_second": self.serving.prefill._asdict(),
                "evidence": self.serving.evidence,
            }
            if self.serving is not None
            else None,
            "verdict": self.verdict,
            "tokens_per_second": self.plan.tokens_per_second._asdict()
            if self.plan is not None and self.plan.tokens_per_second
            else None,
            "cost": self.cost.to_dict() if self.cost is not None else None,
            "source": self.gpu.source,
            "checked": self.gpu.checked,
        }


def describe_machine(
    gpu: Gpu, plan: Plan | None = None, *, tokens: int = 0, speed: Range | None = None, verdict: Verdict | None = None,
    dollars_per_kwh: float | None = None,
) -> Machine:  # fmt: skip
    """Return a machine with its prices and serving speed, and with what a run takes on it.

    Args:
        gpu: the machine's.
        plan: of the run, on this GPU or on another one of its kind.
        tokens: trained in the run.
        speed: trained tokens a second; None: the plan's.
        verdict: whether the run fits; None: the plan's.
        dollars_per_kwh: price of electricity.
    """
    fits = gpu.usable.low >= REFERENCE_BYTES
    serving = estimate_serving_speed(gpu, "llama.cpp", **REFERENCE) if fits else None
    cost = None
    if plan is not None:
        verdict, speed = verdict or plan.verdict, speed or plan.tokens_per_second
        if speed is not None and verdict != "does not fit":
            cost = estimate_cost(speed, tokens, gpu, dollars_per_kwh=dollars_per_kwh)
    return Machine(gpu, purchases(gpu.name), serving, plan, verdict, cost)


def runs_to_break_even(price: Range, rent: Range, power: Range | None) -> Range | None:
    """Return after how many runs buying costs less than renting; None if it never does."""
    saved = Range(rent.low - (power.high if power else 0.0), rent.high - (power.low if power else 0.0))
    if saved.high <= 0:
        return None
    return Range(price.low / saved.high, price.high / saved.low if saved.low > 0 else float("inf"))


def rank_machines(
    machines: Sequence[Machine], *, budget: float | None = None, hours: float | None = None, rent: bool = False
) -> list[Machine]:
    """Return the machines that a run fits on, within a budget and a time, the best first.

    The best is the cheapest that surely fits and is surely in time: to buy, or to rent for the run.

    Args:
        machines: with a plan each.
        budget: dollars to spend at most, on the machine or on the rent of the run.
        hours: of a run at most.
        rent: rank by the rent of the run.
    """

    def dollars(machine: Machine) -> Range | None:
        return (machine.cost.rent if machine.cost is not None else None) if rent else machine.price

    suited = []
    for machine in machines:
        amount = dollars(machine)
        if machine.verdict != "fits" or machine.cost is None or amount is None:
            continue
        if (budget is None or amount.high <= budget) and (hours is None or machine.cost.hours.high <= hours):
            suited.append((amount.high, machine.cost.hours.high, machine))
    return [machine for *_, machine in sorted(suited, key=lambda item: item[:2])]
