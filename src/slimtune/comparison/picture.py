"""The comparison as a picture: held-out gain against peak memory, file size and time, with intervals and the fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reporting.charts import FIGURE_STYLE, save_figure
from .report import COSTS

MARKS = "osD^vP*Xph<>d8"
WIDE = 7
"""Methods in a row of the legend."""
AXES = {
    "memory": ("peak memory, GiB", 1 << 30, "linear"),
    "size": ("file, MiB", 1 << 20, "log"),
    "time": ("training, minutes", 60, "linear"),
}
"""Of each cost: its axis, the unit in bytes or seconds, and the scale."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a comparison into an SVG or PNG; a file that is there is written over.

    Args:
        result: what `compare` returns; at least one method.
        path: ends in `.svg` or `.png`.

    Raises:
        RunError: the disk is full.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = result["methods"]
    # The white background keeps the figure legible on a dark page.
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 4.2 + 0.22 * -(-len(lines) // WIDE)), layout="constrained", facecolor="white")
        panels: Sequence[Any] = figure.subplots(1, len(AXES), sharey=True)
        for axes, cost in zip(panels, AXES, strict=True):
            _panel(axes, lines, cost, on_cpu=result["device"] == "cpu")
        panels[0].set_ylabel("held-out gain, nats a token")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(WIDE, len(lines)), frameon=False)
        figure.suptitle(
            f"{result['model']}, {result['steps']} steps, {len(result['seeds'])} seeds: full marks are on the front, "
            "bars are 95 % intervals", x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        save_figure(figure, path)


def _panel(axes: Any, lines: Sequence[Mapping[str, Any]], cost: str, on_cpu: bool) -> None:
    label, unit, scale = AXES[cost]
    field = COSTS[cost]
    points = sorted((line[field] / unit, line["loss_reduction"]) for line in lines if cost in line["front"])
    axes.step(*zip(*points, strict=True), where="post", color="#888888", linewidth=1, zorder=1)
    for number, line in enumerate(lines):
        low, high = line["loss_reduction_ci95"]
        colour = f"C{number % 10}"
        axes.errorbar(
            line[field] / unit,
            line["loss_reduction"],
            yerr=[[line["loss_reduction"] - low], [high - line["loss_reduction"]]],
            fmt=MARKS[number % len(MARKS)],
            color=colour,
            markerfacecolor=colour if cost in line["front"] else "white",
            markersize=8,
            capsize=3,
            linewidth=1,
            label=line["method"],
        )
    axes.set_xscale(scale)
    if scale == "log":
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{label} of the processor" if cost == "time" and on_cpu else label)
    axes.axhline(0, color="#333333", linewidth=0.6)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
