"""A base divided over processes: each plans its part of the weights, whole adapters, and what is gathered."""

from __future__ import annotations

import dataclasses

from slimtune.models.registry import get_model_info
from slimtune.planning.fsdp import Weights, weight_bytes
from slimtune.planning.gpus import find_gpu
from slimtune.planning.planner import make_plan
from slimtune.planning.request import PlanRequest

GIB = 1 << 30


def plan(card: str, processes: int):
    request = PlanRequest(get_model_info("llama-3.1-8b"), find_gpu(card), settings={"r": 16}, batch=1, seq_len=1024)
    return make_plan(dataclasses.replace(request, processes=processes, divided=processes > 1), "lora", quick=True)


def test_what_one_of_several_processes_holds():
    weights = Weights(every=100, layer=10, rest=20)
    assert weights.held(4) == (25 + 20 + 10, 25 + 20 + 30)
    assert weights.held(2).low == 50 + 20 + 10
    tiny = Weights(every=30, layer=15, rest=0)
    assert tiny.held(2).low == 30  # never more than the whole


def test_the_weights_of_a_model_are_told_apart():
    outline = get_model_info("llama-3.1-8b")
    request = PlanRequest(outline, find_gpu("rtx-4090"))
    weights = weight_bytes(request.job("lora").outline())
    assert weights.every == 2 * 8_030_261_248  # as published, in bf16
    assert weights.rest == 2 * (2 * 128256 * 4096 + 4096)
    assert weights.layer * 32 + weights.rest == weights.every


def test_a_base_too_large_for_a_card_fits_four():
    whole, four = plan("rtx-3060-12gb", 1), plan("rtx-3060-12gb", 4)
    assert whole.verdict == "does not fit"
    assert four.parts["weights"] < whole.parts["weights"] / 2 + GIB
    assert four.parts["adapters"] == whole.parts["adapters"]
    assert four.parts["optimizer"] == whole.parts["optimizer"]
    assert four.total_params == whole.total_params
    assert "the base is divided over 4 processes" in four.reason
    assert "divided base: computed" in four.evidence["parts"]
    # The upper end counts what is gathered beside a layer.
    layer = 2 * 218_112_000
    assert four.reserved_bytes.high - four.reserved_bytes.low > 2 * 0.9 * layer


def test_a_base_that_is_not_divided_is_whole_in_each():
    request = PlanRequest(
        get_model_info("llama-3.1-8b"), find_gpu("rtx-3060-12gb"), settings={"r": 16}, batch=1, processes=4
    )
    found = make_plan(request, "lora", quick=True, advise=False)
    assert found.parts == plan("rtx-3060-12gb", 1).parts
    assert "whole in each of 4 processes" in found.reason
