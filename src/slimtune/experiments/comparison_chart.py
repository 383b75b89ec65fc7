"""Charts of a comparison (what ranks its methods against memory, file size and time) and of a search (trial losses)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..evaluation.charts import FIGURE_STYLE, save_figure
from .experiment_results import ComparedMethod, CompareResult, Cost, TuneResult
from .search_space import SettingRange, format_setting_value

STYLE: Any = {
    **FIGURE_STYLE, "figure.facecolor": "white", "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
MARKERS = "osD^vP*Xph<>d8"
LEGEND_COLUMNS = 7
MOST_PANELS = 6
AXES: dict[Cost, tuple[str, int, str]] = {
    "memory": ("peak memory, GiB", 1 << 30, "linear"),
    "size": ("file, MiB", 1 << 20, "log"),
    "time": ("training, minutes", 60, "linear"),
}
"""Axis label, unit (bytes or seconds) and scale of each cost."""


@contextmanager
def _open_figure(path: Path, width: float, height: float, title: str) -> Iterator[Any]:
    """Yield a matplotlib figure of this size, in inches, that is written into a `.svg` or `.png` at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        save_figure(figure, path)


def write_score_cost_chart(result: CompareResult, path: Path) -> None:
    """Draw what ranks the methods against each cost into a `.svg` or `.png`."""
    methods = result.methods
    height = 4.2 + 0.22 * -(-len(methods) // LEGEND_COLUMNS)
    legend = "filled markers are on the Pareto front, bars are 95 % intervals"
    title = f"{result.model}, {result.steps} steps, {len(result.seeds)} seeds: {legend}"
    with _open_figure(path, 10, height, title) as figure:
        panels: Any = figure.subplots(1, len(AXES), sharey=True)
        for panel, (cost, (label, unit, scale)) in zip(panels, AXES.items(), strict=True):
            cpu_time = cost == "time" and result.device == "cpu"
            panel.set_xlabel(f"{label} of CPU time" if cpu_time else label)
            panel.set_xscale(scale)
            if scale == "log":
                panel.xaxis.set_major_formatter("{x:g}")
            _draw_methods(panel, methods, cost, unit)
        panels[0].set_ylabel(f"{methods[0].gain_name}, {methods[0].gain_unit}")
        handles, labels = panels[0].get_legend_handles_labels()
        columns = min(LEGEND_COLUMNS, len(methods))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _draw_methods(panel: Any, methods: Sequence[ComparedMethod], cost: Cost, unit: int) -> None:
    front = sorted((m.get_cost(cost) / unit, m.gain.value) for m in methods if cost in m.front)
    if front:
        panel.step(*zip(*front, strict=True), where="post", color="#888888", linewidth=1, zorder=1)
    for number, method in enumerate(methods):
        gain = method.gain
        color = f"C{number % 10}"
        panel.errorbar(
            method.get_cost(cost) / unit,
            gain.value,
            yerr=[[gain.value - gain.low], [gain.high - gain.value]],
            fmt=MARKERS[number % len(MARKERS)],
            color=color,
            markerfacecolor=color if cost in method.front else "white",
            markersize=8,
            capsize=3,
            linewidth=1,
            label=method.method,
        )
    panel.axhline(0, color="#333333", linewidth=0.6)


def write_tune_trials_chart(result: TuneResult, ranges: Sequence[SettingRange], path: Path) -> None:
    """Draw the losses of a search's trials, in their order and by each setting, into a `.svg` or `.png`."""
    trials = [(n, t) for n, t in enumerate(result.trials, 1) if t.loss is not None]
    numbers, losses = [n for n, _ in trials], [t.loss for _, t in trials if t.loss is not None]
    columns = min(len(ranges) + 1, MOST_PANELS)
    title = f"{result.model}: {len(result.trials)} trials, {len(trials)} to the end; the line is the best so far"
    with _open_figure(path, 1 + 3 * columns, 3.6, title) as figure:
        panels: Any = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
        panels[0].set_xlabel("trial")
        panels[0].set_ylabel("validation loss")
        panels[0].step(numbers, list(accumulate(losses, min)), where="post", color="#888888", linewidth=1)
        panels[0].plot(numbers, losses, "o", color="C0")
        for panel, searched in zip(panels[1:], ranges, strict=False):
            values = [t.values[searched.path] for _, t in trials]
            panel.set_xlabel(searched.path)
            panel.set_xscale("log" if searched.log else "linear")
            panel.plot(
                [format_setting_value(v) for v in values] if searched.choices else values, losses, "o", color="C0"
            )
            best = result.best.values[searched.path]
            panel.plot(format_setting_value(best) if searched.choices else best, result.best.loss, "o", color="C3")
