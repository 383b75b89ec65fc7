"""Draw plans as bars, one for each method, beside what the GPU gives: in the terminal, or as SVG or PNG.

    lora  WWWWWWWWWWWWDGOAAALR··  │              18.6 GiB  fits
    full  WWWWWWWWWWWWGGGGGGGGGGGG│OOOOOOOOOOO»  81.0 GiB  does not fit

A letter is a part of memory (`result.PARTS`), a dot what the allocator may add, `»` a bar that is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ..reporting.charts import FIGURE_STYLE, require_figure_path, save_figure
from ..utils.formatting import format_bytes
from .gpus import GIB, Gpu
from .result import PARTS, Plan

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

LETTERS = {
    "weights": ("W", "#a6cee3"),
    "adapters": ("D", "#fdbf6f"),
    "gradients": ("G", "#fb9a99"),
    "optimizer": ("O", "#cab2d6"),
    "activations": ("A", "#b2df8a"),
    "logits": ("L", "#ffed6f"),
    "runtime": ("R", "#d9d9d9"),
}
"""Letter and colour of each part; black is legible on each."""
TERMINAL_CUTOFF, PLOT_CUTOFF = 2, 4
"""Bars are cut at this multiple of what the GPU gives, else those that fit would be too short to tell apart."""
ALLOCATOR = "the allocator may add"
MAX_WIDTH = 120


class Span(NamedTuple):
    """One piece of a bar, from byte to byte; `part` is one of `PARTS`, or "allocator"."""

    part: str
    start: float
    end: float


def bar_spans(plan: Plan) -> list[Span]:
    """Return the pieces of a plan's bar, in the order they are stacked."""
    ends = list(accumulate(plan.parts.get(part, 0) for part in PARTS))
    spans = [Span(part, start, end) for part, start, end in zip(PARTS, [0, *ends], ends, strict=False)]
    return [s for s in (*spans, Span("allocator", ends[-1], plan.need.high)) if s.end > s.start]


def _full_width(plans: Sequence[Plan], usable: Sequence[float], cutoff: int) -> float:
    """Return the bytes that the longest bar may show."""
    return max(1.02 * usable[1], min(max(p.need.high for p in plans), cutoff * usable[1]))


# --- terminal ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bars:
    plans: Sequence[Plan]
    gpu: Gpu

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line, dot, more = ("|", ".", ">") if options.ascii_only else ("│", "·", "»")
        name_width = max(cell_len(p.method) for p in self.plans)
        results = [f" {format_bytes(p.need.high):>10}  {p.verdict}" for p in self.plans]
        width = max(20, min(options.max_width, MAX_WIDTH) - name_width - 1 - max(map(len, results)))
        shown = _full_width(self.plans, self.gpu.usable, TERMINAL_CUTOFF)
        lines = sorted({min(int(b * width / shown), width - 1) for b in self.gpu.usable})

        gives, left = f"{self.gpu.name}: {format_bytes(self.gpu.usable[0])}", name_width + 1 + lines[0]
        yield Text(f"{gives} {line}".rjust(left + 1) if len(gives) < left else " " * left + f"{line} {gives}")
        for plan, result in zip(self.plans, results, strict=True):
            cells = [(" ", Style())] * width
            for part, start, end in bar_spans(plan):
                letter, colour = LETTERS.get(part, (dot, ""))
                for i in range(round(start * width / shown), min(round(end * width / shown), width)):
                    cells[i] = (letter, _style(colour))
            if plan.need.high > shown:
                cells[-1] = (more, Style(bold=True))
            for i in lines:
                cells[i] = (line, Style(bold=True))
            fits = "bold" if plan.verdict == "fits" else ""
            yield Text.assemble(f"{plan.method:<{name_width}} ", *cells, (result, fits))
        yield Text()
        legend = [Text.assemble((letter, _style(colour)), f" {part}") for part, (letter, colour) in LETTERS.items()]
        scale = Text(f"{dot} {ALLOCATOR}  {line} what the card gives  1 letter: {format_bytes(shown / width)}")
        for half in (legend[:6], [*legend[6:], scale]):
            yield Text("  ").join(half)


def draw_bars(plans: Sequence[Plan], gpu: Gpu) -> RenderableType:
    """Return one stacked bar per plan and a line at the GPU's usable bytes, for a rich console from 60 columns on."""
    return _Bars(plans, gpu)


def _style(colour: str) -> Style:
    return Style(color="black", bgcolor=colour) if colour else Style()


# --- SVG and PNG ------------------------------------------------------------------------------------------------------


def write_plot(plans: Sequence[Plan], path: str | Path) -> None:
    """Write one stacked bar per plan, and a line at the GPU's usable bytes, to a file.

    Args:
        plans: at least one, all for one GPU.
        path: ends in `.svg` or `.png`; an existing file is replaced.

    Raises:
        UsageError: as `require_figure_path`.
        RunError: the disk is full.
    """
    path = require_figure_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    usable = plans[0].usable_bytes
    shown = _full_width(plans, usable, PLOT_CUTOFF) / GIB
    low, high = (b / GIB for b in usable)
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9, 1.9 + 0.42 * len(plans)), layout="constrained")
        axes = figure.add_subplot()
        for row, plan in enumerate(plans):
            _plot_bar(axes, row, plan, shown)
        axes.axvspan(low, high, color="#333333", alpha=0.12, linewidth=0)
        axes.axvline(low, color="#333333", linewidth=1.2, linestyle="--")
        axes.text(low, -0.62, f"{plans[0].card}: {format_bytes(usable.low)}", ha="center", va="bottom", fontsize=9)
        axes.set_yticks(range(len(plans)), [p.method for p in plans])
        axes.set_ylim(len(plans) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * shown)
        axes.set_xlabel("GiB")
        tokens = f"{plans[0].max_tokens_per_micro_batch} tokens in a micro-batch, rows of up to {plans[0].seq_len}"
        axes.set_title(f"{plans[0].model}: {tokens}", loc="left", pad=18)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        save_figure(figure, path)


def _plot_bar(axes: Any, row: int, plan: Plan, shown: float) -> None:
    """Draw one bar; `shown` is where bars are cut, in GiB."""
    for part, *bytes_ in bar_spans(plan):
        start, end = (min(b / GIB, shown) for b in bytes_)
        letter, colour = LETTERS.get(part, ("", ""))
        look = {"color": colour} if colour else {"facecolor": "white", "edgecolor": "#777777", "hatch": "///"}
        label = f"{letter} {part}" if letter else ALLOCATOR
        axes.barh(row, end - start, left=start, height=0.7, linewidth=0.5, label=label, **look)
        if letter and end - start > 0.02 * shown:
            axes.text((start + end) / 2, row, letter, ha="center", va="center", fontsize=8, color="#333333")
    need = plan.need.high / GIB
    verdict = f"{'» ' if need > shown else ''}{format_bytes(plan.need.high)}, {plan.verdict}"
    box = {"facecolor": "white", "linewidth": 0, "pad": 1}  # the GPU's line may cross the text
    axes.text(min(need, shown) + 0.012 * shown, row, verdict, va="center", fontsize=9, bbox=box)
