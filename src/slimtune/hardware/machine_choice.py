"""Machines beside each other: what each costs, how fast it serves, and how fast and how dear it trains a run.

It imports no torch: estimates of the run are made elsewhere and given.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, cast

from ..core.foundation.formatting import format_bytes
from ..core.foundation.json_results import make_json_key_metadata
from ..core.models.gpu_support import NO_XPU
from ..planning.gpu_specs import GpuSpec, format_date_with_age_note, is_date_outdated, list_gpu_specs
from ..planning.interval import Interval, format_interval_compact, format_three_digits
from ..planning.plan_result import MemoryVerdict, ResourceEstimate
from ..planning.serving_speed import LayerStructure, ServingSpeed, estimate_decode_and_prefill_speed
from .run_cost import (
    RunCost,
    estimate_run_cost,
    format_dollar_range,
    format_hours_range,
    list_rent_prices,
    read_price_rows,
)

REFERENCE: dict[str, Any] = {
    "weight_bytes_per_token": 4.61e9, "kv_bytes_per_request": 0.54e9, "matmul_weight_count": 6.98e9,
    "layers": 32, "vocab_size": 128256, "structure": LayerStructure(hidden_size=4096),
}  # fmt: skip
"""An 8B model (Llama 3.1) in Q4_K_M behind 4096 tokens, as `plan --serve` computes it."""
REFERENCE_BYTES = 6.0e9
"""What it needs on the device at most."""
SCREEN_KINDS = ("desktop", "laptop", "mac", "mini")
"""Kinds that also draw a screen."""
SCREEN_BYTES = 2 << 30
"""What a browser and an editor on a screen take of a GPU's memory; a machine with less left is not the first choice."""
WHOLE_MACHINES = ("laptop", "mac", "mini")
"""Kinds whose price is of the machine; others need a computer around the GPU."""


PriceKind = Literal["street", "list", "used", "launch"]
"""Whose price it is: a shop's now, the maker's now, that of used ones, the maker's when it came out."""
BindingLimit = Literal["memory", "price", "budget", "hours"]
"""What leaves no machine to choose; "price": of those that fit no price is known."""


@dataclass(frozen=True)
class MachinePurchasePrice:
    """What a machine costs to buy."""

    gpu: str = field(metadata=make_json_key_metadata("card"))
    """The name of its GPU."""
    dollars: float
    """The price."""
    condition: PriceKind
    """One of street (a shop's), list (the maker's now), used, and launch (the maker's when it came out)."""
    date: str
    """Of the price, as 2026-11-25."""
    machine: str
    """What is sold, as "MacBook Air 13, 512 GB"; "" for the card alone or the usual machine."""
    source: str
    """Address where the price was read."""

    @property
    def is_in_macbook(self) -> bool:
        """Whether the price is that of a MacBook."""
        return self.machine.startswith("MacBook")


@dataclass(frozen=True)
class TuningServicePrice:
    """What a service takes for fine-tuning."""

    service: str
    """Its name, and what it tunes."""
    max_billions: float | None
    """Of parameters; null: a model of the service's own."""
    dollars_per_million: float
    """Dollars for a million training tokens."""
    date: str
    """Of the price, as 2026-11-25."""
    source: str
    """Where the price was read."""


@cache
def list_purchase_prices(gpu_name: str = "") -> tuple[MachinePurchasePrice, ...]:
    """Return the prices of `purchase_prices.csv` for a GPU, by its name; for "", all of them."""
    rows = (row for row in read_price_rows("purchase_prices.csv") if gpu_name in ("", row["card"]))
    return tuple(
        MachinePurchasePrice(
            gpu=row["card"],
            dollars=float(row["dollars"]),
            condition=cast(PriceKind, row["condition"]),
            date=row["date"],
            machine=row["machine"],
            source=row["source"],
        )
        for row in rows
    )


def select_deciding_prices(prices: tuple[MachinePurchasePrice, ...]) -> tuple[MachinePurchasePrice, ...]:
    """Return the prices of now, or those at the launch if there are no others."""
    return tuple(p for p in prices if p.condition != "launch") or prices


def is_only_macbooks(kinds: Sequence[str]) -> bool:
    """Return whether of Macs only MacBooks are asked for."""
    return "macbook" in kinds and "mac" not in kinds


def is_sold_as(gpu: GpuSpec, kinds: Sequence[str]) -> bool:
    """Return whether a GPU is sold as one of these kinds."""
    in_macbook = gpu.kind == "mac" and any(p.is_in_macbook for p in list_purchase_prices(gpu.name))
    return gpu.kind in kinds or (is_only_macbooks(kinds) and in_macbook)


def list_offered_gpus(kinds: Sequence[str]) -> list[GpuSpec]:
    """Return the GPUs that are sold as one of these kinds, or rented if "rent" is one of them."""
    return [g for g in list_gpu_specs() if is_sold_as(g, kinds) or ("rent" in kinds and list_rent_prices(g.name))]


@cache
def list_tuning_service_prices() -> tuple[TuningServicePrice, ...]:
    """Return the prices of `api_prices.csv`."""
    rows = ([*row.values()] for row in read_price_rows("api_prices.csv"))
    return tuple(
        TuningServicePrice(name, float(size) if size else None, float(dollars), *rest)
        for name, size, dollars, *rest in rows
    )


@dataclass(frozen=True)
class MachineOffer:
    """A machine that can be bought or rented, and what a run takes on it."""

    gpu: str = field(metadata=make_json_key_metadata("card"))
    """The name of its GPU."""
    kind: str
    """What it is sold as: desktop, laptop, workstation, datacentre, mac or mini."""
    released: str
    """Month in which it came out, as 2023-06."""
    memory_bytes: int
    """Bytes of the GPU as sold."""
    bytes_per_second: float | None
    """Bandwidth of the GPU's memory."""
    flops: dict[str, float] | None
    """Dense floating point operations a second by dtype, in hardware."""
    watts: float | None
    """Power of the board (of a Mac: of the machine); null: unknown."""
    price: Interval | None
    """Dollars to buy it: what it costs now where that was found, else the price at its launch."""
    purchases: tuple[MachinePurchasePrice, ...]
    """All known prices to buy it."""
    serving: ServingSpeed | None
    """Of an 8B model in Q4_K_M; null if it does not fit or is not known."""
    verdict: MemoryVerdict | None
    """Whether the run fits; null if no run is asked about."""
    free_bytes: float | None
    """Of the GPU's memory as sold, that the run leaves at least; null if no run is asked about."""
    tokens_per_second: Interval | None
    """Trained tokens a second of the run; null: unknown."""
    cost: RunCost | None
    """Of the run; null if its speed is not known."""
    source: str
    """Where the figures of the GPU are from."""
    checked: str
    """When they were last checked, as 2026-11-25."""

    @property
    def has_only_launch_price(self) -> bool:
        """Whether the only known price is the one at its launch, which may be far from today's."""
        return bool(self.purchases) and all(p.condition == "launch" for p in self.purchases)

    def describe_price_kind(self) -> str:
        """Return what its price is, as `used–street`; of an old one the month, as `launch 2022-01`; "-" without one."""
        if not self.purchases:
            return "-"
        by_dollars = sorted(select_deciding_prices(self.purchases), key=lambda p: p.dollars)
        kinds = "–".join(dict.fromkeys((by_dollars[0].condition, by_dollars[-1].condition)))
        oldest = min(p.date for p in by_dollars)
        return f"{kinds} {oldest[:7]}" if is_date_outdated(oldest) else kinds

    @property
    def draws_screen(self) -> bool:
        """Whether the run shares the GPU's memory with what is on a screen."""
        return self.kind in SCREEN_KINDS

    def make_price_rank(self, dollars: Interval, free_bytes: float, *, by_rent: bool) -> tuple[bool, bool, float]:
        """Return what machines are ranked by: the lower, the better.

        The cheapest is the best. Machines to buy of which only the price at their launch is known follow the others:
        today's price is another one. Last are those that draw their screen in less than `SCREEN_BYTES` of memory.
        """
        is_crowded = not by_rent and self.draws_screen and free_bytes < SCREEN_BYTES
        return is_crowded, not by_rent and self.has_only_launch_price, dollars.high

    @property
    def electricity_dollars(self) -> Interval | None:
        """Dollars of electricity for the run; None without a price of it."""
        return self.cost.power if self.cost is not None else None

    def explain_pick(self, way: str) -> str:
        """Return its price for the run, to "buy" or to "rent", and the run's time."""
        amount = self.price if way == "buy" else self.cost.rent if self.cost else None
        kind = f" ({self.describe_price_kind()})" if way == "buy" and self.price is not None else ""
        time = format_hours_range(self.cost.hours if self.cost else None)
        return f"{format_dollar_range(amount)}{kind}, the run in {time}"


def make_machine_offer(
    gpu: GpuSpec,
    estimate: ResourceEstimate | None = None,
    *,
    trained_tokens: int = 0,
    speed: Interval | None = None,
    verdict: MemoryVerdict | None = None,
    dollars_per_kwh: float | None = None,
    only_macbook: bool = False,
) -> MachineOffer:
    """Return a machine with its prices and serving speed, and with what a run takes on it.

    Args:
        gpu: the machine's.
        estimate: of the run, on this GPU or on another one of its kind.
        trained_tokens: trained in the run.
        speed: trained tokens a second; None: the estimate's.
        verdict: whether the run fits; None: the estimate's.
        dollars_per_kwh: price of electricity.
        only_macbook: leave out the prices of a chip in other Macs.
    """
    fits = gpu.usable.low >= REFERENCE_BYTES
    cost = None
    if estimate is not None:
        verdict, speed = verdict or estimate.verdict, speed or estimate.tokens_per_second
        if speed is not None and verdict != "does not fit":
            cost = estimate_run_cost(speed, trained_tokens, gpu, dollars_per_kwh=dollars_per_kwh)
    purchases = tuple(p for p in list_purchase_prices(gpu.name) if p.is_in_macbook or not only_macbook)
    known = [p.dollars for p in select_deciding_prices(purchases)]
    return MachineOffer(
        gpu=gpu.name,
        kind=gpu.kind,
        released=gpu.released,
        memory_bytes=gpu.memory,
        bytes_per_second=gpu.bandwidth,
        flops=gpu.rates,
        watts=gpu.watts,
        price=Interval(min(known), max(known)) if known else None,
        purchases=purchases,
        serving=estimate_decode_and_prefill_speed(gpu, "llama.cpp", **REFERENCE) if fits else None,
        verdict=verdict,
        free_bytes=gpu.memory - estimate.need_bytes.high if estimate is not None else None,
        tokens_per_second=estimate.tokens_per_second if estimate is not None else None,
        cost=cost,
        source=gpu.source,
        checked=gpu.checked,
    )


@dataclass(frozen=True)
class BreakEven:
    """After how many runs, or million tokens, buying costs less."""

    low: float
    """The fewest."""
    high: float | None
    """The most; null: perhaps never."""

    def to_interval(self) -> Interval:
        """Return it with infinity for "perhaps never"."""
        return Interval(self.low, float("inf") if self.high is None else self.high)


def count_runs_to_break_even(
    price: Interval, rent_per_run: Interval, power_per_run: Interval | None
) -> BreakEven | None:
    """Return after how many runs buying costs less than renting; None if it never does."""
    saved = Interval(
        rent_per_run.low - (power_per_run.high if power_per_run else 0.0),
        rent_per_run.high - (power_per_run.low if power_per_run else 0.0),
    )
    if saved.high <= 0:
        return None
    return BreakEven(price.low / saved.high, price.high / saved.low if saved.low > 0 else None)


def rank_fitting_machines_by_price(
    offers: Sequence[MachineOffer],
    *,
    budget: float | None = None,
    max_hours: float | None = None,
    by_rent: bool = False,
) -> list[MachineOffer]:
    """Return the machines that a run fits on, within a budget and a time, the best first.

    The best is the first by `make_price_rank` that surely fits and is surely in time: to buy, or to rent for the run.

    Args:
        offers: with a verdict each.
        budget: dollars to spend at most, on the machine or on the rent of the run.
        max_hours: of a run at most.
        by_rent: rank by the rent of the run.
    """
    suited = []
    for offer in offers:
        if offer.verdict != "fits" or offer.cost is None or (amount := _get_price_or_rent(offer, by_rent)) is None:
            continue
        if (budget is None or amount.high <= budget) and (max_hours is None or offer.cost.hours.high <= max_hours):
            rank = offer.make_price_rank(amount, offer.free_bytes or 0, by_rent=by_rent)
            suited.append((rank, offer.cost.hours.high, offer))
    return [offer for *_, offer in sorted(suited, key=lambda item: item[:2])]


def find_binding_limits(
    offers: Sequence[MachineOffer], *, budget: float | None, max_hours: float | None, by_rent: bool
) -> list[BindingLimit]:
    """Return which limits leave no machine, of which each alone would do so or which do so together; [] if one is left.

    The arguments are those of `rank_fitting_machines_by_price`.
    """
    rank = partial(rank_fitting_machines_by_price, offers, by_rent=by_rent)
    some_fit = any(offer.verdict == "fits" for offer in offers)
    limits = {"budget": ("budget", budget), "hours": ("max_hours", max_hours)}
    return find_limits_that_leave_none(rank, limits, some_fit)


def find_limits_that_leave_none(
    rank: Callable[..., Sequence[Any]], limits: Mapping[str, tuple[str, float | None]], some_fit: bool
) -> list[Any]:
    """Return which limits leave no machine: each that alone does, else all of them; [] if one is left.

    Args:
        rank: returns the machines within limits, which are its keyword arguments.
        limits: argument and value of each limit, by the limit's name.
        some_fit: whether the memory of some machine is enough.
    """
    if rank(**dict(limits.values())):
        return []
    if not some_fit:
        return ["memory"]
    if not rank():
        return ["price"]
    return [name for name, (argument, value) in limits.items() if not rank(**{argument: value})] or [*limits]


def _get_price_or_rent(offer: MachineOffer, by_rent: bool) -> Interval | None:
    """Return the dollars for the machine, or for the rent of the run."""
    return offer.price if not by_rent else offer.cost.rent if offer.cost is not None else None


# --- what is shown, and where it is from ------------------------------------------------------------------------------


def list_machine_comparison_rows(offers: Sequence[MachineOffer], run_name: str | None) -> Iterator[tuple[str, ...]]:
    """Yield a label and a value for each machine; `run_name` names what is trained, None: nothing."""

    def row(label: str, value: Callable[[MachineOffer], str]) -> tuple[str, ...]:
        return (label, *map(value, offers))

    yield row("kind", lambda m: m.kind)
    yield row("released", lambda m: m.released or "-")
    yield row("memory", lambda m: format_bytes(m.memory_bytes))
    yield row("memory, GB/s", lambda m: f"{m.bytes_per_second / 1e9:.0f}" if m.bytes_per_second else "-")
    yield row("16-bit TFLOPS", lambda m: _format_tflops(m.flops or {}))
    yield row("watts", lambda m: f"{m.watts:.0f}" if m.watts else "-")
    yield row("price", lambda m: format_dollar_range(m.price))
    yield row("price of", lambda m: m.describe_price_kind())
    yield row(
        "8B writes, t/s",
        lambda m: format_interval_compact(m.serving.decode if m.serving else None, format_three_digits),
    )
    yield row(
        "reads, t/s", lambda m: format_interval_compact(m.serving.prefill if m.serving else None, format_three_digits)
    )
    if run_name is None:
        return
    yield row("training", lambda m: m.verdict or "-")
    yield row("trains, t/s", lambda m: format_interval_compact(m.tokens_per_second, format_three_digits))
    yield row(run_name, lambda m: format_hours_range(m.cost.hours if m.cost else None))
    yield row("its rent", lambda m: format_dollar_range(m.cost.rent if m.cost else None))
    yield row("its kWh", lambda m: format_interval_compact(m.cost.kwh if m.cost else None, "{:.2g}".format))
    if any(m.electricity_dollars for m in offers):
        yield row("its electricity", lambda m: format_dollar_range(m.electricity_dollars))


def _format_tflops(flops: dict[str, float]) -> str:
    """Return the rate of 16-bit products: the faster one's, which a CPU has for one of the two dtypes only."""
    rate = max(flops.get(dtype, 0.0) for dtype in ("float16", "bfloat16")) / 1e12
    return "-" if not rate else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def list_gpu_figures(gpu: GpuSpec) -> Iterator[tuple[str, str]]:
    """Yield the figures of one GPU, its prices and their sources."""
    yield "GPU", f"{gpu.name}, {gpu.kind}, {gpu.vendor} {gpu.architecture}"
    if not gpu.trains:
        yield "training", NO_XPU
    yield "memory", f"{format_bytes(gpu.memory)}, {gpu.usable.format()} for a run"
    if gpu.bandwidth is not None:
        yield "bandwidth", f"{gpu.bandwidth / 1e9:.4g} GB/s"
    for dtype, rate in (gpu.rates or {}).items():
        yield dtype, f"{rate / 1e12:.4g} TFLOPS"
    yield "weights held in", "bfloat16" if gpu.bf16 else "float32, unless --dtype says otherwise"
    if gpu.watts is not None:
        yield "power", f"{gpu.watts:.0f} W"
    if gpu.released:
        yield "released", gpu.released
    yield "source", gpu.source
    yield "checked", format_date_with_age_note(gpu.checked)
    yield from ((kind, f"{amount}, {source}") for kind, amount, source in list_gpu_price_and_rent_texts(gpu.name))


def list_gpu_price_and_rent_texts(gpu_name: str) -> Iterator[tuple[str, str, str]]:
    """Yield `price` or `rent`, the dollars, and where they are from, for each known price of a GPU."""
    for p in list_purchase_prices(gpu_name):
        what = ", ".join(filter(None, (p.condition, p.machine, format_date_with_age_note(p.date))))
        yield "price", f"{p.dollars:.0f} $", f"{what}: {p.source}"
    for q in list_rent_prices(gpu_name):
        yield "rent", f"{q.dollars_per_hour} $/h", f"{q.provider}, {format_date_with_age_note(q.date)}: {q.source}"


def list_offer_figure_sources(offers: Sequence[MachineOffer]) -> Iterator[tuple[str, str]]:
    """Yield where each figure of machines is from, and of what date."""
    for offer in offers:
        yield (
            offer.gpu,
            f"{offer.source} (checked {format_date_with_age_note(offer.checked)})" if offer.checked else offer.source,
        )
        yield from ((amount, source) for _, amount, source in list_gpu_price_and_rent_texts(offer.gpu))
    yield "serving", "Llama 3.1 8B in Q4_K_M behind 4096 tokens in llama.cpp; fitted to published runs"


def list_offer_figure_dates(offers: Iterable[MachineOffer]) -> Iterator[str]:
    """Yield the dates of what `list_offer_figure_sources` shows; a price at the launch stays what it was."""
    for offer in offers:
        if offer.checked:  # not of what was measured on this machine
            yield offer.checked
        yield from (p.date for p in offer.purchases if p.condition != "launch")
        yield from (p.date for p in list_rent_prices(offer.gpu))
