"""Figures as the page says them; what is not a number is a dash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..utils.formatting import format_bytes, format_count, format_duration
from .charts import is_number

DASH = "–"


def _of_numbers(say: Callable[..., str]) -> Callable[..., str]:
    return lambda value, *rest: say(value, *rest) if is_number(value) else DASH


fixed = _of_numbers(lambda x, digits=3: f"{x:.{digits}f}")
signed = _of_numbers(lambda x, digits=3: f"{x:+.{digits}f}".replace("-", "−"))
percent = _of_numbers(lambda x, digits=1: f"{100 * x:.{digits}f} %")
whole = _of_numbers(lambda x: f"{round(x):,}")
figure = _of_numbers(lambda x: f"{x:.4g}")
size = _of_numbers(format_bytes)
short = _of_numbers(format_count)
duration = _of_numbers(format_duration)


def span(low: Any, high: Any, say: Callable[[Any], str]) -> str:
    """Return `low to high`, or one of them where both read the same."""
    ends = say(low), say(high)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def interval(ends: Any, digits: int = 3, factor: float = 1.0) -> str:
    """Return a 95 % interval as text, "" where there is none."""
    if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(map(is_number, ends))):
        return ""
    return span(ends[0] * factor, ends[1] * factor, lambda x: fixed(x, digits).replace("-", "−"))


FILTERS = {
    "fixed": fixed,
    "signed": signed,
    "percent": percent,
    "whole": whole,
    "figure": figure,
    "size": size,
    "short": short,
    "duration": duration,
    "interval": interval,
}
