"""Plans as bars: as long as their bytes, the card's line where it belongs, legible in 80 columns without colour."""

import importlib.util
import io
from itertools import pairwise

import pytest
from hand_plan import FULL, GIB, hand_plan
from rich.console import Console

from slimtune.errors import UsageError
from slimtune.planning.bars import LETTERS, Span, bar_spans, draw_bars, write_plot
from slimtune.planning.gpus import find_gpu, gpu_with_memory
from slimtune.planning.result import PARTS, Range
from slimtune.reporting.charts import require_figure_path
from slimtune.utils.formatting import format_bytes

CARD = find_gpu("rtx-3090")


def lines(plans, card=CARD, width=80, **how) -> list[str]:
    screen = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True, **how)
    screen.print(draw_bars(plans, card))
    return screen.file.getvalue().splitlines()


def cells(row: str) -> str:
    """Return the bar in a row 80 wide: after a method's name of four letters, before `  19.0 GiB  fits`."""
    return row[5 : -len(f" {0:>10}  {row.partition('GiB  ')[2]}")]


# --- spans


def test_every_part_has_a_look_of_its_own():
    assert tuple(LETTERS) == PARTS
    assert (
        len({letter for letter, _ in LETTERS.values()}) == len({colour for _, colour in LETTERS.values()}) == len(PARTS)
    )


def test_spans_are_the_parts_in_order_then_what_the_allocator_may_add():
    found = bar_spans(hand_plan())
    assert [s.part for s in found] == [*PARTS, "allocator"]
    assert [(s.end - s.start) / GIB for s in found[:-1]] == [15.0, 0.25, 0.25, 0.5, 1.5, 0.5, 0.5]
    assert all(a.end == b.start for a, b in pairwise(found))
    assert found[-1].end == hand_plan().need.high == 19.0 * GIB


def test_an_empty_part_and_a_missing_one_take_no_room():
    plan = hand_plan(sizes=FULL)
    assert "adapters" not in [s.part for s in bar_spans(plan)]
    del plan.parts["adapters"]
    assert bar_spans(plan)[:2] == [Span("weights", 0, 15 * GIB), Span("gradients", 15 * GIB, 30 * GIB)]


# --- in the terminal


def test_a_bar_is_as_long_as_its_bytes():
    # A whole line stands for 2 % more than what the card gives at most.
    head, row, *_ = lines([hand_plan()])
    bar = cells(row)
    scale = len(bar) / (1.02 * CARD.usable[1])
    assert row.startswith("lora W")
    assert abs(bar.count("W") - 15 * GIB * scale) <= 1
    assert abs(bar.count("A") - 1.5 * GIB * scale) <= 1
    assert abs(bar.count("·") - 0.5 * GIB * scale) <= 1
    order = "".join(dict.fromkeys(bar.replace(" ", "").replace("│", "")))
    assert order == "".join(letter for letter in "WDGOALR·" if letter in order)
    assert head.index("│") == row.index("│")
    assert abs(row.index("│") - len("lora ") - CARD.usable[0] * scale) <= 1
    assert f"rtx-3090: {format_bytes(CARD.usable[0])}" in head
    assert row.endswith("19.0 GiB  fits")


def test_names_and_lines_stand_below_each_other():
    plans = [hand_plan(), hand_plan("trainable_tokens", verdict="tight")]
    head, first, second, *_ = lines(plans)
    assert head.index("│") == first.index("│") == second.index("│")
    assert second.startswith("trainable_tokens W")
    assert second.endswith("19.0 GiB  tight")
    assert first.index("GiB") == second.index("GiB")


def test_a_bar_goes_through_the_line_and_a_very_long_one_is_cut():
    plan = hand_plan("full", sizes=FULL, verdict="does not fit")
    _, row, *_ = lines([plan])
    bar = cells(row)
    assert bar.endswith("»")
    assert bar.index("│") < bar.index("O")
    assert row.endswith("63.0 GiB  does not fit")
    shorter = lines([hand_plan("full", sizes=(15, 0, 15, 5, 1.5, 0.5, 0.5))])[1]
    assert "»" not in shorter
    assert "·" in shorter


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_screen(width):
    plans = [hand_plan(), hand_plan("full", sizes=FULL, verdict="does not fit")]
    assert max(map(len, lines(plans, width=width)[:3])) <= width
    assert max(map(len, lines(plans, width=max(width, 80)))) <= max(width, 80)


def test_letters_are_explained_and_a_letter_is_so_many_bytes():
    legend = " ".join(lines([hand_plan()])[-2:])
    for part, (letter, _) in LETTERS.items():
        assert f"{letter} {part}" in legend
    assert "· the allocator may add" in legend
    assert "│ what the card gives" in legend
    bar = cells(lines([hand_plan()])[1])
    assert f"1 letter: {1.02 * CARD.usable[1] / len(bar) / (1 << 20):.1f} MiB" in legend


def test_colour_is_beside_the_letters_not_in_their_place():
    coloured = "\n".join(lines([hand_plan()], force_terminal=True, color_system="truecolor"))
    assert "\x1b[30;48;2;166;206;227mW" in coloured
    assert "\x1b" not in "\n".join(lines([hand_plan()]))


def test_a_terminal_of_ascii_alone():
    screen = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, soft_wrap=True)
    screen.print(draw_bars([hand_plan("full", sizes=FULL)], CARD))
    screen.file.flush()
    text = screen.file.buffer.getvalue().decode()
    assert text.isascii()
    assert ">" in text.splitlines()[1]


def test_a_card_too_small_for_the_name_of_its_line():
    small = gpu_with_memory("1GiB")
    head, row, *_ = lines([hand_plan(card=small, verdict="does not fit")], small)
    assert head.strip() == f"│ 1.0 GiB of GPU memory: {format_bytes(small.usable[0])}"
    assert head.index("│") == row.index("│")


# --- as a file


def test_svg_says_everything_in_text(tmp_path):
    plans = [hand_plan(), hand_plan("ia3", verdict="tight"), hand_plan("full", sizes=FULL, verdict="does not fit")]
    write_plot(plans, tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert text.startswith("<?xml")
    for said in (
        "llama-3.1-8b: 2048 tokens in a micro-batch, rows of up to 2048", ">lora<", ">ia3<", ">full<", "19.0 GiB, fits",
        "19.0 GiB, tight", "63.0 GiB, does not fit", f"rtx-3090: {format_bytes(CARD.usable[0])}", ">W weights<",
        ">R runtime<", "the allocator may add",
    ):  # fmt: skip
        assert said in text
    assert text.count(">W weights<") == 1, "one line of the legend for all bars"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.svg"]


def test_equal_plans_give_equal_files(tmp_path):
    for name in ("a.svg", "b.SVG"):
        write_plot([hand_plan()], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()


def test_png_and_a_bar_that_is_cut(tmp_path):
    plan = hand_plan(sizes=(150.0, *FULL[1:]), verdict="does not fit")
    write_plot([plan], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    write_plot([plan], tmp_path / "plan.svg")
    assert "» 198.0 GiB, does not fit" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [("plan.pdf", "suffix '.pdf'"), ("plan", "has no suffix"), ("no/plan.svg", "there is no folder")],
)
def test_a_picture_that_cannot_be(tmp_path, name, says):
    with pytest.raises(UsageError, match=says):
        write_plot([hand_plan()], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_pip_line_is_given(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(UsageError, match=r"pip install 'slimtune\[plot\]'"):
        require_figure_path(tmp_path / "plan.svg")


def test_a_band_of_the_runtime_is_part_of_the_need():
    plan = hand_plan(runtime_bytes=Range(0.5 * GIB, 1.5 * GIB))
    assert bar_spans(plan)[-1].end == 20.0 * GIB
