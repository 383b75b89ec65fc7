"""A number known to lie between two ends, and how one is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..core.foundation.formatting import format_bytes


@dataclass(frozen=True)
class Interval:
    """A number known to lie between two ends."""

    low: float
    """The lowest value it may have."""
    high: float
    """The highest value it may have."""

    def __iter__(self) -> Iterator[float]:
        return iter((self.low, self.high))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Interval:
        """Return the interval times a number above 0."""
        return Interval(self.low * factor, self.high * factor)

    def format(self, format_number: Callable[[float], str] = format_bytes) -> str:
        """Return it as `17.9 to 18.6 GiB`."""
        first, last = format_number(self.low), format_number(self.high)
        if first == last:
            return last
        (number, _, unit), (last_number, _, last_unit) = first.rpartition(" "), last.rpartition(" ")
        same_unit = unit == last_unit and all(n.replace(".", "").isdigit() for n in (number, last_number))
        return f"{number if same_unit else first} to {last}"


def format_interval_compact(values: Interval | None, format_number: Callable[[float], str]) -> str:
    """Return an interval as `92–134`, a single value once, `-` for None."""
    if values is None:
        return "-"
    first, last = (format_number(v) for v in values)
    return last if first == last else f"{first}–{last}"


def format_three_digits(rate: float) -> str:
    """Return a rate with three significant digits at most: `4.2`, `47`, `3270`."""
    return f"{rate:.2g}" if rate < 10 else f"{float(f'{rate:.3g}'):.0f}"
