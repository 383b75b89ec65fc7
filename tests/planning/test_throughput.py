"""The roofline against published runs, and hours, energy and money computed from it."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from slimtune import LoraConfig
from slimtune.adapters.registry import config_class
from slimtune.errors import UsageError
from slimtune.models.registry import load_known_configs
from slimtune.planning.gpus import find_gpu, gpu_with_memory
from slimtune.planning.memory_trace import trace_memory
from slimtune.planning.request import TrainingJob
from slimtune.planning.result import Range
from slimtune.planning.throughput import UTILIZATION, estimate_cost, estimate_tokens_per_second, prices
from slimtune.setup import build_meta_model

TABLE = json.loads((Path(__file__).parents[2] / "benchmarks/data/pace_points.json").read_text())
POINTS = TABLE["points"]
H100, BF16 = find_gpu("h100-sxm"), torch.bfloat16
OPERATIONS, MOVED = 2 * 4096**3, 6 * 4096**2
PRODUCTS = Counter({(OPERATIONS, MOVED, BF16): 10})  # of 4096 × 4096 matrices
WORK_FIELDS = ("model", "rank", "targets", "last_layers", "lengths", "checkpointing", "quantization")


@cache
def trace_work(point_json, device, dtype):
    """Return the operators of a published job's micro-batch, and the bytes its optimizer step moves."""
    point = json.loads(point_json)
    shapes = TABLE["models"].get(point["model"]) or load_known_configs()[point["model"]]["config"]
    layers = shapes["num_hidden_layers"]

    def trace(depth, last):
        """Trace so many layers, the last of them adapted."""
        config = AutoConfig.for_model(**shapes | {"num_hidden_layers": depth, "max_position_embeddings": 16384})
        method = config_class("full")()
        if "rank" in point:
            only = None if last == depth else list(range(depth))[-last:]
            method = LoraConfig(r=point["rank"], target_modules=point["targets"], layers_to_transform=only,
                                task_type="CAUSAL_LM")  # fmt: skip
        options = {"gradient_checkpointing": point["checkpointing"], "quantization": point.get("quantization")}
        job = TrainingJob(config, method, dtype, tuple(point["lengths"]), device=device, **options)
        # The published full fine-tuning trains the base's own weights, ours fp32 copies of them.
        plain = None if "rank" in point else build_meta_model(config, None, dtype, checkpointing=point["checkpointing"])
        found = trace_memory(job, plain)
        trained = found.state.get("adapters") or found.state["weights"]
        return found.operator_counts, 2 * found.state["optimizer"] + 5 * trained

    # Every adapted layer but the first is alike, and so is every one below them.
    (one, first), (two, second) = trace(1, 1), trace(2, 2)
    adapted = point.get("last_layers", layers)
    work = Counter({k: one[k] + (adapted - 1) * (two[k] - one[k]) for k in one | two})
    if below := layers - adapted:
        lower, _ = trace(2, 1)
        work = Counter({k: work[k] + below * (lower[k] - one[k]) for k in work | lower})
    return work, first + (adapted - 1) * (second - first)


@pytest.fixture(scope="module")
def estimates():
    """Tokens a second that the roofline gives each published job."""
    found = []
    for point in POINTS:
        gpu = find_gpu(point["card"])
        key = json.dumps({k: point[k] for k in WORK_FIELDS if k in point})
        work, optimizer_step_bytes = trace_work(key, gpu.device, BF16 if gpu.bf16 else torch.float16)
        if point["compiled"]:  # operators without arithmetic are fused: a fifth of their traffic is left, no launches
            traffic = sum(moved * n for (operations, moved, _), n in work.items() if not operations)
            work = Counter({k: n for k, n in work.items() if k[0]}) + Counter({(0, traffic // 5, BF16): 1})
        found.append(estimate_tokens_per_second(
            work, gpu, sum(point["lengths"]), optimizer_step_bytes=optimizer_step_bytes, micro_batches=point["passes"]
        ))  # fmt: skip
    return found


@pytest.mark.slow
def test_nine_of_ten_published_runs_are_in_range(estimates):
    outside = [(p["source"], e) for p, e in zip(POINTS, estimates, strict=True)
               if not e.low <= p["tokens_per_second"] <= e.high]  # fmt: skip
    assert len(outside) <= 0.1 * len(POINTS), outside
    assert all(p["source"] for p in POINTS)


@pytest.mark.slow
def test_range_is_as_narrow_as_the_runs_are(estimates):
    """A range a third narrower loses more than one run in ten."""
    middle, factor = (UTILIZATION.low * UTILIZATION.high) ** 0.5, (UTILIZATION.high / UTILIZATION.low) ** (1 / 3)
    shares = [p["tokens_per_second"] / e.high * UTILIZATION.high for p, e in zip(POINTS, estimates, strict=True)]
    assert sum(middle / factor <= s <= middle * factor for s in shares) < 0.9 * len(POINTS)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (PRODUCTS, 10 * OPERATIONS / 989e12),  # arithmetic
        (Counter({(0, MOVED, BF16): 10}), 10 * MOVED / 3.35e12),  # traffic
        (Counter({(0, 64, BF16): 1000}), 1000 * 8e-6),  # kernel launches
    ],
)
def test_what_bounds_an_operator(work, seconds):
    assert estimate_tokens_per_second(work, H100, 1000) == pytest.approx([u * 1000 / seconds for u in UTILIZATION])


def test_optimizer_step_counts_once():
    optimizer_step_bytes = int(4 * 10 * OPERATIONS / 989e12 * 3.35e12)
    with_step = estimate_tokens_per_second(
        PRODUCTS, H100, 1000, optimizer_step_bytes=optimizer_step_bytes, micro_batches=4
    )
    assert with_step.high == pytest.approx(estimate_tokens_per_second(PRODUCTS, H100, 1000).high / 2, rel=1e-3)


def test_rates_of_the_gpu():
    half = Counter({(OPERATIONS, MOVED, torch.float16): 10})
    slow, fast = (estimate_tokens_per_second(work, find_gpu("t4"), 1000) for work in (PRODUCTS, half))
    assert fast.high == pytest.approx(slow.high * 65 / 8.1)  # bf16, which it lacks, runs as float32
    assert estimate_tokens_per_second(PRODUCTS, gpu_with_memory("24GiB"), 1000) is None


def test_hours_energy_and_money():
    cost = estimate_cost(Range(1000, 2000), 7_200_000, H100, dollars_per_hour=3.0, dollars_per_kwh=0.25)
    assert (cost.hours, cost.rent, cost.prices) == ((1, 2), (3, 6), ())
    assert cost.kwh == pytest.approx((0.42, 1.4))
    assert cost.power == pytest.approx((0.105, 0.35))
    assert cost.to_dict()["rent"] == {"low": 3, "high": 6}


def test_rent_from_the_table():
    cost = estimate_cost(Range(1000, 2000), 7_200_000, H100)
    found = [p.dollars_per_hour for p in prices("h100-sxm")]
    assert (cost.rent, cost.power) == ((min(found), 2 * max(found)), None)
    assert all(p["date"] and p["source"] for p in cost.to_dict()["prices"])


def test_unknown_price_and_power():
    cost = estimate_cost(Range(1000, 2000), 7_200_000, replace(H100, name="another", watts=None), dollars_per_kwh=0.25)
    assert (cost.rent, cost.kwh, cost.power) == (None, None, None)


def test_table_of_prices():
    assert len({p.card for p in prices()}) >= 15
    for price in prices():
        assert find_gpu(price.card).name == price.card
        assert 0.05 < price.dollars_per_hour < 20
        assert price.provider
        assert price.source
        assert price.date.startswith("20")
        assert len(price.date) == 10


def test_price_must_be_above_zero():
    with pytest.raises(UsageError, match="dollars_per_hour"):
        estimate_cost(Range(1, 2), 10, H100, dollars_per_hour=0)
