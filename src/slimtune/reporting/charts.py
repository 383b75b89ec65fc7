"""Geometry of the page's pictures: numbers to places, no markup.

A picture's box is 1000 wide and 1000 high, stretched to the room there is; whatever is text stands beside it in HTML,
placed in per cent, so that it keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

BOX = 1000.0
MOST_POINTS = 300
"""Points a curve is drawn with; more are averaged in groups."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A number on an axis, `at` per cent of its length."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: what it is.
        tone: its colour's name in report.css.
        path: corners for `polyline`.
        points: (x, y, text) of each point.
        dots: whether the points are drawn.
        each: logged values that a point is the mean of.
    """

    name: str
    tone: str
    path: str
    points: list[tuple[float, float, str]]
    dots: bool
    each: int


@dataclass(frozen=True)
class Curves:
    """Curves over steps."""

    title: str
    unit: str
    lines: list[Line]
    xs: list[Tick]
    ys: list[Tick]

    @property
    def text(self) -> str:
        """What somebody who does not see it is told."""
        return "; ".join(f"{line.name} from {line.points[0][2]} to {line.points[-1][2]}" for line in self.lines)


@dataclass(frozen=True)
class Whisker:
    """One figure with its interval: `dot`, `low` and `high` in the box; the latter None where it is not known."""

    label: str
    tone: str
    dot: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Whiskers:
    """Figures beside each other on one axis; `marks` are lines that mean something, such as 0."""

    rows: list[Whisker]
    xs: list[Tick]
    marks: list[Tick] = field(default_factory=list)


def curves(title: str, unit: str, series: Sequence[tuple[str, str, Points, bool]]) -> Curves | None:
    """Return curves over steps; None where there is no point.

    Args:
        title: of the picture.
        unit: of its values.
        series: name, tone, `(step, value)` points and whether they are dots, of each.
    """
    kept = [(n, tone, *_grouped(_finite(points)), dots) for n, tone, points, dots in series]
    every = [p for _, _, points, _, _ in kept for p in points]
    if not every:
        return None
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    marks = ticks(min(y for _, y in every), max(y for _, y in every), 4)
    y0, y1 = marks[0], marks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        return round(across * BOX, 1), round((y1 - y) / (y1 - y0) * BOX, 1)

    lines = []
    for name, tone, points, each, dots in kept:
        if points:
            placed = [(*at(x, y), f"step {x:g}: {number(y)}") for x, y in points]
            path = " ".join(f"{x},{y}" for x, y, _ in placed)
            lines.append(Line(name, tone, path, placed, dots or len(placed) == 1, each))
    ends = [Tick(0, f"step {x0:g}"), Tick(100, f"{x1:g}")] if x1 > x0 else [Tick(50, f"step {x0:g}")]
    return Curves(title, unit, lines, ends, [Tick(100 * (y1 - y) / (y1 - y0), _short(y, y1)) for y in marks])


Figure = tuple[str, str, Any, Any, str]
"""Label, tone, value, `[low, high]` and text."""


def whiskers(rows: Sequence[Figure], marks: Sequence[tuple[float, str]] = ()) -> Whiskers | None:
    """Return figures with intervals on one axis; None where there is none.

    Args:
        rows: label, tone, value, `[low, high]` (None: not known) and text, of each; one without a value is left out.
        marks: values that a line is drawn at, with what they mean.
    """
    known = [(n, tone, v, _ends(ci), text) for n, tone, v, ci, text in rows if is_number(v)]
    if not known:
        return None
    every = [x for _, _, v, ci, _ in known for x in (v, *(ci or ()))] + [m for m, _ in marks]
    axis = ticks(min(every), max(every), 3)
    low, high = axis[0], axis[-1]

    def at(x: float) -> float:
        return round((x - low) / (high - low) * BOX, 1)

    made = [
        Whisker(name, tone, at(v), at(ci[0]) if ci else None, at(ci[1]) if ci else None, text)
        for name, tone, v, ci, text in known
    ]
    return Whiskers(
        made, [Tick(at(x) / 10, _short(x, high)) for x in axis], [Tick(at(m) / 10, text) for m, text in marks]
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers in even steps of 1, 2 or 5 times a power of ten, that hold `low` to `high` between them."""
    if not high > low:
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = size * next(m for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Return a value of a curve as text: `0.0005 -> '5e-4'`, `523.4 -> '523'`, `4.0834 -> '4.083'`."""
    if value and abs(value) < 0.001:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float, largest: float) -> str:
    return number(value) if abs(largest) < 0.01 else f"{value:.6g}"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if is_number(x) and is_number(y)]


def _grouped(points: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Return at most `MOST_POINTS` points, each at the last step of its group, and the size of a group."""
    each = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups], each


def _ends(interval: Any) -> tuple[float, float] | None:
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval)):
        return interval[0], interval[1]
    return None
