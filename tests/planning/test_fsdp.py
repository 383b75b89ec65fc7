"""A base sharded over processes: each plans its share of the weights, whole adapters, and what is gathered."""

from slimtune import LoraConfig
from slimtune.models.registry import get_model_info
from slimtune.planning.fsdp import BaseWeights, weight_bytes
from slimtune.planning.gpus import GIB, find_gpu
from slimtune.planning.planner import make_plan
from slimtune.planning.request import PlanRequest

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def make_request(processes, fsdp):
    return PlanRequest(get_model_info("llama-3.1-8b"), find_gpu("rtx-3060-12gb"), LORA, processes=processes, fsdp=fsdp)


def test_weights_of_one_process():
    weights = BaseWeights(total=100, layer=10, rest=20)
    assert weights.per_process(4) == (25 + 20 + 10, 25 + 20 + 30)
    assert weights.per_process(2).low == 50 + 20 + 10
    assert BaseWeights(total=30, layer=15, rest=0).per_process(2).low == 30  # never more than all


def test_weights_of_llama_3_1_8b():
    weights = weight_bytes(make_request(1, fsdp=False).job().build_model())
    assert weights.total == 2 * 8_030_261_248  # as published, in bf16
    assert weights.rest == 2 * (2 * 128256 * 4096 + 4096)
    assert weights.layer * 32 + weights.rest == weights.total


def test_four_processes_shard_the_base():
    one, four = make_plan(make_request(1, fsdp=False), advise=False), make_plan(make_request(4, fsdp=True))
    assert one.verdict == "does not fit"
    assert four.parts["weights"] < one.parts["weights"] / 2 + GIB
    assert [four.parts[p] for p in ("adapters", "optimizer")] == [one.parts[p] for p in ("adapters", "optimizer")]
    assert four.total_params == one.total_params
    assert "sharded over 4 processes" in four.reason
    assert "sharded base: computed" in four.evidence["parts"]
    layer = 2 * 218_112_000  # the upper end counts what is gathered beside a layer
    assert four.reserved_bytes.high - four.reserved_bytes.low > 2 * 0.9 * layer
    whole = make_plan(make_request(4, fsdp=False), advise=False)
    assert whole.parts == one.parts
    assert "each of 4 processes holds the whole base" in whole.reason
