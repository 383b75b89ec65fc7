"""Whole plans: verdicts, what fits, advice, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import models_zoo as zoo
import pytest

from slimtune.errors import UsageError
from slimtune.models.known import Outline, outline_of
from slimtune.plan.cards import Card, find_card, memory_card
from slimtune.plan.plan import plan_of, plans
from slimtune.plan.request import Request, every_method, request_of
from slimtune.plan.result import PARTS
from slimtune.plan.verdict import verdict_on
from slimtune.recipe import Recipe

TINY = Outline("tiny", "tiny", zoo.llama(layers=4).config, "a test")
ROOMY = memory_card("8GiB")


def asked(card=ROOMY, **fields):
    return Request(TINY, card, **{"seq_len": 64, "settings": {"rank": 4}, **fields})


def test_llama_3_1_8b_on_the_cards_people_ask_about():
    """The question of the README, answered: LoRA fits 24 GiB, full fine-tuning needs 64 GB, NF4 fits 12 GiB."""
    base = outline_of("llama-3.1-8b")
    row = {"seq_len": 2048, "accumulate": 4, "checkpointing": True, "settings": {"rank": 16}}
    ask = Request(base, find_card("rtx-3090"), **row)
    lora = plan_of(ask, "lora", quick=True)
    assert lora.verdict == "fits"
    assert 17e9 < lora.allocated_bytes < 19e9
    full = plan_of(replace(ask, settings={}, accumulate=1), "full", quick=True, advise=False)
    assert full.verdict == "does not fit"
    assert full.allocated_bytes == pytest.approx(64.3e9, rel=0.01)
    assert full.reason.endswith("the weights alone (15.0 GiB) are more than the card has") is False
    each = plan_of(replace(ask, settings={}, accumulate=1, optimizer="adamw-foreach"), "full", quick=True, advise=False)
    assert each.allocated_bytes == pytest.approx(80.3e9, rel=0.01)
    small = plan_of(replace(ask, card=find_card("rtx-3060-12gb"), quantization="nf4"), "lora", quick=True)
    assert small.verdict == "fits"
    assert plan_of(replace(ask, card=find_card("rtx-3060-12gb")), "lora", quick=True, advise=False).reason.endswith(
        "the weights alone (15.0 GiB) are more than the card has"
    )
    qv = plan_of(replace(ask, settings={"rank": 16, "target_modules": ["q_proj", "v_proj"]}), "lora", quick=True)
    assert qv.adapter_bytes == pytest.approx(27.3e6, rel=0.002)


def test_a_plan_adds_up():
    plan = plan_of(asked(batch=2, accumulate=3), "lora")
    assert tuple(plan.parts) == PARTS
    assert sum(plan.parts.values()) - plan.parts["runtime"] <= plan.allocated_bytes
    assert max(plan.peaks.values()) <= plan.allocated_bytes
    assert plan.trainable_fraction == plan.trainable_params / plan.total_params
    assert plan.reserved_bytes.low == plan.allocated_bytes <= plan.reserved_bytes.high
    assert (plan.batch, plan.passes, plan.seq_len, plan.tokens_at_once) == (2, 3, 64, 128)
    assert plan.verdict == "fits"
    assert set(plan.to_dict()) >= {
        "method", "trainable_params", "total_params", "trainable_fraction", "adapter_bytes", "parts",
        "allocated_bytes", "reserved_bytes", "host_bytes", "verdict", "max_seq_len", "max_batch_size",
        "tokens_per_second",
    }  # fmt: skip


def test_the_longest_row_and_the_largest_batch_fit_and_no_more():
    """Planned anew at the sizes the plan gives, the job fits; beyond them it does not surely."""
    plan = plan_of(asked(card=memory_card("2GiB")), "lora")
    for name, most in (("seq_len", plan.max_seq_len), ("batch", plan.max_batch_size)):
        assert most > 1
        at = plan_of(asked(card=memory_card("2GiB"), divide=False, **{name: int(0.95 * most)}), "lora")
        over = plan_of(asked(card=memory_card("2GiB"), divide=False, **{name: int(1.2 * most)}), "lora", advise=False)
        assert at.verdict == "fits", name
        assert over.verdict != "fits", name


def test_a_batch_is_divided_as_training_divides_it():
    small = memory_card("2GiB")
    whole = plan_of(asked(card=small, batch=4096, divide=False), "lora", advise=False)
    divided = plan_of(asked(card=small, batch=4096), "lora", advise=False)
    assert whole.verdict != "fits"
    assert divided.verdict == "fits"
    assert divided.batch * divided.passes >= 4096


def test_a_card_too_small_gets_advice_that_helps():
    base = Outline("wide", "wide", zoo.llama(layers=8, hidden_size=512, intermediate_size=2048).config, "a test")
    card = Card("small", "memory", "", "", 2 << 30, 2 << 30)
    ask = Request(base, card, seq_len=8192, settings={"rank": 4})
    plan = plan_of(ask, "lora", quick=True)
    assert plan.verdict != "fits"
    assert plan.advice
    assert all(a.saves > 0 for a in plan.advice)
    first = plan.advice[0]
    assert first.change.startswith("--checkpointing")
    better = plan_of(replace(ask, checkpointing=True), "lora", quick=True, advise=False)
    assert (first.saves, first.verdict) == (plan.allocated_bytes - better.allocated_bytes, better.verdict)


def test_several_methods_are_planned_or_say_why_not():
    """That every method can be is held by `test_plan_trace.py`."""
    some = ("lora", "ia3", "bitfit", "trainable_tokens", "full")
    assert set(some) <= set(every_method())
    found, refused = plans(asked(methods=some, settings={"rank": 8}))
    assert {p.method for p in found} | set(refused) == set(some)
    assert "has a bias" in refused["bitfit"]
    assert all(p.trainable_params > 0 and p.adapter_bytes > 0 for p in found)
    assert set(refused) == {"bitfit", "trainable_tokens"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"methods": ("lorra",)}, "did you mean 'lora'"),
        ({"settings": {"rnak": 3}}, "rnak"),
        ({"settings": {"target_modules": ["q_prj"]}}, "q_prj"),
        ({"batch": 0}, "batch is 0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"seq_len": 10**12}, "a row of 1000000000000 tokens"),
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"quantization": "nf5"}, "nf5"),
    ],
)
def test_wrong_use(fields, why):
    with pytest.raises(UsageError, match=why):
        plans(asked(**fields))


def test_a_plan_of_one_card_says_of_another():
    plan = plan_of(asked(card=memory_card("8GiB")), "lora")
    assert verdict_on(plan, memory_card("8GiB")) == "fits"
    assert verdict_on(plan, memory_card("100MiB")) == "does not fit"


def test_a_recipe_is_a_request(tmp_path):
    recipe = Recipe.from_dict(
        {
            "model": "smollm2-135m",
            "data": str(tmp_path / "rows.jsonl"),
            "method": {"name": "lora", "rank": 8},
            "train": {"batch_size": 4, "accumulate": 2, "gradient_checkpointing": True},
            "out": str(tmp_path / "run"),
        }
    )
    ask = request_of(recipe, ROOMY, [10, 300, 20, 40, 50, 60, 70, 80, 90, 100])
    assert ask.methods == ("lora",)
    assert ask.rows == (300, 100, 90, 80)  # the longest that can come together
    assert ask.accumulate == 2
    assert ask.checkpointing
    job = ask.job("lora")
    assert job.method.r == 8
    assert job.device == "cuda"
    plan = plan_of(ask, "lora", quick=True)
    assert plan.tokens_at_once == 570
    assert plan.passes == 2
