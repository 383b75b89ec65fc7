"""Bases that the planner once failed on: planned, or refused in a sentence that says why."""

import pytest
import torch
from transformers import AutoConfig

from slimtune.core.models.base_config import LoadedBaseConfig
from slimtune.errors import ModelError
from slimtune.methods.lora import LoraConfig
from slimtune.methods.shira import ShiraConfig
from slimtune.methods.shira.shira_modules import SparseWeightUpdate
from slimtune.planning import memory_trace, planner
from slimtune.planning.gpu_specs import make_gpu_with_memory
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload, PlanRequest
from slimtune.planning.planner import estimate_resources

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


def plan(kind, *, targets="all-linear", seq_len=64, dtype="bfloat16", packing=True, quantization=None, **sizes):
    config = AutoConfig.for_model(kind, **{**SIZES, **sizes})
    method = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    base = LoadedBaseConfig("tiny", "tiny", config, "")
    request = PlanRequest(base, make_gpu_with_memory("24GiB"), method, dtype=dtype, seq_len=seq_len,
                          batch_size=2, packing=packing, quantization=quantization)  # fmt: skip
    return estimate_resources(request, advise="none")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen2", {"num_hidden_layers": 1}),
        ("qwen3", {"num_hidden_layers": 2, "head_dim": 16}),
        ("gemma2", {"num_hidden_layers": 2, "head_dim": 16}),
    ],
)
def test_is_planned(kind, sizes):
    planned = plan(kind, targets=["q_proj", "v_proj"], **sizes)
    assert planned.verdict == "fits"


@pytest.mark.slow
def test_base_that_is_not_packed_is_planned_padded():
    planned, padded = (plan("bloom", n_head=2, packing=packing) for packing in (True, False))
    assert any("padded" in note for note in planned.notes)
    assert planned.allocated_bytes == padded.allocated_bytes


def test_step_through_tokens_is_refused_in_bounded_time(monkeypatch):
    monkeypatch.setattr(memory_trace, "MAX_OPERATORS", 3000)
    monkeypatch.setattr(memory_trace, "MAX_OPERATORS_PER_LAYER", 0)
    with pytest.raises(ModelError, match=r"\b3000\b(.|\n)*slimtune train"):
        plan("rwkv", attention_hidden_size=32)


def test_forward_that_reads_a_value_is_named_by_its_line():
    class Guarded(SparseWeightUpdate):
        def forward(self, x, y):
            return y if self.shira_weight.isinf().any() else super().forward(x, y)

    class GuardedConfig(ShiraConfig):
        def build(self, site):
            module = super().build(site)
            module.__class__ = Guarded
            return module

    base, method = AutoConfig.for_model("llama", **SIZES), GuardedConfig(r=2, target_modules="all-linear")
    with pytest.raises(ModelError) as caught:
        trace_training_step(MicroBatchWorkload(base, method, torch.float32, (9,)))
    assert f"{__file__}, line " in caught.value.message
    assert "shira_weight.isinf().any()" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [("head_dim", 0, "head_dim = 0"), ("head_dim", -1, "head_dim = -1"), ("pad_token_id", 10**9, "pad_token_id = 10"),
     ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}, r"rope_parameters\.rope_theta = 'x'")],
)  # fmt: skip
def test_field_with_which_no_model_can_be_built_is_named(name, value, named):
    with pytest.raises(ModelError, match=named):
        plan("llama", **{name: value})


def test_mixture_is_planned_in_float32():
    """torch's product of experts has no fake in float32."""
    assert plan("qwen3_moe", targets=["q_proj", "v_proj"], dtype="float32", **EXPERTS).dtype == "float32"


def test_fault_of_foreign_code_says_why(capfd, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(planner, "fit_memory_formula", fail)
    with pytest.raises(ModelError, match=r"tiny .*RuntimeError: broken") as caught:
        plan("llama")
    assert "slimtune train" in caught.value.hint
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_plan_says_how_a_quantized_mixture_holds_its_experts(quantization):
    mixture, dense = (plan(kind, targets=["q_proj"], quantization=quantization, **sizes)
                      for kind, sizes in (("qwen3_moe", EXPERTS), ("qwen3", {"head_dim": 16})))  # fmt: skip
    assert len(mixture.notes) == 1 + len(dense.notes)
    assert plan("qwen3_moe", targets=["q_proj"], **EXPERTS).notes == dense.notes


def test_no_memory_is_not_a_fault_of_the_base(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(planner, "fit_memory_formula", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        plan("llama")


def test_missing_package_is_named(monkeypatch):
    def build(*_, **__):
        raise ImportError("TimmWrapperModel requires the timm library", name="timm")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", build)
    with pytest.raises(ModelError, match=r"timm(.|\n)*pip install timm"):
        plan("llama")
