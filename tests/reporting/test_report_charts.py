"""Numbers to places: axes hold what they show, curves are thinned honestly, colours can be read."""

from __future__ import annotations

import math
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.reporting.charts import MOST_POINTS, curves, number, ticks, whiskers

values = st.floats(-1e9, 1e9, allow_nan=False)


@given(values, values, st.integers(2, 8))
def test_ticks_hold_the_range_in_round_even_steps(a, b, about):
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(1, abs(low), abs(high)):
        return
    found = ticks(low, high, about)
    step = (found[-1] - found[0]) / (len(found) - 1)
    slack = 1e-6 * step
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert found[0] > low - step - slack
    assert found[-1] < high + step + slack
    assert len(found) <= about + 2
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(leading - m) for m in (1, 2, 5, 10)) < 1e-6


def test_one_value_has_room_around_it():
    assert ticks(4, 4, 4)[0] < 4 < ticks(4, 4, 4)[-1]
    assert ticks(0, 0, 4)[0] < 0 < ticks(0, 0, 4)[-1]


def test_a_curve_lies_where_its_axis_says():
    drawn = curves("Loss", "nats", [("training", "one", [(1, 4.0), (2, 3.0), (5, 2.0)], False)])
    assert [(t.at, t.text) for t in drawn.ys] == [(100, "2"), (75, "2.5"), (50, "3"), (25, "3.5"), (0, "4")]
    assert drawn.lines[0].path == "0.0,0.0 250.0,500.0 1000.0,1000.0"
    assert drawn.text == "training from step 1: 4 to step 5: 2"


def test_what_is_no_number_is_not_drawn():
    assert curves("Loss", "", [("training", "one", [(1, math.nan), (2, math.inf)], False)]) is None
    drawn = curves("Loss", "", [("a", "one", [(1, math.nan), (2, 3.0)], False), ("b", "two", [], True)])
    assert [len(line.points) for line in drawn.lines] == [1]
    assert drawn.lines[0].dots  # a single point would show no line
    assert whiskers([("base", "one", None, [1, 2], "")]) is None


def test_many_points_are_averaged_and_it_is_said():
    n = 10 * MOST_POINTS + 5
    drawn = curves("Loss", "", [("training", "one", [(i, float(i % 2)) for i in range(n)], False)])
    (line,) = drawn.lines
    assert len(line.points) <= MOST_POINTS
    assert line.each == 11
    assert line.points[-1][2].startswith(f"step {n - 1}:")


def test_a_whisker_lies_where_its_axis_says():
    drawn = whiskers([("loss_reduction", "two", 0.8, [0.7, 0.9], "")], [(0.0, "")])
    ends = {t.text: 10 * t.at for t in drawn.xs}
    (row,) = drawn.rows
    place = lambda x: 1000 * (x - 0) / float(max(ends, key=float))  # noqa: E731
    assert (row.low, row.dot, row.high) == pytest.approx((place(0.7), place(0.8), place(0.9)), abs=0.1)
    assert drawn.marks[0].at == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0.0005, "5e-4"), (0, "0"), (523.4, "523"), (4.0834, "4.083"), (-0.00012, "-1.2e-4")]
)
def test_numbers_of_curves(value, text):
    assert number(value) == text


# --- colours ---------------------------------------------------------------------------------------------------------


def colours() -> list[dict[str, str]]:
    style = files("slimtune.reporting").joinpath("templates", "report.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in style.split("@media screen", 1))
    return [light, {**light, **{k: v for k, v in dark.items() if k in light}}]


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
               for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    """WCAG 2: 4.5 for text, 3 for what is drawn."""
    named = colours()[scheme]
    for text in ("ink", "soft", "one", "two", "good", "warn", "bad"):
        for ground in ("paper", "card"):
            assert contrast(named[text], named[ground]) >= 4.5, (text, ground)
    assert contrast(named["ink"], named["mark"]) >= 4.5
    for drawn in ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime"):
        assert contrast(named[drawn], named["paper"]) >= 3, drawn
