"""Axes enclose what they show, points are where the axis says, long curves are thinned, colours are legible."""

import math
import re
from importlib.resources import files

import pytest
from contrast import contrast
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from slimtune.errors import UsageError
from slimtune.evaluation.charts import (
    MAX_POINTS,
    ChartEstimate,
    ChartLine,
    choose_axis_ticks,
    format_chart_number,
    render_interval_chart,
    render_length_histogram,
    render_line_chart,
    require_figure_path,
    save_figure,
)

values = st.floats(-1e9, 1e9, allow_nan=False)


@given(values, values, st.integers(2, 8))
def test_ticks_enclose_the_range(a, b, about):
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(1, abs(low), abs(high)):
        return
    ticks = choose_axis_ticks(low, high, about)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    slack = 1e-6 * step
    assert low - step - slack < ticks[0] <= low + slack
    assert high - slack <= ticks[-1] < high + step + slack
    assert len(ticks) <= about + 3
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(leading - m) for m in (1, 2, 5, 10)) < 1e-6


@pytest.mark.parametrize("value", [0, 4, -1e-9])
def test_single_value_is_inside_its_axis(value):
    ticks = choose_axis_ticks(value, value, 4)
    assert ticks[0] < value < ticks[-1]


def test_line_is_where_its_axis_says():
    chart = Page(render_line_chart("Loss", "nats", [ChartLine("training", "one", [(1, 4.0), (2, 3.0), (5, 2.0)])]))
    assert chart.all("polyline")[0]["points"] == "0.0,0.0 250.0,500.0 1000.0,1000.0"
    assert [a["style"] for a in chart.all("span") if "top" in (a.get("style") or "")] == [
        f"top:{at}%" for at in ("100.0", "75.0", "50.0", "25.0", "0.0")
    ]
    assert re.findall(r"\d+", chart.all("svg")[0]["aria-label"]) == ["1", "4", "5", "2"]


def test_nan_is_left_out():
    assert not render_line_chart("Loss", "", [ChartLine("a", "one", [(1, math.nan), (2, math.inf)])])
    chart = Page(
        render_line_chart("Loss", "", [ChartLine("a", "one", [(1, math.nan), (2, 3.0)]), ChartLine("b", "two", [])])
    )
    assert len(chart.all("line", "dot")) == 1, "a single point shows no line, so it gets a marker"
    assert not render_interval_chart([ChartEstimate("base", "one", None, [1, 2], "")])


def test_many_points_are_averaged():
    n = 10 * MAX_POINTS + 5
    chart = Page(render_line_chart("Loss", "", [ChartLine("training", "one", [(i, float(i % 2)) for i in range(n)])]))
    assert len(chart.all("rect", "hit")) <= MAX_POINTS
    assert re.search(r"\b11\b", chart.text)


def test_interval_is_where_its_axis_says():
    chart = Page(render_interval_chart([ChartEstimate("loss", "two", 0.8, [0.7, 0.9], "text")], [(0.0, "")]))
    (interval,), (dot,), (mark,) = (chart.all("line", kind) for kind in ("range", "dot", "mark"))
    assert [t for t in chart.texts if t in ("0", "0.5", "1")] == ["0", "0.5", "1"]
    assert [float(x) for x in (interval["x1"], dot["x1"], interval["x2"], mark["x1"])] == [700, 800, 900, 0]


def test_histogram_columns_are_adjacent():
    bins = [{"from": 31 + 22 * i, "to": 52 + 22 * i, "rows": n} for i, n in enumerate([96, 230, 190, 112])]
    chart = Page(render_length_histogram(bins, limit=75))
    columns = [(float(c["x"]), float(c["width"]), float(c["height"])) for c in chart.all("rect", "column")]
    assert [x + wide for x, wide, _ in columns] == pytest.approx([*(x for x, _, _ in columns[1:]), 1000], abs=0.2)
    assert [height for _, _, height in columns] == pytest.approx([1000 * n / 230 for n in (96, 230, 190, 112)], abs=0.1)
    assert float(chart.all("line", "limit")[0]["x1"]) == pytest.approx(1000 * (75 - 31) / 88, abs=0.1)
    assert not render_length_histogram([])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0005, "5e-4"), (0, "0"), (523.4, "523"), (4.0834, "4.083"), (-0.00012, "-1.2e-4")]
)
def test_format_number(value, text):
    assert format_chart_number(value) == text


def test_figure_file(tmp_path):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = require_figure_path(tmp_path / f"a{suffix}")
        save_figure(figure_class(), path)
        assert path.read_bytes().startswith(start)
    for bad in ("a.gif", "a", "no/a.svg"):
        with pytest.raises(UsageError):
            require_figure_path(tmp_path / bad)


# --- colours ---------------------------------------------------------------------------------------------------------


def colors(scheme: str) -> dict[str, str]:
    style = files("slimtune.evaluation").joinpath("report.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in style.split("@media screen", 1))
    return light if scheme == "light" else {**light, **{k: v for k, v in dark.items() if k in light}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_are_legible(scheme):
    """WCAG 2: contrast of 4.5 for text, of 3 for what is drawn."""
    named = colors(scheme)
    for text in ("ink", "soft", "one", "two", "good", "warn", "bad"):
        for background in ("paper", "card"):
            assert contrast(named[text], named[background]) >= 4.5, (text, background)
    assert contrast(named["ink"], named["mark"]) >= 4.5
    for drawn in ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime"):
        assert contrast(named[drawn], named["paper"]) >= 3, drawn
