"""Extrapolated traces and the memory formula, against traces of all layers."""

from dataclasses import replace

import models_zoo as zoo
import pytest
import tiny_families
import torch
from method_cases import CASES
from transformers import AutoConfig

import slimtune
from slimtune.core.attention.packed_attention import MAX_SPLIT_TOKENS, PART
from slimtune.planning import extrapolation
from slimtune.planning.extrapolation import (
    TOKENS,
    extrapolate_merge_cpu_peak,
    extrapolate_step_trace,
    fit_memory_formula,
)
from slimtune.planning.memory_trace import BACKWARD, trace_merge_peak, trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload

LORA = slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def make_job(name="llama", depth=6, **settings):
    base = getattr(zoo, name)().config
    text = base.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        kinds = ["sliding_attention", "full_attention"] if name.startswith("gemma") else ["full_attention"]
        text.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    defaults = {
        "method": LORA,
        "dtype": torch.bfloat16,
        "lengths": (TOKENS,),
        "micro_batches_per_step": 2,
        "device": "cuda",
    }
    return MicroBatchWorkload(base_config=base, **{**defaults, **settings})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "checkpointing", "method"),
    [("cuda", True, LORA), ("cuda", False, CASES["full"]()), ("cpu", False, LORA)],
)
def test_formula_equals_the_trace(device, checkpointing, method):
    job = make_job(device=device, gradient_checkpointing=checkpointing, method=method)
    formula = fit_memory_formula(job, job.build_model())
    for lengths in ((TOKENS,), (3000,), (1000, 1500)):
        trace = trace_training_step(replace(job, lengths=lengths), stop_after_backward=True)
        # On a CPU the formula has a mask of 1.1 MB, which a row of more than 2,048 tokens does not need.
        mask = 4 * PART * (MAX_SPLIT_TOKENS + PART) if (device, lengths) == ("cpu", (3000,)) else 0
        assert formula.peak(lengths) == pytest.approx(trace.peak + mask, rel=0.005)
        assert formula.correct(lengths, trace).peak(lengths) == pytest.approx(trace.peak, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(1000,), (8000,), (3000, 2000)], ids=str)
def test_formula_of_tiles_and_offloading(lengths):
    """Below the size of a tile it is an upper bound."""
    savings = {"gradient_checkpointing": True, "offload_activations": True, "mlp_tile_size": 2048}
    job = make_job(**savings, lengths=lengths)
    trace = trace_training_step(job)
    over = fit_memory_formula(job, job.build_model()).peak(lengths) - trace.peak
    assert over > 0 if sum(lengths) < 2048 else abs(over) < 0.005 * trace.peak
    assert extrapolate_step_trace(job).host_bytes == trace.host_bytes


@pytest.mark.slow
@pytest.mark.parametrize("supervised", [1.0, 0.4])
def test_formula_of_a_vocabulary_whose_chunks_are_long(supervised):
    """A GPU's chunk of 49,152 logits has 682 rows: 1,024 tokens fill no second one, and say nothing of more tokens."""
    job = make_job(depth=2, lengths=(600,), supervised=supervised)
    job.base_config.get_text_config().vocab_size = 49152
    formula = fit_memory_formula(job, job.build_model()).correct((600,), trace_training_step(job))
    for lengths in ((5000,), (9000, 9000)):
        trace = trace_training_step(replace(job, lengths=lengths), stop_after_backward=True)
        assert formula.peak(lengths) == pytest.approx(trace.peak, rel=0.01)


@pytest.mark.slow
def test_one_very_long_row_is_not_padded():
    job = make_job(gradient_checkpointing=True, depth=3)
    formula = fit_memory_formula(job, job.build_model())
    trace = trace_training_step(replace(job, lengths=(70_000,)), stop_after_backward=True)
    assert formula.peak((70_000,)) == pytest.approx(trace.peak, rel=0.1)
    assert formula.peak((35_000, 35_000)) > formula.peak((70_000,))


@pytest.mark.slow
def test_kept_attention_scores_grow_with_the_square():
    """Gemma 2 caps its scores, so they are kept: one long row takes more than two of half its length."""
    gemma, llama = (fit_memory_formula(job, job.build_model()) for job in (make_job("gemma2"), make_job()))
    assert gemma.peak((4096,)) > 1.5 * gemma.peak((2048, 2048))
    assert llama.peak((4096,)) == pytest.approx(llama.peak((2048, 2048)), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.slow
def test_two_and_three_layers_give_all_layers(name):
    job = make_job(name, lengths=(200,) if name != "gpt2" else (60,))
    trace, extrapolated = trace_training_step(job), extrapolate_step_trace(job, job.build_model())
    if name == "gemma3":  # whose kinds of layer alternate, which matters in a model this small
        assert extrapolated.peak == pytest.approx(trace.peak, rel=0.02)
        return
    assert {
        **extrapolated.bytes_by_phase_and_part,
        BACKWARD[1]: trace.bytes_by_phase_and_part[BACKWARD[1]],
    } == trace.bytes_by_phase_and_part
    assert (extrapolated.state_bytes_by_part, extrapolated.counts_by_operator_cost) == (
        trace.state_bytes_by_part,
        trace.counts_by_operator_cost,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1, 5], "rank_pattern": {r"layers\.5\..*": 32}},  # does not show in the first three
        {"layers_to_transform": [5]},
    ],
)
def test_layers_that_differ_are_traced_whole(settings):
    method = slimtune.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    job = make_job(method=method, lengths=(200,))
    assert (
        extrapolate_step_trace(job, job.build_model()).bytes_by_phase_and_part
        == trace_training_step(job).bytes_by_phase_and_part
    )


def test_peak_of_a_merge_into_tied_weights():
    """Merged weights that were tied are compared in the end, which a trace cannot."""
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    assert trace_merge_peak(MicroBatchWorkload(config, slimtune.FullConfig(), torch.float32, (8,)), torch.float32) > 0


def test_peak_of_a_merge():
    job = make_job()
    peak = trace_merge_peak(job, torch.float32)
    assert extrapolate_merge_cpu_peak(job, num_params=1000) == peak  # small models are merged in float32
    assert extrapolate_merge_cpu_peak(job, num_params=10**10) < peak
    assert (
        extrapolate_merge_cpu_peak(replace(job, method=slimtune.BottleneckConfig(task_type="CAUSAL_LM")), 1000) is None
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_are_planned_without_them(family):
    """A model of the first two or three layers shares none, so this one is planned from all its layers."""
    base = tiny_families.build(family, num_hidden_layers=4, num_kv_shared_layers=2)
    job = MicroBatchWorkload(base.config, LORA, torch.float32, (16,), device="cpu")
    model = job.build_model()
    job = replace(job, layer_kinds=extrapolation.find_layer_kinds(job, model))
    without = replace(job, base_config=tiny_families.build(family, num_hidden_layers=4).config).build_model()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in without.parameters())
    trace, extrapolated = trace_training_step(job), extrapolate_step_trace(job)  # as advice is, without a model
    assert extrapolated.bytes_by_phase_and_part == trace.bytes_by_phase_and_part
    assert extrapolated.counts_by_operator_cost == trace.counts_by_operator_cost


HYBRID = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 4, "num_hidden_layers": 16,
}  # fmt: skip
OWN_HEADS = {
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "num_hidden_layers": 18, "sliding_window": 64,
    "global_head_dim": 32, "hidden_size_per_layer_input": 0,
}  # fmt: skip
SHARED_KEYS = {
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 8, "num_hidden_layers": 40, "sliding_window": 64,
    "global_head_dim": 32, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256,
    "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
}  # fmt: skip
LATENT = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_hidden_layers": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes", "traced_layers"),
    [
        ("glm4_moe_lite", LATENT, [3, 4]),  # the first layer has no experts
        pytest.param("qwen3_5_text", HYBRID, [3, 4, 4], marks=pytest.mark.slow),
        pytest.param("gemma4_text", OWN_HEADS, [3, 4, 4], marks=pytest.mark.slow),  # full attention has larger heads
        pytest.param("gemma4_text", SHARED_KEYS, [5, 6, 6, 6, 6], marks=pytest.mark.slow),  # and the last have no keys
    ],
)
def test_layers_of_several_kinds(monkeypatch, family, sizes, traced_layers):
    monkeypatch.setenv("SLIMTUNE_TRACES", "/dev/null")
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, vocab_size=200,
        head_dim=16, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    method = slimtune.LoraConfig(target_modules="all-linear")
    job = MicroBatchWorkload(config, method, torch.bfloat16, (200,), device="cuda", packing=False)
    whole, model, traced = trace_training_step(job), job.build_model(), []
    job = replace(job, layer_kinds=extrapolation.find_layer_kinds(job, model))

    def trace(few, *args, **options):
        traced.append(few.num_layers)
        return trace_training_step(few, *args, **options)

    monkeypatch.setattr(extrapolation, "trace_training_step", trace)
    computed = extrapolation.extrapolate_step_trace(job, model)
    assert traced == traced_layers
    assert computed.state_bytes == whole.state_bytes
    assert computed.peak == pytest.approx(whole.peak, rel=0.001)
    # In a base this small the evaluation and the first layer's backward pass peak at one kind of layer or another.
    assert computed.peaks == pytest.approx(whole.peaks, rel=0.08)
    assert computed.counts_by_operator_cost.total() == whole.counts_by_operator_cost.total()
