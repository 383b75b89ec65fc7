"""Whole plans: verdicts, what fits, advice, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import models_zoo as zoo
import pytest

from slimtune.config import Recipe
from slimtune.errors import UsageError
from slimtune.models.registry import ModelInfo, get_model_info
from slimtune.planning.gpus import Gpu, find_gpu, gpu_with_memory
from slimtune.planning.planner import make_plan, plans
from slimtune.planning.request import PlanRequest, build_request, every_method
from slimtune.planning.result import PARTS
from slimtune.planning.verdict import judge_plan

TINY = ModelInfo("tiny", "tiny", zoo.llama(layers=4).config, "a test")
ROOMY = gpu_with_memory("8GiB")


def asked(card=ROOMY, **fields):
    return PlanRequest(TINY, card, **{"seq_len": 64, "settings": {"rank": 4}, **fields})


def test_llama_3_1_8b_on_the_cards_people_ask_about():
    """The question of the README, answered: LoRA fits 24 GiB, full fine-tuning needs 64 GB, NF4 fits 12 GiB."""
    base = get_model_info("llama-3.1-8b")
    row = {"seq_len": 2048, "gradient_accumulation_steps": 4, "checkpointing": True, "settings": {"rank": 16}}
    ask = PlanRequest(base, find_gpu("rtx-3090"), **row)
    lora = make_plan(ask, "lora", quick=True)
    assert lora.verdict == "fits"
    assert 17e9 < lora.allocated_bytes < 19e9
    full = make_plan(replace(ask, settings={}, gradient_accumulation_steps=1), "full", quick=True, advise=False)
    assert full.verdict == "does not fit"
    assert full.allocated_bytes == pytest.approx(64.3e9, rel=0.01)
    assert full.reason.endswith("the weights alone (15.0 GiB) are more than the card has") is False
    each = make_plan(
        replace(ask, settings={}, gradient_accumulation_steps=1, optimizer="adamw-foreach"),
        "full",
        quick=True,
        advise=False,
    )
    assert each.allocated_bytes == pytest.approx(80.3e9, rel=0.01)
    small = make_plan(replace(ask, card=find_gpu("rtx-3060-12gb"), quantization="nf4"), "lora", quick=True)
    assert small.verdict == "fits"
    assert make_plan(replace(ask, card=find_gpu("rtx-3060-12gb")), "lora", quick=True, advise=False).reason.endswith(
        "the weights alone (15.0 GiB) are more than the card has"
    )
    qv = make_plan(replace(ask, settings={"rank": 16, "target_modules": ["q_proj", "v_proj"]}), "lora", quick=True)
    assert qv.adapter_bytes == pytest.approx(27.3e6, rel=0.002)


def test_a_plan_adds_up():
    plan = make_plan(asked(batch=2, gradient_accumulation_steps=3), "lora")
    assert tuple(plan.parts) == PARTS
    assert sum(plan.parts.values()) - plan.parts["runtime"] <= plan.allocated_bytes
    assert max(plan.peaks.values()) <= plan.allocated_bytes
    assert plan.trainable_fraction == plan.trainable_params / plan.total_params
    assert plan.reserved_bytes.low == plan.allocated_bytes <= plan.reserved_bytes.high
    assert (plan.batch, plan.passes, plan.seq_len, plan.max_tokens_per_micro_batch) == (2, 3, 64, 128)
    assert plan.verdict == "fits"
    assert set(plan.to_dict()) >= {
        "method", "trainable_params", "total_params", "trainable_fraction", "adapter_bytes", "parts",
        "allocated_bytes", "reserved_bytes", "host_bytes", "verdict", "max_seq_len", "max_batch_size",
        "tokens_per_second",
    }  # fmt: skip


def test_the_longest_row_and_the_largest_batch_fit_and_no_more():
    """Planned anew at the sizes the plan gives, the job fits; beyond them it does not surely."""
    plan = make_plan(asked(card=gpu_with_memory("2GiB")), "lora")
    for name, most in (("seq_len", plan.max_seq_len), ("batch", plan.max_batch_size)):
        assert most > 1
        at = make_plan(asked(card=gpu_with_memory("2GiB"), divide=False, **{name: int(0.95 * most)}), "lora")
        over = make_plan(
            asked(card=gpu_with_memory("2GiB"), divide=False, **{name: int(1.2 * most)}), "lora", advise=False
        )
        assert at.verdict == "fits", name
        assert over.verdict != "fits", name


def test_a_batch_is_divided_as_training_divides_it():
    small = gpu_with_memory("2GiB")
    whole = make_plan(asked(card=small, batch=4096, divide=False), "lora", advise=False)
    divided = make_plan(asked(card=small, batch=4096), "lora", advise=False)
    assert whole.verdict != "fits"
    assert divided.verdict == "fits"
    assert divided.batch * divided.passes >= 4096


def test_a_card_too_small_gets_advice_that_helps():
    base = ModelInfo("wide", "wide", zoo.llama(layers=8, hidden_size=512, intermediate_size=2048).config, "a test")
    card = Gpu("small", "memory", "", "", 2 << 30, 2 << 30)
    ask = PlanRequest(base, card, seq_len=8192, settings={"rank": 4})
    plan = make_plan(ask, "lora", quick=True)
    assert plan.verdict != "fits"
    assert plan.advice
    assert all(a.saves > 0 for a in plan.advice)
    first = plan.advice[0]
    assert first.change.startswith("--checkpointing")
    better = make_plan(replace(ask, checkpointing=True), "lora", quick=True, advise=False)
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
    plan = make_plan(asked(card=gpu_with_memory("8GiB")), "lora")
    assert judge_plan(plan, gpu_with_memory("8GiB")) == "fits"
    assert judge_plan(plan, gpu_with_memory("100MiB")) == "does not fit"


def test_a_recipe_is_a_request(tmp_path):
    recipe = Recipe.from_dict(
        {
            "model": "smollm2-135m",
            "data": str(tmp_path / "rows.jsonl"),
            "method": {"name": "lora", "rank": 8},
            "train": {"batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            "output_dir": str(tmp_path / "run"),
        }
    )
    ask = build_request(recipe, ROOMY, [10, 300, 20, 40, 50, 60, 70, 80, 90, 100])
    assert ask.methods == ("lora",)
    assert ask.rows == (300, 100, 90, 80)  # the longest that can come together
    assert ask.gradient_accumulation_steps == 2
    assert ask.checkpointing
    job = ask.job("lora")
    assert job.method.r == 8
    assert job.device == "cuda"
    plan = make_plan(ask, "lora", quick=True)
    assert plan.max_tokens_per_micro_batch == 570
    assert plan.passes == 2
