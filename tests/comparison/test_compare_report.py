"""The sentence of advice, on lines made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from slimtune.comparison.report import advice
from slimtune.comparison.table import cells, markdown


def line(method: str, gain: float, *, half: float = 0.02, memory: int = 2, size: int = 10, time: int = 60, **more: Any):
    return {
        "method": method, "loss_reduction": gain, "loss_reduction_ci95": [gain - half, gain + half], "peak_bytes": memory << 30,
        "file_bytes": size << 20, "time_seconds": time, "seeds": [1, 2, 3], "rate": 2e-4, "rate_from": "default",
        "trained_percent": 1.25, "tuned_loss": 4.0, "front": [], "trained_tokens": [1000, 1010], "out_of_memory": 0,
        **more,
    }  # fmt: skip


def pair(a: str, b: str, low: float, high: float, *, beyond: bool):
    return {"a": a, "b": b, "ci95": [low, high], "beyond_noise": beyond}


def test_the_cheaper_of_those_that_are_as_good_is_taken():
    lines = [line("dora", 0.50, memory=3, time=90), line("lora", 0.49), line("ia3", 0.30, size=1)]
    said = advice(lines, [pair("dora", "lora", 0.0, 0.02, beyond=False), pair("dora", "ia3", 0.1, 0.3, beyond=True)])
    assert said == (
        "Take lora (gain 0.490 nats a token, 0.470 to 0.510; 2.0 GiB, a file of 10.0 MiB, 1 min 0 s a run); dora and "
        "lora are as good as one another, within a tenth of the gain; ia3 gains 0.200 nats a token less than dora."
    )


def test_not_to_be_told_from_the_best_is_not_to_be_as_good():
    # Cheaper and within noise; but the interval is wide, and a more surely measured one that gains more is worse.
    lines = [line("lora", 0.65), line("bottleneck", 0.59), line("prompt", 0.46, half=0.2, size=1, memory=1)]
    pairs = [
        pair("lora", "bottleneck", 0.04, 0.08, beyond=True),
        pair("lora", "prompt", -0.01, 0.39, beyond=False),
        pair("bottleneck", "prompt", -0.07, 0.33, beyond=False),
    ]
    said = advice(lines, pairs)
    assert said.startswith("Take lora ")
    assert "prompt does not differ from lora beyond noise, but it may gain up to 0.390 less: more seeds" in said
    assert said.endswith("bottleneck gains 0.060 nats a token less than lora.")


def test_each_cost_names_its_own_where_several_are_as_good():
    lines = [line("a", 0.5, size=1), line("b", 0.49, time=10, memory=1), line("c", 0.48, memory=3)]
    said = advice(lines, [pair("a", "b", 0, 0.03, beyond=False), pair("a", "c", 0.01, 0.03, beyond=True)])
    assert said.startswith("Take b")
    assert "a, b and c are as good as one another" in said
    assert said.endswith("of these a takes the least size.")


def test_costs_within_a_tenth_are_alike():
    lines = [line("a", 0.5, time=62, memory=2), line("b", 0.49, time=60, memory=2)]
    assert advice(lines, [pair("a", "b", 0, 0.03, beyond=False)]).startswith("Take a")


def test_where_the_best_is_alone_it_is_taken_whatever_it_costs():
    lines = [line("full", 0.9, memory=5, size=270), line("lora", 0.5), line("ia3", 0.4)]
    said = advice(lines, [pair("full", "lora", 0.3, 0.5, beyond=True), pair("full", "ia3", 0.4, 0.6, beyond=True)])
    assert said.startswith("Take full")
    assert said.endswith("lora and ia3 gain 0.400 to 0.500 nats a token less than full.")


def test_no_gain_beyond_noise_is_no_advice_to_train():
    lines = [line("lora", 0.01), line("ia3", 0.0)]
    said = advice(lines, [pair("lora", "ia3", -0.1, 0.1, beyond=False)])
    assert said.startswith("Take none of them: the gain of the best, lora,")
    assert advice([], []).startswith("No cell was finished")


def test_one_method_and_one_seed():
    assert advice([line("lora", 0.5)], []) == "lora alone was measured: gain 0.500 nats a token, 0.480 to 0.520."
    lines = [line("lora", 0.5, seeds=[1]), line("ia3", 0.3, seeds=[1])]
    said = advice(lines, [pair("lora", "ia3", 0.1, 0.3, beyond=True)])
    assert "what another seed would give is not known" in said
    assert "ia3 does not differ from lora beyond noise;" in advice(lines, [])  # no seed in common


@pytest.mark.parametrize("missing", [False, True])
def test_the_table(missing):
    lines = [line("lora", 0.5, front=["memory", "size"], seeds=[1] if missing else [1, 2]), line("ia3", 0.4)]
    result = {
        "model": "m", "dtype": "bfloat16", "device": "cpu", "steps": 3, "seeds": [1, 2], "rows": 9, "test_tokens": 1234,
        "base_loss": 4.5, "methods": lines, "left_out": [], "failed": [], "advice": "Take lora.",
        "searched": {"lora": {"at_the_edge": missing}},
    }  # fmt: skip
    assert cells(lines[0]) == ("lora", "0.0002 default", "1.25 %", "10.0 MiB", "2.0 GiB", "1 min 0 s", "4.000",
                               "0.500 [0.480, 0.520]", "memory, size")  # fmt: skip
    said = markdown(result)
    assert "3 steps, 1,000 to 1,010 trained tokens a cell, 2 seeds; 9 held-out rows, 1,234 supervised tokens" in said
    assert "| ia3 | 0.0002 default | 1.25 % |" in said
    assert said.endswith("Take lora.\n")
    assert ("lora has 1 of 2 seeds." in said) == missing
    assert ("lies at the edge of the range" in said) == missing
