"""Charts: inline SVG for HTML pages, and the common style of matplotlib figures.

An SVG has a box of 1000 by 1000 units that is stretched to the available space. Text stands beside it in HTML, placed
in per cent, so that it keeps its size on a phone. The markup is in `charts.html.j2`, the colours are in `report.css`.
"""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

from ..core.foundation.files import write_atomic
from ..core.foundation.formatting import format_bytes
from ..errors import UsageError, format_install_command, format_names
from .output_files import resolve_output_file

BOX = 1000.0
MAX_POINTS = 300
"""Most points of a line; more are averaged in groups, each drawn at the last x of its group."""
MIN_SMOOTHED = 12
"""Fewest points of a line that is smoothed."""
FIGURE_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class ChartLine:
    """One line of a chart."""

    name: str  # shown in the legend
    color: str  # "one" or "two", a colour of report.css
    points: Sequence[tuple[float, float]]  # (x, y); values that are not finite are left out
    markers: bool = False  # draw the points, not only the line between them
    smooth: bool = False  # draw a moving average, and the values themselves faintly behind it


@dataclass(frozen=True)
class ChartEstimate:
    """One value with its interval, as a chart shows it."""

    label: str  # shown before it
    color: str  # "one" or "two", a colour of report.css
    value: Any  # without a number the estimate is left out
    interval: Any  # [low, high]; None where unknown
    text: str  # shown below it


def render_line_chart(
    title: str,
    unit: str,
    chart_lines: Sequence[ChartLine],
    tall: bool = False,
    reference_value_and_label: tuple[Any, str] = (None, ""),
) -> Markup:
    """Return a chart of values over training steps; empty where there is no point.

    `reference_value_and_label` is a value with a line across the chart, and what it is.
    """
    grouped = []
    for s in chart_lines:
        points = [p for p in s.points if all(map(is_finite_number, p))]
        size = math.ceil(len(points) / MAX_POINTS) or 1
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        grouped.append((s, [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups], size))
    points = [p for _, group, _ in grouped for p in group]
    if not points:
        return Markup()
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    heights = [y for _, y in points] + [y for y in reference_value_and_label[:1] if is_finite_number(y)]
    axis = choose_axis_ticks(min(heights), max(heights), 4)
    y0, y1 = axis[0], axis[-1]

    def place(x: float, y: float) -> tuple[float, float, str]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        return round(across * BOX, 1), round((y1 - y) / (y1 - y0) * BOX, 1), f"step {x:g}: {format_chart_number(y)}"

    lines = []
    for s, group, size in filter(lambda g: g[1], grouped):
        markers, placed = s.markers or len(group) == 1, [place(x, y) for x, y in group]
        smooth = [place(x, y) for x, y in _moving_average(group)] if s.smooth and len(group) >= MIN_SMOOTHED else []
        lines.append({
            "name": s.name, "color": s.color, "points": placed, "markers": markers, "group": size, "smooth": smooth,
        })  # fmt: skip
    return _render(
        "line_chart",
        title=title,
        unit=unit,
        tall=tall,
        lines=lines,
        xs=[(0, f"step {x0:g}"), (100, f"{x1:g}")] if x1 > x0 else [(50, f"step {x0:g}")],
        ys=[(100 * (y1 - y) / (y1 - y0), _format_tick(y, y1)) for y in axis],
        mark=((y1 - reference_value_and_label[0]) / (y1 - y0) * 100, reference_value_and_label[1])
        if is_finite_number(reference_value_and_label[0])
        else (),
    )


def _moving_average(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return each point with the mean of the values around it, a tenth of the line; the first point stays."""
    half = max(2, len(points) // 20)
    averaged = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - min(half, i)) : i + min(half, i) + 1]]
        averaged.append((x, sum(near) / len(near)))
    return averaged


def render_interval_chart(
    estimates: Sequence[ChartEstimate], reference_values_and_labels: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Return estimates below each other on one axis; empty where none has a value.

    `reference_values_and_labels` are values with a vertical line, and what they mean.
    """
    known = [(e, e.interval if _is_interval(e.interval) else ()) for e in estimates if is_finite_number(e.value)]
    if not known:
        return Markup()
    values = [x for e, interval in known for x in (e.value, *interval)] + [x for x, _ in reference_values_and_labels]
    axis = choose_axis_ticks(min(values), max(values), 3)

    def place(x: float) -> float:
        return round((x - axis[0]) / (axis[-1] - axis[0]) * BOX, 1)

    return _render(
        "interval_chart",
        rows=[(e, place(e.value), [place(x) for x in interval]) for e, interval in known],
        marks=[(place(x), text) for x, text in reference_values_and_labels],
        xs=[(place(x) / 10, _format_tick(x, axis[-1])) for x in axis],
    )


def render_stacked_bar(
    title: str,
    parts: Mapping[str, Any],
    *,
    note: str = "",
    predicted_range: tuple[Any, Any] = (None, None),
    measured: Any = None,
    capacity: Any = None,
) -> Markup:
    """Return one bar of stacked parts; empty where no part has a size.

    Args:
        title: of the chart; `note` stands beside it.
        parts: sizes by name; the name is also the CSS class of the colour.
        predicted_range: lowest and highest size that was predicted, drawn below the bar.
        measured: a vertical line.
        capacity: what the bar may take at most, drawn behind it.
    """
    shown = {name: size for name, size in parts.items() if is_finite_number(size) and size > 0}
    full = max([sum(shown.values()), *(x for x in (*predicted_range, measured, capacity) if is_finite_number(x))])
    if not shown:
        return Markup()

    def place(size: Any) -> float | None:
        return round(size / full * BOX, 1) if is_finite_number(size) else None

    pieces, start = [], 0.0
    for name, size in shown.items():
        pieces.append((name, place(start), place(size), format_bytes(size)))
        start += size
    known = [x for x in predicted_range if is_finite_number(x)]
    return _render(
        "stacked_bar",
        title=title,
        note=note,
        pieces=pieces,
        predicted=[*map(place, known), " to ".join(dict.fromkeys(map(format_bytes, known)))] if len(known) == 2 else [],
        measured=(place(measured), format_bytes(measured)) if is_finite_number(measured) else (),
        capacity=place(capacity),
    )


def render_length_histogram(bins: Sequence[Mapping[str, Any]], limit: Any = None, note: str = "") -> Markup:
    """Return the number of rows by length in tokens; empty where there is no row.

    A bin has `from`, `to` (tokens, inclusive) and `rows`, and there are no gaps. `limit` is the longest length that is
    kept, drawn as a line; `note` stands beside the title.
    """
    bins = [b for b in bins if all(is_finite_number(b.get(k)) for k in ("from", "to", "rows")) and b["to"] >= b["from"]]
    most = max((b["rows"] for b in bins), default=0)
    if not most:
        return Markup()
    # The last bin is drawn as wide as the gap to the next bin would make it.
    first, end = bins[0]["from"], bins[-1]["to"] + (bins[1]["from"] - bins[0]["to"] if len(bins) > 1 else 0)
    ends = [*(b["from"] for b in bins[1:]), end]

    def place(x: float) -> float:
        return round((x - first) / max(end - first, 1) * BOX, 1)

    columns = [
        (place(b["from"]), round(max(place(to) - place(b["from"]), 2), 1), round(b["rows"] / most * BOX, 1), b)
        for b, to in zip(bins, ends, strict=True)
    ]
    return _render(
        "histogram",
        columns=columns,
        note=note,
        limit=(place(limit), limit) if is_finite_number(limit) and first <= limit <= end else (),
        xs=[(0, f"{first:g} tokens"), (50, f"{math.floor((first + end) / 2):,}"), (100, f"{bins[-1]['to']:,g}")],
    )


def choose_axis_ticks(low: float, high: float, approximate_count: int) -> list[float]:
    """Return numbers that enclose `low` to `high`, in equal steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    rough = (high - low) / approximate_count
    size = 10 ** math.floor(math.log10(rough))
    step = size * next(m for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def format_chart_number(value: float) -> str:
    """Return a value as text: `0.0005 -> '5e-4'`, `523.4 -> '523'`, `4.0834 -> '4.083'`."""
    if value and abs(value) < 0.001:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    """Return whether a value is `[low, high]` of finite numbers."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_finite_number, value))


@cache
def make_jinja_environment(folder: str = "evaluation") -> jinja2.Environment:
    """Return the environment of the HTML templates; it escapes all text, and a missing key is empty.

    `folder` of this package has templates, too; they may import those of reports.
    """
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("slimtune", name) for name in {folder: 0, "evaluation": 0}]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(macro: str, **values: Any) -> Markup:
    return getattr(make_jinja_environment().get_template("charts.html.j2").module, macro)(**values)


def _format_tick(value: float, largest: float) -> str:
    return format_chart_number(value) if abs(largest) < 0.01 else f"{value:.6g}"


# --- files drawn by matplotlib ---------------------------------------------------------------------------------------

FIGURE_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "slimtune", "font.size": 10}
"""For `matplotlib.rc_context`: text stays text in an SVG, and equal figures give equal files."""


def require_figure_path(path: str | Path) -> Path:
    """Return the path of a figure, after checking its suffix, its folder and matplotlib before it is drawn."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        suffix = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        hint = f"--plot {path.with_suffix('.svg')}"
        raise UsageError(f"the plot {str(path)!r} has {suffix}", f"one of {format_names(FIGURE_SUFFIXES)}", hint)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib, which is not installed", hint=format_install_command("plot"))
    return resolve_output_file(path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as .svg or .png, atomically."""
    content, kind = io.BytesIO(), path.suffix.lower()[1:]
    figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomic(path, content.getvalue())
