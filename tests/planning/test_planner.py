"""Whole plans: verdicts, largest sizes, files, advice, and wrong requests."""

import json
from dataclasses import replace
from types import SimpleNamespace

import models_zoo as zoo
import pytest
import torch
from method_cases import CASES
from tiny_run import recipe_of

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters import adapter_files
from slimtune.core.config import Recipe
from slimtune.core.data.collator import Collator
from slimtune.core.data.example_lengths import DatasetRowComposition, measure_example_length
from slimtune.core.models.base_config import LoadedBaseConfig, load_base_config
from slimtune.core.training.train import train
from slimtune.errors import UsageError
from slimtune.planning import planner
from slimtune.planning.extrapolation import fit_memory_formula
from slimtune.planning.gpu_specs import GpuSpec, make_gpu_with_memory, require_gpu_by_name
from slimtune.planning.memory_trace import (
    estimate_sharding_savings_and_uncertainty,
    make_dummy_examples,
    trace_training_step,
)
from slimtune.planning.packed_lengths import remove_prefix_sharing, resize_example_rows
from slimtune.planning.plan_request import PlanRequest, build_plan_request
from slimtune.planning.plan_result import PARTS
from slimtune.planning.planner import (
    estimate_adapter_file_and_method_state_sizes,
    estimate_resources,
    judge_memory_fit,
    judge_run,
    list_memory_saving_changes,
    put_typical_micro_batches_in_job,
)
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

TINY = LoadedBaseConfig("tiny", "tiny", zoo.llama(layers=4, max_position_embeddings=1 << 20).config, "a test")
ROOMY, SMALL = make_gpu_with_memory("8GiB"), make_gpu_with_memory("2GiB")


def lora(rank=4, **settings):
    return LoraConfig(r=rank, **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def plan_tiny(gpu=ROOMY, advise="none", method=None, **fields):
    return estimate_resources(PlanRequest(TINY, gpu, method or lora(), **{"seq_len": 64, **fields}), advise=advise)


@pytest.mark.slow
def test_llama_3_1_8b():
    """LoRA fits 24 GiB, NF4 fits 12 GiB, full fine-tuning with fp32 copies needs 146 GB."""
    request = PlanRequest(
        load_base_config("llama-3.1-8b"), require_gpu_by_name("rtx-3090"), lora(16), seq_len=2048,
        gradient_accumulation_steps=4, gradient_checkpointing=True,
    )  # fmt: skip
    plan = estimate_resources(request)
    assert plan.verdict == "fits"
    assert plan.allocated_bytes == pytest.approx(17.86e9, rel=0.005)
    full = estimate_resources(replace(request, method=CASES["full"](), gradient_accumulation_steps=1), advise="none")
    assert full.verdict == "does not fit"
    assert full.allocated_bytes == pytest.approx(146e9, rel=0.005)
    assert "optimizer" in full.reason
    small = replace(request, gpu=require_gpu_by_name("rtx-3060-12gb"))
    assert estimate_resources(replace(small, quantization="nf4")).verdict == "fits"
    assert estimate_resources(small, advise="none").reason.endswith(
        "the weights alone (15.0 GiB) are more than the card has"
    )


@pytest.mark.slow
def test_full_fine_tuning_of_an_8b_is_advised_in_bf16_on_80_gb():
    """16.06 GB each of base, copies, gradients and 8-bit states, and what a step holds."""
    request = PlanRequest(
        load_base_config("llama-3.1-8b"), require_gpu_by_name("h100-sxm"), CASES["full"](), seq_len=2048,
        gradient_checkpointing=True,
    )  # fmt: skip
    first, *_ = estimate_resources(request).advice
    assert (first.change, first.verdict) == (
        "--optimizer adamw-8bit and --set method.bf16_stochastic_round=true", "fits",
    )  # fmt: skip
    rounded = CASES["full"](bf16_stochastic_round=True)
    plan = estimate_resources(replace(request, method=rounded, optimizer="adamw-8bit"))
    assert plan.verdict == "fits"
    assert plan.allocated_bytes == pytest.approx(68.7e9, rel=0.002)


def test_plan_adds_up():
    plan = plan_tiny(batch_size=2, gradient_accumulation_steps=3)
    assert tuple(plan.parts) == PARTS
    assert sum(plan.parts.values()) - plan.parts["runtime"] <= plan.allocated_bytes
    assert max(plan.peaks.values()) <= plan.allocated_bytes
    assert set(plan.peaks) >= {"start", "forward", "loss", "optimizer", "evaluation", "merge"}
    assert plan.reserved_bytes.low == plan.allocated_bytes <= plan.reserved_bytes.high
    assert (plan.batch, plan.micro_batches, plan.seq_len, plan.max_tokens_per_micro_batch) == (2, 3, 64, 128)


@pytest.mark.slow
def test_largest_row_and_batch():
    """Planned at the sizes the plan gives, the run fits; beyond them it does not surely."""
    plan = plan_tiny(SMALL)
    for name, largest in (("seq_len", plan.max_seq_len), ("batch_size", plan.max_batch_size)):
        assert largest > 1
        assert plan_tiny(SMALL, split_batch=False, **{name: int(0.95 * largest)}).verdict == "fits"
        assert plan_tiny(SMALL, split_batch=False, **{name: int(1.2 * largest)}).verdict != "fits"


@pytest.mark.slow
def test_split_batch():
    assert plan_tiny(SMALL, batch_size=8192, split_batch=False).verdict != "fits"
    split = plan_tiny(SMALL, batch_size=8192)
    assert split.verdict == "fits"
    assert split.batch * split.micro_batches >= 8192


@pytest.mark.slow
def test_a_batch_is_split_again_where_the_trace_takes_more_than_the_formula(monkeypatch):
    def fit_half(job, model):
        formula = fit_memory_formula(job, model)
        return replace(formula, coefficients={phase: c / 2 for phase, c in formula.coefficients.items()})

    right = plan_tiny(SMALL, batch_size=8192)
    monkeypatch.setattr(planner, "fit_memory_formula", fit_half)
    wrong = plan_tiny(SMALL, batch_size=8192)
    assert wrong.verdict == right.verdict == "fits"
    assert 1 < wrong.batch <= right.batch


@pytest.mark.slow
def test_advice():
    base = LoadedBaseConfig(
        "wide", "wide", zoo.llama(layers=8, hidden_size=512, intermediate_size=2048).config, "a test"
    )
    request = PlanRequest(base, GpuSpec("small", "memory", "", "", 2 << 30, 2 << 30), lora(), seq_len=8192)
    plan = estimate_resources(request)
    assert plan.verdict != "fits"
    assert all(a.saves > 0 for a in plan.advice)
    first = plan.advice[0]
    assert first.change.startswith("--gradient-checkpointing")
    better = estimate_resources(replace(request, gradient_checkpointing=True), advise="none")
    assert (first.saves, first.verdict) == (plan.allocated_bytes - better.allocated_bytes, better.verdict)
    assert first.verdict == "fits"
    assert estimate_resources(request, advise="first").advice == [first]
    assert len(plan.advice) > 1


def test_no_activations_are_saved_where_the_weights_alone_are_too_large():
    planned = plan_tiny(make_gpu_with_memory("1MiB"), advise="all", dtype="float32")
    assert planned.verdict == "does not fit"
    assert {saving.change.split()[0] for saving in planned.advice} <= {"--dtype", "--quantization"}


@pytest.mark.parametrize("memory", ["1MiB", "5MiB", "2GiB"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_verdict_alone_is_that_of_the_plan(memory, batch_size):
    request = PlanRequest(TINY, make_gpu_with_memory(memory), lora(), seq_len=64, batch_size=batch_size)
    assert judge_run(request) == estimate_resources(request, advise="none").verdict


def test_no_length_fits_where_the_weights_alone_are_too_large():
    planned = plan_tiny(make_gpu_with_memory("1MiB"), batch_size=3)
    assert (planned.max_seq_len, planned.max_batch_size, planned.batch, planned.micro_batches) == (0, 0, 1, 3)


def test_a_quantized_base_that_is_still_too_large_is_not_traced(monkeypatch):
    monkeypatch.setenv("SLIMTUNE_TRACES", "/dev/null")
    tiny = GpuSpec("tiny", "memory", "nvidia", "ampere", 1 << 16, 1 << 16)
    (saving, *_) = plan_tiny(tiny, advise="all").advice
    whole, quantized = plan_tiny(tiny), plan_tiny(tiny, quantization=saving.change.split()[1])
    assert (saving.saves, saving.verdict) == (whole.parts["weights"] - quantized.parts["weights"], "does not fit")


def test_quantization_is_advised_last_where_it_is_not_proven():
    base = LoadedBaseConfig("wide", "wide", zoo.llama(layers=2, hidden_size=512, intermediate_size=2048).config, "")
    for vendor, proven in (("apple", False), ("nvidia", True)):
        gpu = GpuSpec("small", "mac", vendor, "", 1 << 30, 1 << 30)
        changes = [change for change, _ in list_memory_saving_changes(PlanRequest(base, gpu, lora()).job(), gpu)]
        assert next(change for change in changes if "quantization" in change).endswith("nf4") is proven
        assert ("quantization" in changes[-1]) is not proven


@pytest.mark.parametrize("method", sorted(CASES))
def test_size_of_the_adapter_file(method, tmp_path):
    """Exact up to the header, or an upper bound if training chooses ranks (AdaLoRA, EVA)."""
    model = get_peft_model(zoo.llama(dtype=torch.float32), CASES[method]())
    adapter_files.save_adapter(model, tmp_path, "default")
    written = (tmp_path / adapter_files.WEIGHTS_FILE).stat().st_size
    planned, _, at_most = estimate_adapter_file_and_method_state_sizes(model)
    assert at_most == (method.partition("+")[0] in ("adalora", "eva"))
    assert planned >= written if at_most else abs(planned - written) < 16_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": lora(target_modules=["q_prj"])}, "q_prj"),
        ({"seq_len": 10**12}, "a row of 1000000000000 tokens"),
        ({"quantization": "nf5"}, "nf5"),
    ],
)
def test_bad_request(fields, message):
    with pytest.raises(UsageError, match=message):
        plan_tiny(**fields)


@pytest.mark.slow
def test_plan_for_one_gpu_judges_another():
    plan = plan_tiny()
    assert judge_memory_fit(plan.need_bytes, ROOMY.usable) == "fits"
    assert judge_memory_fit(plan.need_bytes, make_gpu_with_memory("100MiB").usable) == "does not fit"


@pytest.mark.slow
def test_request_of_a_recipe(tmp_path):
    recipe = Recipe.from_dict(
        {
            "model": "smollm2-135m",
            "data": str(tmp_path / "rows.jsonl"),
            "method": {"name": "lora", "rank": 8},
            "train": {"batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            "output_dir": str(tmp_path / "run"),
        }
    )
    request = build_plan_request(recipe, ROOMY, [10, 300, 20, 40, 50, 60, 70, 80, 90, 100])
    job = request.job()
    assert job.lengths == (300, 100, 90, 80)  # the longest rows that can come together
    assert (job.micro_batches_per_step, job.gradient_checkpointing, job.method.r, job.device) == (2, True, 8, "cuda")
    plan = estimate_resources(request)
    assert (plan.max_tokens_per_micro_batch, plan.micro_batches) == (570, 2)


@pytest.mark.slow
def test_speed_is_of_shared_prefixes_stored_once_and_of_learned_tokens():
    rows = (60,) * 8
    request = PlanRequest(TINY, ROOMY, lora(), lengths=rows, quantiles=rows, content=DatasetRowComposition(40, 0.25))
    job = put_typical_micro_batches_in_job(request, request.job())
    examples = make_dummy_examples(job.lengths, job.supervised, job.shared_prefix_tokens)
    pack = Collator(0, with_packed_layout=True)(examples)
    assert (pack["input_ids"].shape[1], int(pack["tokens"]), len(pack["targets"])) == (40 + 8 * 20, 8 * 60, 8 * 15)
    assert estimate_resources(request).work.tokens_per_micro_batch == 8 * 60


@pytest.mark.slow
def test_memory_is_of_a_system_prompt_stored_once():
    job = PlanRequest(TINY, ROOMY, lora(), lengths=(60,) * 8, content=DatasetRowComposition(40)).job()
    tree = replace(job, lengths=((40, *[20] * 8),), shared_prefix_tokens=0)
    assert job.micro_batch_tokens == tree.micro_batch_tokens == 40 + 8 * 20
    assert trace_training_step(job).peaks == trace_training_step(tree).peaks
    formula = fit_memory_formula(job, job.build_model())
    assert formula.peak(job.lengths) == formula.peak(tree.lengths)
    assert formula.peak((30,) * 8) == formula.peak(((29, *[1] * 8),))  # rows that are shorter than the prompt


@pytest.mark.parametrize(("gpu", "dtype"), [("rtx-3090", "bfloat16"), ("t4", "float32")])
def test_auto_dtype_follows_the_gpu(gpu, dtype):
    assert str(PlanRequest(TINY, require_gpu_by_name(gpu), lora()).job().dtype) == f"torch.{dtype}"


# --- pairs and ranked lists: a prompt counts once, and every answer does, as in the step that trains -----------------


def test_lengths_of_examples():
    prompt = list(range(10))
    assert measure_example_length([[*prompt, 11, 12], [*prompt, 13]]) == (10, 2, 1)
    assert measure_example_length([[*prompt, 11, 12], [*prompt, 13], [*prompt[:9], 14, 15, 16]]) == (
        9,
        3,
        2,
        3,
    )
    assert measure_example_length([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7]]) == (
        0,
        5,
        6,
    )  # too little to be shared
    assert remove_prefix_sharing((10, 2, 1)) == (0, 12, 11)
    assert [resize_example_rows(length, lambda n: min(n, 8)) for length in (12, (10, 2, 1))] == [8, (7, 1, 1)]


def test_request_counts_every_answer_of_a_list(tiny_folder, tmp_path):
    recipe = recipe_of(
        {"model": str(tiny_folder), "data": "rows.jsonl", "task": "dpo", "train": {"batch_size": 2}, "output_dir": "x"}
    )
    lists = [(9, 5, 4, 3), (20, 1, 1), (9, 5, 5, 5, 5)]
    assert build_plan_request(recipe, ROOMY, lists).job().lengths == ((9, 5, 5, 5, 5), (20, 1, 1))
    apart = recipe_of(recipe.to_dict(), share_prefix=False)
    assert build_plan_request(apart, ROOMY, lists).job().lengths == ((0, 14, 14, 14, 14), (0, 21, 21))


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["all", "best-worst"])
def test_run_takes_the_tokens_that_are_planned(pairs, tiny_folder, tmp_path):
    rows = [
        {
            "prompt": f"say the word number {i}: " * (1 + i % 3),
            "responses": [f"{word} {i} " * n for word, n in (("abc", 3), ("pqr", 5), ("uvw", 2), ("xyz", 4))],
            "scores": [4, 3, 2, 1],
        }
        for i in range(12)
    ]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(tmp_path / "lists.jsonl"), "validation_fraction": 0.25},
            "task": {"name": "dpo", "pairs": pairs},
            "method": {"name": "lora", "r": 4},
            "train": {"max_steps": 1, "batch_size": 4, "max_tokens_per_micro_batch": 1},  # an example at a time
            "output_dir": str(tmp_path / "run"),
        }
    )
    train(
        recipe,
        planner=lambda *job: estimate_resources(build_plan_request(job[0], detect_gpu_or_cpu_spec("cpu"), job[1])),
    )
    record = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert record["plan"]["batch"] == (4 if pairs == "all" else 2)
    assert record["plan"]["max_tokens_per_micro_batch"] == record["probe"]["tokens"]


# --- a base that is sharded over processes: each has its share of the weights, whole adapters, and what is gathered ---

LAYER, REST = 2 * 218_112_000, 2 * (2 * 128256 * 4096 + 4096)  # Llama 3.1 8B in bf16, as published


def make_request(processes, fsdp):
    gpu = require_gpu_by_name("rtx-3060-12gb")
    return PlanRequest(load_base_config("llama-3.1-8b"), gpu, lora(16), processes=processes, fsdp=fsdp)


def test_saved_bytes():
    total = 32 * LAYER + REST
    saved, spread = estimate_sharding_savings_and_uncertainty(make_request(4, fsdp=True).job().build_model(), 4)
    assert saved == total - (total / 4 + REST + LAYER)
    assert spread == 2 * LAYER


@pytest.mark.slow
def test_four_processes_shard_the_base():
    one, four = (
        estimate_resources(make_request(1, fsdp=False), advise="none"),
        estimate_resources(make_request(4, fsdp=True)),
    )
    assert one.verdict == "does not fit"
    assert four.parts["weights"] < one.parts["weights"] / 2 + 1e9
    assert [four.parts[p] for p in ("adapters", "optimizer")] == [one.parts[p] for p in ("adapters", "optimizer")]
    assert four.total_params == one.total_params
    assert "4 processes" in four.reason
    assert "computed" in four.evidence["parts"]
    assert four.reserved_bytes.high - four.reserved_bytes.low > 2 * LAYER  # what is gathered beside a layer
    whole = estimate_resources(make_request(4, fsdp=False), advise="none")
    assert whole.parts == one.parts
    assert "4 processes" in whole.reason


@pytest.mark.parametrize(("quantization", "notes"), [(None, 0), ("nf4", 1)])
def test_the_plan_of_a_quantized_mixture_says_how_its_experts_are_held(quantization, notes):
    model = torch.nn.Module()
    model.experts = torch.nn.Parameter(torch.zeros(2, 3, 4), requires_grad=False)
    base = SimpleNamespace(config=SimpleNamespace(model_type="mixtral"))
    request = SimpleNamespace(quantization=quantization, model=base)
    assert len(planner.describe_how_experts_are_held(model, request)) == notes
