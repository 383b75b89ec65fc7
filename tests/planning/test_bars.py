"""Plans as bars: as long as their bytes, with the GPU's line in place, legible in 80 columns without colour."""

import io

import pytest
from hand_plan import FULL, hand_plan
from rich.console import Console

from slimtune.cli.plan_chart import ALLOCATOR, COLOURS, make_memory_bars, write_plan_chart
from slimtune.core.foundation.formatting import format_bytes
from slimtune.errors import UsageError
from slimtune.planning.gpu_specs import make_gpu_with_memory, require_gpu_by_name
from slimtune.planning.plan_result import PARTS

GPU = require_gpu_by_name("rtx-3090")
CUT = hand_plan("full", sizes=FULL, verdict="does not fit")


def draw(*plans, gpu=GPU, width=80, **settings):
    screen = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True, **settings)
    screen.print(make_memory_bars(plans, gpu, screen))
    return screen.file.getvalue().splitlines()


def test_bar_is_as_long_as_its_bytes():
    head, row, *_ = draw(hand_plan())
    bar = row.removeprefix("lora ").removesuffix("   19.0 GiB  fits")
    sizes = dict(zip([*COLOURS, "·"], [15, 0.25, 0.25, 0.5, 1.5, 0.5, 0.5, 0.5], strict=True))
    scale = len(bar) / (1.02 * GPU.usable.high / (1 << 30))  # a whole line is 2 % more than what the GPU gives
    assert all(abs(bar.count(letter) - size * scale) <= 1 for letter, size in sizes.items())
    order = "".join(dict.fromkeys(bar.replace(" ", "").replace("│", "")))
    assert order == "".join(letter for letter in sizes if letter in order)
    assert head.index("│") == row.index("│") == pytest.approx(5 + GPU.usable.low / (1 << 30) * scale, abs=1)
    assert f"rtx-3090: {format_bytes(GPU.usable.low)}" in head


def test_bars_are_aligned():
    head, first, second, *_ = draw(hand_plan(), hand_plan("trainable_tokens", verdict="tight"))
    assert head.index("│") == first.index("│") == second.index("│")
    assert first.index("GiB") == second.index("GiB")
    assert second.startswith("trainable_tokens W")
    assert second.endswith("19.0 GiB  tight")


def test_long_bar_passes_the_line_and_is_cut():
    row = draw(CUT)[1]
    assert row.index("│") < row.index("O") < row.index("»")
    assert row.endswith("63.0 GiB  does not fit")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_width(width):
    assert max(map(len, draw(hand_plan(), CUT, width=width)[:3])) <= width
    assert width < 80 or max(map(len, draw(hand_plan(), CUT, width=width))) <= width


def test_legend():
    legend = " ".join(draw(hand_plan())[-2:])
    for text in (*map(" ".join, zip(COLOURS, PARTS, strict=True)), f"· {ALLOCATOR}", "│ what the card gives"):
        assert text in legend
    assert "1 letter: 4" in legend


def test_colour_is_added_to_letters():
    assert "\x1b[30;48;2;166;206;227mW" in "\n".join(draw(hand_plan(), force_terminal=True, color_system="truecolor"))
    assert "\x1b" not in "\n".join(draw(hand_plan()))


def test_ascii_terminal():
    screen = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, soft_wrap=True)
    screen.print(make_memory_bars([CUT], GPU, screen))
    screen.file.flush()
    assert b">" in screen.file.buffer.getvalue().splitlines()[1]


def test_name_does_not_fit_before_the_line():
    small = make_gpu_with_memory("1GiB")
    head, row, *_ = draw(hand_plan(card=small, verdict="does not fit"), gpu=small)
    assert head.strip() == f"│ 1.0 GiB of GPU memory: {format_bytes(small.usable.low)}"
    assert head.index("│") == row.index("│")


def test_svg_has_everything_as_text(tmp_path):
    write_plan_chart([hand_plan(), hand_plan("ia3", verdict="tight"), CUT], tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    for part in (
        "llama-3.1-8b: 2048 tokens in a micro-batch, rows of up to 2048", ">lora<", ">ia3<", ">full<", "19.0 GiB, fits",
        "19.0 GiB, tight", "63.0 GiB, does not fit", f"rtx-3090: {format_bytes(GPU.usable.low)}", ">R runtime<",
        ALLOCATOR,
    ):  # fmt: skip
        assert part in text
    assert text.count(">W weights<") == 1
    write_plan_chart([hand_plan(), hand_plan("ia3", verdict="tight"), CUT], tmp_path / "again.SVG")
    assert (tmp_path / "again.SVG").read_text() == text


def test_png_and_cut_bar(tmp_path):
    plan = hand_plan(sizes=(150.0, *FULL[1:]), verdict="does not fit")
    write_plan_chart([plan], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    write_plan_chart([plan], tmp_path / "plan.svg")
    assert "» 198.0 GiB, does not fit" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(("name", "message"), [("plan.pdf", "suffix '.pdf'"), ("no/plan.svg", "there is no folder")])
def test_bad_plot_path(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        write_plan_chart([hand_plan()], tmp_path / name)
    assert list(tmp_path.iterdir()) == []
