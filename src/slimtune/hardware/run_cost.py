"""What a run costs in time, energy and money, by the rents of `rent_prices.csv`. It imports no torch."""

import csv
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from ..core.foundation.json_results import make_json_key_metadata
from ..errors import UsageError
from ..planning.gpu_specs import MAX_AGE, GpuSpec, is_date_outdated
from ..planning.interval import Interval, format_interval_compact

POWER_FRACTION = Interval(0.6, 1.0)
"""Share of a board's power that it draws in training."""


@dataclass(frozen=True)
class RentPrice:
    """What a GPU costs to rent."""

    gpu: str = field(metadata=make_json_key_metadata("card"))
    """The GPU's name."""
    dollars_per_hour: float
    """Dollars an hour."""
    provider: str
    """Who rents it out, and how."""
    date: str
    """Of the price, as 2026-11-25."""
    source: str
    """Where the price was read."""


@dataclass(frozen=True)
class RunCost:
    """What a run takes in time, energy and money."""

    hours: Interval
    """Hours on the GPU."""
    kwh: Interval | None
    """Energy of the GPU (of a Mac: of the machine); null if its power is unknown."""
    rent: Interval | None
    """Dollars to rent the GPU; null if no price is known."""
    power: Interval | None
    """Dollars of electricity; null without a price for it."""
    prices: tuple[RentPrice, ...] = ()
    """Prices of the table that `rent` is based on."""

    def format_rent(self) -> str:
        """Return the rent with the age of its prices, "" if none is known."""
        if self.rent is None:
            return ""
        old = f", older than {MAX_AGE} days" if any(is_date_outdated(p.date) for p in self.prices) else ""
        spot = "spot " if any("spot" in p.provider for p in self.prices) else ""
        prices = f" ({spot}prices of {min(p.date for p in self.prices)}{old})" if self.prices else ""
        return self.rent.format("{:.2g} $".format) + prices


def estimate_run_cost(
    speed: Interval,
    trained_tokens: int,
    gpu: GpuSpec,
    *,
    dollars_per_hour: float | None = None,
    dollars_per_kwh: float | None = None,
) -> RunCost:
    """Return what training on so many tokens takes.

    Args:
        speed: trained tokens a second.
        trained_tokens: trained in the whole run, over all epochs.
        gpu: where it runs.
        dollars_per_hour: rent of the GPU; None: the lowest and the highest price of the table, if any.
        dollars_per_kwh: price of electricity, for a GPU of one's own.

    Raises:
        UsageError: a price or the number of tokens is not above 0.
    """
    numbers = {"tokens": trained_tokens, "dollars_per_hour": dollars_per_hour, "dollars_per_kwh": dollars_per_kwh}
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise UsageError(f"{name} is {number}", "a number above 0")
    hours = Interval(*(trained_tokens / rate / 3600 for rate in (speed.high, speed.low)))
    kwh = power = rent = None
    if gpu.watts is not None:
        kwh = Interval(*(h * share * gpu.watts / 1000 for h, share in zip(hours, POWER_FRACTION, strict=True)))
        power = None if dollars_per_kwh is None else kwh * dollars_per_kwh
    known = list_rent_prices(gpu.name) if dollars_per_hour is None else ()
    hourly = [p.dollars_per_hour for p in known] if dollars_per_hour is None else [dollars_per_hour]
    if hourly:
        rent = Interval(hours.low * min(hourly), hours.high * max(hourly))
    return RunCost(hours, kwh, rent, power, known)


@cache
def list_rent_prices(gpu_name: str = "") -> tuple[RentPrice, ...]:
    """Return the prices of `rent_prices.csv` for a GPU, by its name in `gpus.csv`; for "", all of them."""
    rows = ([*row.values()] for row in read_price_rows("rent_prices.csv"))
    return tuple(RentPrice(name, float(dollars), *rest) for name, dollars, *rest in rows if gpu_name in ("", name))


@cache
def read_price_rows(file_name: str) -> tuple[dict[str, str], ...]:
    """Return the rows of a CSV file of this folder, by the names of its columns."""
    return tuple(csv.DictReader((files(__package__) / file_name).read_text(encoding="utf-8").splitlines()))


def format_dollar_range(low_high: Interval | None) -> str:
    """Return money as `0.22 $` or `999–1300 $`, `-` for None."""
    text = format_interval_compact(low_high, lambda v: f"{v:.0f}" if v >= 10 else f"{v:.2g}")
    return text if text == "-" else f"{text} $"


def format_hours_range(hours: Interval | None) -> str:
    """Return a time as `39–96 min`, `1.1–2.6 h` or `2–5 days`, `-` for None."""
    if hours is None:
        return "-"
    factor, unit = (60, "min") if hours.high < 2 else (1, "h") if hours.high < 72 else (1 / 24, "days")
    low, high = (f"{h * factor:.2g}" if h * factor < 10 else f"{h * factor:.0f}" for h in hours)
    return f"{high} {unit}" if low == high else f"{low}–{high} {unit}"
