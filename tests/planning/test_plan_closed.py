"""The formula and the short trace, against the whole trace."""

from __future__ import annotations

from dataclasses import replace

import models_zoo as zoo
import pytest
import torch

import slimtune
from slimtune.planning.extrapolate import TOKENS, extrapolate_layers, fit_memory_model, with_num_layers
from slimtune.planning.memory_trace import BACKWARD, trace_memory
from slimtune.planning.training_job import TrainingJob

LORA = slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def job(name="llama", depth=6, **settings):
    base = with_num_layers(getattr(zoo, name)().config, 1)
    text = base.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        kinds = ["sliding_attention", "full_attention"] if name.startswith("gemma") else ["full_attention"]
        text.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    made = {"method": LORA, "dtype": torch.bfloat16, "lengths": (TOKENS,), "passes": 2, "device": "cuda"}
    return TrainingJob(base=base, **{**made, **settings})


@pytest.mark.parametrize("method", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize(("device", "checkpointing"), [("cuda", True), ("cuda", False), ("cpu", False)])
def test_the_formula_gives_what_is_traced(device, checkpointing, method):
    asked = job(device=device, checkpointing=checkpointing, method=method)
    form = fit_memory_model(asked)
    for lengths in ((TOKENS,), (3000,), (1000, 1500)):
        whole = trace_memory(replace(asked, lengths=lengths))
        state = sum(whole.state.values())
        assert abs(form.over_state(lengths) + state - whole.peak) < 0.005 * whole.peak
        assert form.corrected(lengths, whole).over_state(lengths) + state == pytest.approx(whole.peak, abs=1)


@pytest.mark.parametrize("lengths", [(1000,), (8000,), (3000, 2000)], ids=str)
def test_the_formula_knows_tiles_and_what_is_sent_away(lengths):
    """Shorter than a tile it bounds from above."""
    asked = job(checkpointing=True, offload=True, tile=2048, lengths=lengths)
    whole, form = trace_memory(asked), fit_memory_model(asked)
    over = form.over_state(lengths) + sum(whole.state.values()) - whole.peak
    assert over > 0 if sum(lengths) < 2048 else abs(over) < 0.005 * whole.peak
    assert extrapolate_layers(asked).host == whole.host


def test_one_very_long_row_is_not_filled_up():
    asked = job(checkpointing=True, lengths=(70_000,), depth=3)
    whole = trace_memory(asked)
    long, filled = (
        fit_memory_model(asked).over_state(n) + sum(whole.state.values()) for n in ((70_000,), (35_000, 35_000))
    )
    assert long == pytest.approx(whole.peak, rel=0.1)
    assert filled > long


def test_scores_that_are_kept_grow_with_the_square():
    """Gemma 2 caps its scores, so they are kept: one long row takes more than two of half its length."""
    form = fit_memory_model(job("gemma2"))
    assert form.over_state((4096,)) > 1.5 * form.over_state((2048, 2048))
    form = fit_memory_model(job())
    assert form.over_state((4096,)) == pytest.approx(form.over_state((2048, 2048)), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_two_layers_and_three_tell_of_all(name):
    asked = job(name, depth=6, lengths=(200,) if name != "gpt2" else (60,))
    whole, short = trace_memory(asked), extrapolate_layers(asked)
    if name == "gemma3":  # whose layers take turns: so small, it shows
        assert short.peak == pytest.approx(whole.peak, rel=0.02)
        return
    assert short.peak == whole.peak
    assert {**short.phases, BACKWARD[1]: whole.phases[BACKWARD[1]]} == whole.phases
    assert short.state == whole.state
    assert short.work == whole.work


def test_layers_that_differ_are_traced_one_by_one():
    """A rank for layer 5 alone does not show in the first three."""
    few = slimtune.LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[1, 5], rank_pattern={r"layers\.5\..*": 32},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    asked = job(method=few, lengths=(200,))
    assert extrapolate_layers(asked).phases == trace_memory(asked).phases  # also between the first layer and the last
    # And where the first three lack a named layer, the formula takes all of them.
    last = replace(asked, method=slimtune.LoraConfig(target_modules=["q_proj"], layers_to_transform=[5]))
    whole = trace_memory(replace(last, lengths=(2000,)))
    form = fit_memory_model(last)
    assert form.over_state((2000,)) + sum(whole.state.values()) == pytest.approx(whole.peak, rel=0.005)
