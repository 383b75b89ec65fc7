"""The traced step against real steps, measured by torch's own allocator events, and fake tensors."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import transformers as tf
from method_cases import CASES
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from slimtune.core.kernels import activation_offload, cross_entropy
from slimtune.errors import ModelError
from slimtune.extras import stochastic_rounding
from slimtune.planning.fake_tensors import fake_tensor_mode, list_module_tensors, replace_meta_with_fake_cpu_tensors
from slimtune.planning.memory_trace import BACKWARD, trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload

FP32, BF16 = torch.float32, torch.bfloat16
ENDS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **ENDS}
BASES = {
    "llama": lambda **more: tf.LlamaConfig(**{**SIZES, "intermediate_size": 128, **more}),
    "gpt2": lambda: tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **ENDS),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, intermediate_size=128, head_dim=16, sliding_window=32),
}
MIXTURES = {
    "mixtral": tf.MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": tf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2),
}
ROWS = [((120, 80), True, 2), ((90, 60), False, 1), ((90, 90), False, 2), ((70, 50, 30), True, 3), ((130,), True, 1)]
"""Lengths, packing, micro-batches."""
PAIRS = ((60, 40, 30), (20, 35, 50), (0, 12, 9))
LISTS = ((70, 20, 25, 15, 30), (40, 10, 22, 18))
CHOICES = dict(zip(sorted(CASES), itertools.cycle(itertools.product(BASES, ROWS)), strict=False))


def make_job(base, method, rows=ROWS[0], dtype=FP32, sizes=None, **settings):
    lengths, packing, micro_batches = rows
    config = CASES[method](**(CASES[method].on_gpt2 if base == "gpt2" else {}))
    return MicroBatchWorkload(
        BASES[base](**(sizes or {})), config, dtype, lengths, micro_batches, packing=packing, **settings
    )


@pytest.fixture
def assert_exact(referee):
    """Compare state and peak with a real step of an equal job (a method's config is changed by its model)."""

    def check(job, tolerance=0.003):
        state, peak = referee.measured(copy.deepcopy(job))
        trace = trace_training_step(job)
        assert trace.state_bytes == pytest.approx(state, rel=1e-4)
        assert trace.step == pytest.approx(peak, rel=tolerance)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(CASES))
def test_every_method(method, assert_exact):
    """oneDNN's LSTM allocates a workspace that a fake one does not."""
    base, rows = CHOICES[method]
    assert_exact(make_job(base, method, rows), 0.05 if method == "p_tuning+lstm" else 0.003)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [PAIRS, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize(("base", "packing"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_answers_that_share_their_prompt(lengths, base, packing, assert_exact):
    assert_exact(make_job(base, "lora", (lengths, packing, 1)), 0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tied"), [(ROWS[4], True), (ROWS[2], False)], ids=str)
def test_tied_weights(rows, tied, monkeypatch, assert_exact):
    """The gradients of a tied weight, from the head's chunks and from the embedding, are accumulated in place."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 32 * 8192)
    sizes = {"vocab_size": 8192, "tie_word_embeddings": tied}
    assert_exact(make_job("llama", "full", rows, sizes=sizes, gradient_checkpointing=True))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "method"), [("mixtral", "lora"), ("qwen3_moe", "lora"), ("mixtral", "full")])
def test_mixtures_in_fp32(base, method, assert_exact):
    """Frozen experts get no gradient; trained ones get one of their own shape."""
    assert_exact(replace(make_job("llama", method, ROWS[4]), base_config=MIXTURES[base]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_full_in_bf16(optimizer, monkeypatch, assert_exact):
    """A step takes the fp32 copies of one tensor at a time, and the random numbers of a part of it."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(stochastic_rounding, "CHUNK", 100_000)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096}
    job = make_job("llama", "full", ROWS[4], BF16, sizes=sizes, gradient_checkpointing=True, optimizer=optimizer)
    assert_exact(replace(job, method=CASES["full"](bf16_stochastic_round=True)), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "method"), [("llama", "lora"), ("gpt2", "bottleneck"), ("gemma2", "prefix_tuning")])
def test_bf16_with_checkpointing(base, method, assert_exact):
    """Some kB are not traced: oneDNN's copies for bf16 products, and a random state for each checkpoint."""
    assert_exact(make_job(base, method, ROWS[3], BF16, gradient_checkpointing=True), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_tiles_and_offloading(base, assert_exact):
    """In a model this small the random states of the tiles (5 kB each) matter."""
    savings = {"gradient_checkpointing": True, "offload_activations": True, "mlp_tile_size": 32}
    assert_exact(make_job(base, "lora", ROWS[3], **savings), 0.04)


@pytest.mark.slow
def test_offloaded_activations_count_as_cpu_memory(monkeypatch):
    """The input of each layer is offloaded from a GPU; two are on the device at the peak."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    kept, offloaded, cpu = (
        trace_training_step(make_job("llama", "lora", ROWS[4], sizes={"num_hidden_layers": 8},
                              gradient_checkpointing=True,
                              device=device, offload_activations=offload))
        for device, offload in (("cuda", False), ("cuda", True), ("cpu", True))
    )  # fmt: skip
    inputs = 8 * 130 * 64 * 4
    assert (kept.host_bytes, offloaded.host_bytes, cpu.host_bytes) == (0, inputs, 0)
    assert kept.peaks[BACKWARD[0]] - offloaded.peaks[BACKWARD[0]] == pytest.approx(inputs * 6 / 8, rel=0.1)


def test_parts():
    job = make_job("llama", "lora")
    model = job.build_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in parameters)
    frozen = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - trained
    trace = trace_training_step(job)
    assert trace.state_bytes_by_part["adapters"] == trained
    assert trace.state_bytes_by_part["optimizer"] == 2 * trained + 4 * len(
        parameters
    )  # two moments, and a step per parameter
    assert frozen <= trace.state_bytes_by_part["weights"] <= 1.01 * frozen
    gradients = {phase: parts["gradients"] for phase, parts in trace.bytes_by_phase_and_part.items()}
    assert gradients == {
        **dict.fromkeys(trace.bytes_by_phase_and_part, trained),
        "evaluation": 0,
    }  # of the first micro-batch
    one = trace_training_step(make_job("llama", "lora", ((100,), True, 1)))
    assert one.bytes_by_phase_and_part["loss"]["gradients"] == 0


def test_backward_only_leaves_out_later_phases():
    job = make_job("llama", "lora")
    whole, short = trace_training_step(job), trace_training_step(job, stop_after_backward=True)
    assert whole.state_bytes_by_part == short.state_bytes_by_part
    assert short.bytes_by_phase_and_part == {
        p: parts for p, parts in whole.bytes_by_phase_and_part.items() if p not in ("optimizer", "evaluation")
    }


@pytest.mark.parametrize("method", ["adalora", "vera", "prompt_tuning"])
def test_trace_has_no_side_effects(method):
    job = make_job("llama", method)
    before, random = copy.deepcopy((job.base_config.to_dict(), job.method.to_dict())), torch.get_rng_state()
    assert trace_training_step(job) == trace_training_step(job)
    assert (job.base_config.to_dict(), job.method.to_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)


# --- fake tensors -----------------------------------------------------------------------------------------------------


class ManyTensors(nn.Module):
    """Holds tensors as parameters, buffers and attributes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4))
        self.tied = self.weight
        self.register_buffer("buffer", torch.empty(2, dtype=BF16))
        self.attribute = torch.empty(5).t()
        self.nested = (("key", torch.empty(6)), [self.weight], {"deep": {"er": torch.empty(7)}})
        self.other, self.none, self.text = nn.Linear(2, 2), None, "weight"
        self.other.weight.requires_grad_(False)


def test_every_tensor_of_a_module_becomes_fake():
    with torch.device("meta"):
        model = ManyTensors()
    with fake_tensor_mode():
        replace_meta_with_fake_cpu_tensors(model)
        tensors = list_module_tensors(model)
        assert all(isinstance(t, FakeTensor) and t.device.type == "cpu" for t in tensors)
        assert {tuple(t.shape) for t in tensors} == {(3, 4), (2,), (5,), (6,), (7,), (2, 2)}
        assert model.tied is model.weight is model.nested[1][0]
        assert isinstance(model.weight, nn.Parameter)
        assert (model.buffer.dtype, model.weight.requires_grad, model.other.weight.requires_grad) == (BF16, True, False)
        assert (model.nested[0][0], model.text, model.none) == ("key", "weight", None)
    assert not isinstance(torch.empty(1), FakeTensor)


def test_integers_are_known_until_overwritten():
    with fake_tensor_mode():
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        assert not mask.bool().all()
        assert (torch.arange(3) * mask).sum(1).tolist() == [1, 3]
        assert torch.cat([torch.ones(2, 4, dtype=torch.int64), mask], dim=1).argmin(1).tolist() == [6, 0]
        view, unknown = mask[:, 1:], torch.empty(2, 2, dtype=torch.int64)
        view.copy_(unknown)
        for overwritten in (mask, view, view + 1):
            with pytest.raises(DataDependentOutputException):
                overwritten.tolist()


@pytest.mark.parametrize(
    "read", [lambda x: bool(x.any()), lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_reading_unknown_values_is_an_error(read):
    with pytest.raises(ModelError, match="tensor"), fake_tensor_mode():
        read(torch.empty(3) + torch.arange(3))


@pytest.mark.parametrize(("device", "of_one", "of_two"), [("cpu", 5 / 8, 3 / 8), ("cuda", 1 / 2, 1 / 4)])
def test_attention_grows_with_the_square_of_a_row(device, of_one, of_two):
    """Of 512² pairs a GPU computes those that attend, a CPU those of 128 tokens with all up to the last of them."""
    long, short = (
        trace_training_step(make_job("llama", "lora", (rows, True, 1), device=device)).attention_flops_by_dtype
        for rows in ((512,), (256, 256))
    )
    heads_times_size, layers = 64, 2
    assert long[FP32] == pytest.approx(layers * 14 * heads_times_size * 512**2 * of_one, rel=0.01)
    assert short[FP32] == pytest.approx(layers * 14 * heads_times_size * 512**2 * of_two, rel=0.01)


def test_a_loop_over_tokens_is_refused_at_once():
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 64,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "layer_types": ["linear_attention", "indexed_attention"],
    }  # fmt: skip
    config = tf.AutoConfig.for_model("qwen4_exp_text", **sizes)
    with pytest.raises(ModelError, match="QSAIndexer"):
        trace_training_step(MicroBatchWorkload(config, CASES["lora"](), FP32, (1000,)))
