"""Draw plans as bars, one for each method, beside what the GPU gives: in the terminal, or as SVG or PNG.

    lora  WWWWWWWWWWWWDGOAAALR··  │              18.6 GiB  fits
    full  WWWWWWWWWWWWGGGGGGGGGGGG│OOOOOOOOOOO»  81.0 GiB  does not fit

A letter is a part of memory (`result.PARTS`), a dot what the allocator may add, `»` a bar that is cut off.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..core.foundation.formatting import GIB, format_bytes
from ..evaluation.charts import FIGURE_STYLE, require_figure_path, save_figure
from ..planning.gpu_specs import GpuSpec
from ..planning.plan_result import PARTS, ResourceEstimate

COLOURS = {"W": "#a6cee3", "D": "#fdbf6f", "G": "#fb9a99", "O": "#cab2d6", "A": "#b2df8a", "L": "#ffed6f",
           "R": "#d9d9d9"}  # fmt: skip
"""Letter and colour of each of PARTS; black is legible on each."""
ALLOCATOR = "the allocator may add"


def _bar_ends(plan: ResourceEstimate) -> list[float]:
    """Return the byte at which each part of a plan's bar ends, and at last what the allocator may add."""
    return [*accumulate(plan.parts.get(part, 0) for part in PARTS), plan.need_bytes.high]


def make_memory_bars(plans: Sequence[ResourceEstimate], gpu: GpuSpec, console: Console) -> Text:
    """Return one stacked bar per plan and a line at the GPU's usable bytes, for a console from 60 columns on."""
    line, dot, more = ("|", ".", ">") if console.options.ascii_only else ("│", "·", "»")
    name_width = max(cell_len(p.method) for p in plans)
    results = [f" {format_bytes(p.need_bytes.high):>10}  {p.verdict}" for p in plans]
    width = max(20, min(console.width, 120) - name_width - 1 - max(map(len, results)))
    shown = max(1.02 * gpu.usable.high, min(max(p.need_bytes.high for p in plans), 2 * gpu.usable.high))
    lines = sorted({min(int(b * width / shown), width - 1) for b in gpu.usable})
    letters = [(letter, Style(color="black", bgcolor=colour)) for letter, colour in COLOURS.items()]

    gives, left = f"{gpu.name}: {format_bytes(gpu.usable.low)}", name_width + 1 + lines[0]
    rows = [Text(f"{gives} {line}".rjust(left + 1) if len(gives) < left else " " * left + f"{line} {gives}")]
    for plan, result in zip(plans, results, strict=True):
        cells = [(" ", Style())] * width
        for cell, (start, end) in zip([*letters, (dot, Style())], pairwise([0.0, *_bar_ends(plan)]), strict=True):
            for i in range(round(start * width / shown), min(round(end * width / shown), width)):
                cells[i] = cell
        for i in lines:
            cells[i] = (line, Style(bold=True))
        if plan.need_bytes.high > shown:
            cells[-1] = (more, Style(bold=True))
        verdict = (result, "bold" if plan.verdict == "fits" else "")
        rows.append(Text.assemble(f"{plan.method:<{name_width}} ", *cells, verdict))
    legend = [Text.assemble(cell, f" {part}") for cell, part in zip(letters, PARTS, strict=True)]
    scale = Text(f"{dot} {ALLOCATOR}  {line} what the card gives  1 letter: {format_bytes(shown / width)}")
    return Text("\n").join([*rows, Text(), Text("  ").join(legend[:6]), Text("  ").join([*legend[6:], scale])])


def write_plan_chart(plans: Sequence[ResourceEstimate], path: str | Path) -> None:
    """Write one stacked bar per plan, and a line at the GPU's usable bytes, to a .svg or .png file, atomically.

    Raises:
        UsageError: as `require_figure_path`.
        RunError: the disk is full.
    """
    path = require_figure_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    low, high = (b / GIB for b in plans[0].usable_bytes)
    shown = max(1.02 * high, min(max(p.need_bytes.high for p in plans) / GIB, 4 * high))
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9, 1.9 + 0.42 * len(plans)), layout="constrained")
        axes = figure.add_subplot()
        ends = [[0.0, *(min(end / GIB, shown) for end in _bar_ends(p))] for p in plans]
        looks: list[tuple[str, dict[str, Any]]]
        looks = [(f"{letter} {part}", {"color": COLOURS[letter]}) for letter, part in zip(COLOURS, PARTS, strict=True)]
        looks.append((ALLOCATOR, {"facecolor": "white", "edgecolor": "#777777", "hatch": "///"}))
        for i, (label, look) in enumerate(looks):
            widths = [e[i + 1] - e[i] for e in ends]
            bars = axes.barh(range(len(plans)), widths, left=[e[i] for e in ends], height=0.7, label=label, **look)
            letters = [label[0] if width > 0.02 * shown and label != ALLOCATOR else "" for width in widths]
            axes.bar_label(bars, letters, label_type="center", fontsize=8, color="#333333")
        for row, plan in enumerate(plans):
            need = plan.need_bytes.high / GIB
            text = f"{'» ' if need > shown else ''}{format_bytes(plan.need_bytes.high)}, {plan.verdict}"
            box = {"facecolor": "white", "linewidth": 0, "pad": 1}  # the GPU's line may cross the text
            axes.text(min(need, shown) + 0.012 * shown, row, text, va="center", fontsize=9, bbox=box)
        axes.axvspan(low, high, color="#333333", alpha=0.12, linewidth=0)
        axes.axvline(low, color="#333333", linewidth=1.2, linestyle="--")
        gives = f"{plans[0].gpu}: {format_bytes(plans[0].usable_bytes.low)}"
        axes.text(low, -0.62, gives, ha="center", va="bottom", fontsize=9)
        tokens = f"{plans[0].max_tokens_per_micro_batch} tokens in a micro-batch, rows of up to {plans[0].seq_len}"
        axes.set_title(f"{plans[0].model}: {tokens}", loc="left", pad=18)
        axes.set(xlim=(0, 1.3 * shown), ylim=(len(plans) - 0.4, -0.6), xlabel="GiB")
        axes.set_yticks(range(len(plans)), [p.method for p in plans])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        save_figure(figure, path)
