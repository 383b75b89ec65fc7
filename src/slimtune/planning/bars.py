"""Plans as bars, a bar per method against the line of what the card gives: in the terminal, or as SVG or PNG.

    lora  WWWWWWWWWWWWDGOAAALR··  │              18.6 GiB  fits
    full  WWWWWWWWWWWWGGGGGGGGGGGG│OOOOOOOOOOO»  81.0 GiB  does not fit

A letter is a part (`result.PARTS`), a dot what the allocator may take beside, `»` that the bar goes on.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ..errors import UsageError, format_names
from ..utils.files import write_atomic
from ..utils.formatting import format_bytes
from .result import PARTS, Plan

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from .gpus import Gpu

LOOKS = {
    "weights": ("W", "#a6cee3"),
    "adapters": ("D", "#fdbf6f"),
    "gradients": ("G", "#fb9a99"),
    "optimizer": ("O", "#cab2d6"),
    "activations": ("A", "#b2df8a"),
    "logits": ("L", "#ffed6f"),
    "runtime": ("R", "#d9d9d9"),
}
"""A part's letter and colour; black is legible on each."""
CUT_LINES, CUT_PICTURE = 2, 4
"""Bars are cut at so many times what the card gives: past that, those that fit would be too short to tell apart."""
SUFFIXES = (".svg", ".png")
BESIDE = "the allocator may add"
WIDEST = 120
GIB = 1 << 30


@dataclass(frozen=True)
class Span:
    """One piece of a bar, from byte to byte; `part` is one of `PARTS`, or "beside": what may be reserved, too."""

    part: str
    start: float
    end: float


def spans(plan: Plan) -> list[Span]:
    """Return the pieces of a plan's bar, in the order they are stacked."""
    ends = list(accumulate(plan.parts.get(part, 0) for part in PARTS))
    found = [Span(part, start, end) for part, start, end in zip(PARTS, [0, *ends], ends, strict=False)]
    return [s for s in (*found, Span("beside", ends[-1], plan.need.high)) if s.end > s.start]


def draw_bars(plans: Sequence[Plan], card: Gpu) -> RenderableType:
    """Return a stacked bar per plan against the card's line, for a rich console of any width from 60 columns.

    Args:
        plans: at least one.
        card: what the line is for: `usable` bytes.
    """
    return _Bars(plans, card)


@dataclass(frozen=True)
class _Bars:
    plans: Sequence[Plan]
    card: Gpu

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line, dot, _ = signs = ("|", ".", ">") if options.ascii_only else ("│", "·", "»")
        names = max(cell_len(p.method) for p in self.plans)
        ends = [f" {format_bytes(p.need.high):>10}  {p.verdict}" for p in self.plans]
        room = max(20, min(options.max_width, WIDEST) - names - 1 - max(map(len, ends)))
        shown = _shown(self.plans, self.card.usable, CUT_LINES)
        lines = sorted({min(int(b * room / shown), room - 1) for b in self.card.usable})

        gives, left = f"{self.card.name}: {format_bytes(self.card.usable[0])}", names + 1 + lines[0]
        yield Text(f"{gives} {line}".rjust(left + 1) if len(gives) < left else " " * left + f"{line} {gives}")
        for plan, end in zip(self.plans, ends, strict=True):
            bar = _bar(plan, room, shown, lines, signs)
            yield Text.assemble(f"{plan.method:<{names}} ", *bar, (end, "bold" if plan.verdict == "fits" else ""))
        yield Text()
        parts = [Text.assemble((letter, _style(colour)), f" {part}") for part, (letter, colour) in LOOKS.items()]
        rest = Text(f"{dot} {BESIDE}  {line} what the card gives  1 letter: {format_bytes(shown / room)}")
        for half in (parts[:6], [*parts[6:], rest]):
            yield Text("  ").join(half)


def _bar(
    plan: Plan, room: int, shown: float, lines: Sequence[int], signs: tuple[str, str, str]
) -> list[tuple[str, Style]]:
    """Return a bar's cells, letters with their style: `shown` bytes in `room` cells."""
    line, dot, more = signs
    cells = [(" ", Style())] * room
    for span in spans(plan):
        letter, colour = LOOKS.get(span.part, (dot, ""))
        for i in range(round(span.start * room / shown), min(round(span.end * room / shown), room)):
            cells[i] = (letter, _style(colour))
    if plan.need.high > shown:
        cells[-1] = (more, Style(bold=True))
    for i in lines:
        cells[i] = (line, Style(bold=True))
    return cells


def _style(colour: str) -> Style:
    return Style(color="black", bgcolor=colour) if colour else Style()


def write_plot(plans: Sequence[Plan], path: str | Path) -> None:
    """Draw a stacked bar per plan against the card's line, as a file.

    Args:
        plans: at least one, all for one card.
        path: where it goes, `.svg` or `.png`; a file that is there is written over.

    Raises:
        UsageError: another suffix, no such folder, or matplotlib is not installed.
        RunError: the disk is full.
    """
    path = require_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    card, usable = plans[0].card, plans[0].usable_bytes
    shown = _shown(plans, usable, CUT_PICTURE) / GIB
    low, high = (b / GIB for b in usable)
    # Text stays text in an SVG, and equal plans give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "slimtune", "font.size": 10}):
        figure = Figure(figsize=(9, 1.9 + 0.42 * len(plans)), layout="constrained")
        axes = figure.add_subplot()
        for row, plan in enumerate(plans):
            _draw(axes, row, plan, shown)
        axes.axvspan(low, high, color="#333333", alpha=0.12, linewidth=0)
        axes.axvline(low, color="#333333", linewidth=1.2, linestyle="--")
        axes.text(low, -0.62, f"{card}: {format_bytes(usable.low)}", ha="center", va="bottom", fontsize=9)
        axes.set_yticks(range(len(plans)), [p.method for p in plans])
        axes.set_ylim(len(plans) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * shown)
        axes.set_xlabel("GiB")
        axes.set_title(_title(plans[0]), loc="left", pad=18)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        picture, kind = io.BytesIO(), path.suffix.lower()[1:]
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomic(path, picture.getvalue())


def _draw(axes: Any, row: int, plan: Plan, shown: float) -> None:
    """Draw one bar; `shown` is where bars are cut, in GiB."""
    for span in spans(plan):
        start, end = (min(b / GIB, shown) for b in (span.start, span.end))
        letter, colour = LOOKS.get(span.part, ("", ""))
        look = {"color": colour} if colour else {"facecolor": "white", "edgecolor": "#777777", "hatch": "///"}
        label = f"{letter} {span.part}" if letter else BESIDE
        axes.barh(row, end - start, left=start, height=0.7, linewidth=0.5, label=label, **look)
        if letter and end - start > 0.02 * shown:
            axes.text((start + end) / 2, row, letter, ha="center", va="center", fontsize=8, color="#333333")
    need = plan.need.high / GIB
    verdict = f"{'» ' if need > shown else ''}{format_bytes(plan.need.high)}, {plan.verdict}"
    box = {"facecolor": "white", "linewidth": 0, "pad": 1}  # the card's line may pass here
    axes.text(min(need, shown) + 0.012 * shown, row, verdict, va="center", fontsize=9, bbox=box)


def require_plot(path: str | Path) -> Path:
    """Return the path of a picture after checking what can be checked before there are plans.

    Raises:
        UsageError: another suffix than `.svg` or `.png`, no such folder, or matplotlib is not installed.
    """
    import importlib.util

    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        what = f"a picture of the kind {path.suffix!r}" if path.suffix else "a picture without a suffix"
        raise UsageError(
            f"{str(path)!r} is {what}", f"one of {format_names(SUFFIXES)}", f"--plot {path.with_suffix('.svg')}"
        )
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {str(path.parent)!r} to write {path.name} into")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "pictures are drawn by matplotlib, which is not installed", hint="pip install 'slimtune[plot]'"
        )
    return path


def _shown(plans: Sequence[Plan], usable: Sequence[float], most: int) -> float:
    """Return the bytes that a whole line stands for."""
    return max(1.02 * usable[1], min(max(p.need.high for p in plans), most * usable[1]))


def _title(plan: Plan) -> str:
    return f"{plan.model}: {plan.max_tokens_per_micro_batch} tokens in a pass, rows of up to {plan.seq_len}"
