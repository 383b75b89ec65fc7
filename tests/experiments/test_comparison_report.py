"""The sentence of advice and the table, on results made by hand."""

from typing import Any

import pytest

from slimtune.experiments.comparison_report import format_markdown, format_row, mark_fronts, recommend_method


def line(method: str, reduction: float, *, half: float = 0.02, memory=2, size=10, time=60, **more: Any):
    return {
        "method": method, "loss_reduction": reduction, "loss_reduction_ci95": [reduction - half, reduction + half],
        "peak_bytes": memory << 30, "file_bytes": size << 20, "time_seconds": time, "seeds": [1, 2, 3], "rate": 2e-4,
        "rate_from": "default", "trained_percent": 1.25, "tuned_loss": 4.0, "front": [],
        "trained_tokens": [1000, 1010], "oom_events": 0, **more,
    }  # fmt: skip


def pair(a: str, b: str, low: float, high: float, *, beyond: bool):
    return {"a": a, "b": b, "ci95": [low, high], "beyond_noise": beyond}


def test_cheaper_of_equally_good():
    lines = [line("dora", 0.50, memory=3, time=90), line("lora", 0.49), line("ia3", 0.30, size=1)]
    pairs = [pair("dora", "lora", 0.0, 0.02, beyond=False), pair("dora", "ia3", 0.1, 0.3, beyond=True)]
    assert recommend_method(lines, pairs) == (
        "Take lora (loss reduction 0.490 nats per token, 0.470 to 0.510; 2.0 GiB, a file of 10.0 MiB, 1 min 0 s per "
        "run); dora and lora are as good as one another, within a tenth of the loss reduction; ia3 is worse than dora "
        "by 0.200 nats per token."
    )


def test_wide_interval_is_not_as_good():
    lines = [line("lora", 0.65), line("bottleneck", 0.59), line("prompt", 0.46, half=0.2, size=1, memory=1)]
    pairs = [
        pair("lora", "bottleneck", 0.04, 0.08, beyond=True),
        pair("lora", "prompt", -0.01, 0.39, beyond=False),
        pair("bottleneck", "prompt", -0.07, 0.33, beyond=False),
    ]
    advice = recommend_method(lines, pairs)
    assert advice.startswith("Take lora ")
    assert "prompt does not differ from lora beyond noise, but may be up to 0.390 worse: more seeds" in advice
    assert advice.endswith("bottleneck is worse than lora by 0.060 nats per token.")


def test_least_of_each_cost_is_named():
    lines = [line("a", 0.5, size=1), line("b", 0.49, time=10, memory=1), line("c", 0.48, memory=3)]
    advice = recommend_method(lines, [pair("a", "b", 0, 0.03, beyond=False), pair("a", "c", 0.01, 0.03, beyond=True)])
    assert advice.startswith("Take b")
    assert "a, b and c are as good as one another" in advice
    assert advice.endswith("of these a takes the least size.")


def test_costs_within_a_tenth_are_equal():
    lines = [line("a", 0.5, time=62, memory=2), line("b", 0.49, time=60, memory=2)]
    assert recommend_method(lines, [pair("a", "b", 0, 0.03, beyond=False)]).startswith("Take a")


def test_clear_winner_is_taken_at_any_cost():
    lines = [line("full", 0.9, memory=5, size=270), line("lora", 0.5), line("ia3", 0.4)]
    pairs = [pair("full", "lora", 0.3, 0.5, beyond=True), pair("full", "ia3", 0.4, 0.6, beyond=True)]
    advice = recommend_method(lines, pairs)
    assert advice.startswith("Take full")
    assert advice.endswith("lora and ia3 are worse than full by 0.400 to 0.500 nats per token.")


def test_reduction_within_noise():
    lines = [line("lora", 0.01), line("ia3", 0.0)]
    advice = recommend_method(lines, [pair("lora", "ia3", -0.1, 0.1, beyond=False)])
    assert advice.startswith("Take none of them: the loss reduction of the best, lora,")
    assert recommend_method([], []).startswith("No method has finished its runs")


def test_one_method_or_one_seed():
    assert recommend_method([line("lora", 0.5)], []) == (
        "Only lora was measured: loss reduction 0.500 nats per token, 0.480 to 0.520."
    )
    lines = [line("lora", 0.5, seeds=[1]), line("ia3", 0.3, seeds=[1])]
    assert recommend_method(lines, [pair("lora", "ia3", 0.1, 0.3, beyond=True)]) == (
        "No method is proven to be the best: with one seed, the effect of another seed is unknown (--seeds 3 measures "
        "it); with this one lora has the highest loss reduction (0.500 nats per token, 0.480 to 0.520); ia3 is behind "
        "by 0.200."
    )


def test_what_failed_is_named_and_not_ranked():
    lines = [line("ia3", 0.3), line("lora", 0.5, seeds=[1], ranked=False)]
    advice = recommend_method(lines, [])
    assert advice.startswith("Only ia3 was measured")
    assert advice.endswith("Not ranked, because a run failed: lora.")
    assert recommend_method(lines[1:], []).startswith("No method has finished its runs")
    assert format_row(lines[1])[-1] == "not ranked"


def test_what_does_not_help_is_best_for_nothing():
    lines = [line("lora", 0.5, ranked=True), line("ia3", -0.2, size=1, memory=1, time=1, ranked=True)]
    lines.append(line("full", 0.9, size=1, memory=1, time=1, ranked=False))
    for entry in lines:
        entry["front"] = []
    mark_fronts(lines)
    assert [m["front"] for m in lines] == [["memory", "size", "time"], [], []]


@pytest.mark.parametrize("incomplete", [False, True])
def test_markdown_table(incomplete):
    lines = [line("lora", 0.5, front=["memory", "size"], seeds=[1] if incomplete else [1, 2]), line("ia3", 0.4)]
    result = {
        "model": "m", "dtype": "bfloat16", "device": "cpu", "steps": 3, "seeds": [1, 2], "rows": 9, "test_tokens": 1234,
        "base_loss": 4.5, "methods": lines, "left_out": [], "failed": [], "advice": "Take lora.",
        "searched": {"lora": {"at_the_edge": incomplete}},
    }  # fmt: skip
    assert format_row(lines[0]) == (
        "lora", "0.0002 default", "1.25 %", "10.0 MiB", "2.0 GiB", "1 min 0 s", "4.000", "0.500 [0.480, 0.520]",
        "memory, size",
    )  # fmt: skip
    table = format_markdown(result)
    assert "3 steps, 1,000 to 1,010 trained tokens per run, 2 seeds; 9 held-out rows" in table
    assert "| ia3 | 0.0002 default | 1.25 % |" in table
    assert table.endswith("Take lora.\n")
    assert ("lora has 1 of 2 seeds, so it is not ranked." in table) == incomplete
    assert ("lies at the edge of the searched range" in table) == incomplete
