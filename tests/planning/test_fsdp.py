"""A base sharded over processes: each plans its share of the weights, whole adapters, and what is gathered."""

import pytest

from slimtune import LoraConfig
from slimtune.models.base_config import get_model_info
from slimtune.planning.fsdp import shard_base
from slimtune.planning.gpus import find_gpu
from slimtune.planning.planner import make_plan
from slimtune.planning.request import PlanRequest

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
LAYER, REST = 2 * 218_112_000, 2 * (2 * 128256 * 4096 + 4096)  # Llama 3.1 8B in bf16, as published


def make_request(processes, fsdp):
    return PlanRequest(get_model_info("llama-3.1-8b"), find_gpu("rtx-3060-12gb"), LORA, processes=processes, fsdp=fsdp)


def test_saved_bytes():
    total = 32 * LAYER + REST
    saved, spread = shard_base(make_request(4, fsdp=True).job().build_model(), 4)
    assert saved == total - (total / 4 + REST + LAYER)
    assert spread == 2 * LAYER


@pytest.mark.slow
def test_four_processes_shard_the_base():
    one, four = make_plan(make_request(1, fsdp=False), advise=False), make_plan(make_request(4, fsdp=True))
    assert one.verdict == "does not fit"
    assert four.parts["weights"] < one.parts["weights"] / 2 + 1e9
    assert [four.parts[p] for p in ("adapters", "optimizer")] == [one.parts[p] for p in ("adapters", "optimizer")]
    assert four.total_params == one.total_params
    assert "sharded over 4 processes" in four.reason
    assert "sharded base: computed" in four.evidence["parts"]
    assert four.reserved_bytes.high - four.reserved_bytes.low > 2 * LAYER  # what is gathered beside a layer
    whole = make_plan(make_request(4, fsdp=False), advise=False)
    assert whole.parts == one.parts
    assert "each of 4 processes holds the whole base" in whole.reason
