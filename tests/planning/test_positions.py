"""A plan keeps to the positions of its base."""

import pytest
from transformers import AutoConfig

from slimtune.core.config import Recipe
from slimtune.core.models import base_config
from slimtune.core.models.base_config import LoadedBaseConfig, get_max_positions
from slimtune.errors import UsageError
from slimtune.methods.lora import LoraConfig
from slimtune.planning import memory_trace
from slimtune.planning import plan_request as request
from slimtune.planning.gpu_specs import make_gpu_with_memory
from slimtune.planning.plan_request import PlanRequest, build_plan_request
from slimtune.planning.planner import estimate_resources

GPT2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=4, n_head=2, vocab_size=64, n_positions=512)
ROOMY = make_gpu_with_memory("24GiB")


def make_recipe(**data):
    return Recipe.from_dict({"model": "tiny", "data": {"train": "rows.jsonl", **data}, "output_dir": "o"})


@pytest.fixture(autouse=True)
def tiny_base(monkeypatch):
    monkeypatch.setattr(request, "load_base_config", lambda *_, **__: LoadedBaseConfig("tiny", "tiny", GPT2, ""))


def test_positions_of_a_decoder():
    assert get_max_positions(AutoConfig.for_model("whisper")) == 448


def test_names_of_positions():
    assert get_max_positions(GPT2) == 512
    assert get_max_positions(AutoConfig.for_model("mpt", max_seq_len=99)) == 99
    assert get_max_positions(AutoConfig.for_model("bloom")) is None


def test_rows_beyond_the_positions_are_refused():
    for recipe, lengths in ((make_recipe(max_seq_len=600), ()), (make_recipe(), (4, 513))):
        with pytest.raises(UsageError, match=r"tiny .*\b512 (.|\n)*--max-seq-len 512"):
            build_plan_request(recipe, ROOMY, lengths)


def test_default_length_is_cut_and_says_so():
    planned = build_plan_request(make_recipe(), ROOMY)
    assert (planned.seq_len, len(planned.notes)) == (512, 1)
    assert "512" in planned.notes[0]
    assert build_plan_request(make_recipe(), ROOMY, (5, 512)).notes == ()


@pytest.mark.slow
def test_no_longer_row_is_traced_or_answered(monkeypatch):
    traced = []
    real = memory_trace.trace_training_step

    def record(job, *args, **settings):
        traced.extend(job.lengths)
        return real(job, *args, **settings)

    monkeypatch.setattr("slimtune.planning.extrapolation.trace_training_step", record)
    method = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    plan = estimate_resources(PlanRequest(LoadedBaseConfig("tiny", "tiny", GPT2, ""), ROOMY, method, seq_len=100))
    assert max(traced) == plan.max_seq_len == 512
    assert base_config.get_max_positions(GPT2) == 512
