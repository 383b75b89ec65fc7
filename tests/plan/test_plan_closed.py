"""The formula and the short trace, against the whole trace."""

from __future__ import annotations

from dataclasses import replace

import models_zoo as zoo
import pytest
import torch

import slimtune
from slimtune.plan.closed import TOKENS, extrapolated, form_of, shallow
from slimtune.plan.job import Job
from slimtune.plan.trace import BACKWARD, trace

LORA = slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def job(name="llama", depth=6, **settings):
    base = shallow(getattr(zoo, name)().config, 1)
    text = base.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        kinds = ["sliding_attention", "full_attention"] if name.startswith("gemma") else ["full_attention"]
        text.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    made = {"method": LORA, "dtype": torch.bfloat16, "lengths": (TOKENS,), "passes": 2, "device": "cuda"}
    return Job(base=base, **{**made, **settings})


@pytest.mark.parametrize("method", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize(("device", "checkpointing"), [("cuda", True), ("cuda", False), ("cpu", False)])
def test_the_formula_gives_what_is_traced(device, checkpointing, method):
    asked = job(device=device, checkpointing=checkpointing, method=method)
    form = form_of(asked)
    for lengths in ((TOKENS,), (3000,), (1000, 1500)):
        whole = trace(replace(asked, lengths=lengths))
        state = sum(whole.state.values())
        assert abs(form.over_state(lengths) + state - whole.peak) < 0.005 * whole.peak
        assert form.corrected(lengths, whole).over_state(lengths) + state == pytest.approx(whole.peak, abs=1)


@pytest.mark.parametrize("lengths", [(1000,), (8000,), (3000, 2000)], ids=str)
def test_the_formula_knows_tiles_and_what_is_sent_away(lengths):
    """Shorter than a tile it bounds from above."""
    asked = job(checkpointing=True, offload=True, tile=2048, lengths=lengths)
    whole, form = trace(asked), form_of(asked)
    over = form.over_state(lengths) + sum(whole.state.values()) - whole.peak
    assert over > 0 if sum(lengths) < 2048 else abs(over) < 0.005 * whole.peak
    assert extrapolated(asked).host == whole.host


def test_one_very_long_row_is_not_filled_up():
    asked = job(checkpointing=True, lengths=(70_000,), depth=3)
    whole = trace(asked)
    long, filled = (form_of(asked).over_state(n) + sum(whole.state.values()) for n in ((70_000,), (35_000, 35_000)))
    assert long == pytest.approx(whole.peak, rel=0.1)
    assert filled > long


def test_scores_that_are_kept_grow_with_the_square():
    """Gemma 2 caps its scores, so they are kept: one long row takes more than two of half its length."""
    form = form_of(job("gemma2"))
    assert form.over_state((4096,)) > 1.5 * form.over_state((2048, 2048))
    form = form_of(job())
    assert form.over_state((4096,)) == pytest.approx(form.over_state((2048, 2048)), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_two_layers_and_three_tell_of_all(name):
    asked = job(name, depth=6, lengths=(200,) if name != "gpt2" else (60,))
    whole, short = trace(asked), extrapolated(asked)
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
    assert extrapolated(asked).phases == trace(asked).phases  # also between the first layer and the last
    # And where the first three lack a named layer, the formula takes all of them.
    last = replace(asked, method=slimtune.LoraConfig(target_modules=["q_proj"], layers_to_transform=[5]))
    whole = trace(replace(last, lengths=(2000,)))
    form = form_of(last)
    assert form.over_state((2000,)) + sum(whole.state.values()) == pytest.approx(whole.peak, rel=0.005)
