"""Bases in NF4 and int8 as a plan has them, against bitsandbytes' own layers and steps on this CPU.

The referee is torch's own profiler. What bitsandbytes takes on a GPU is written down by hand, from its source.
"""

import gc
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import transformers as tf
from methods.cases import CASES
from models_zoo import DECODER, gpt2, llama
from torch import nn
from torch.profiler import ProfilerActivity, profile

from slimtune import LoraConfig, get_peft_model
from slimtune.attention.register import packed_attention
from slimtune.errors import ModelError, UsageError
from slimtune.kernels.adamw import adamw_8bit
from slimtune.planning.fake_quantization import KINDS, quantization_kind, quantize
from slimtune.planning.fake_tensors import all_tensors, fake_mode, make_fake
from slimtune.planning.memory_trace import trace_memory
from slimtune.planning.memory_tracker import MemoryTracker
from slimtune.planning.request import TrainingJob
from slimtune.train_step.loss import forward_backward, make_collator, token_nll
from slimtune.train_step.memory_savings import apply_memory_savings
from slimtune.train_step.optimizer import build_optimizer
from slimtune.utils.device import simulate_device
from slimtune.utils.linear_layers import get_weight, is_quantized

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
EVERY = pytest.mark.parametrize("kind", sorted(KINDS))
# Its MLP has neither a multiple of 64 columns nor of 256 blocks.
SIZES = {**DECODER, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "vocab_size": 256}
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def settings(kind, dtype=torch.float32):
    if kind == "int8":
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def job(kind, method="lora", dtype=torch.float32, **more):
    config = LoraConfig(r=8, **ALL) if method == "lora" else CASES[method](task_type="CAUSAL_LM")
    return TrainingJob(tf.LlamaConfig(**SIZES), config, dtype, (64, 40), quantization=kind, **more)


def kept_by(layer):
    """Return what bitsandbytes keeps of a layer, beside its parameters."""
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "state", None)
    states = [s for s in (state, getattr(state, "state2", None)) if s is not None]
    return [t for s in states for t in vars(s).values() if isinstance(t, torch.Tensor)]


def size_of(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of(run):
    """Return the most bytes that torch's allocator gave out at once beyond what was there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def loaded(model, kind, folder):
    """Return the model as transformers and bitsandbytes load it."""
    model.save_pretrained(folder)
    dtype = model.dtype
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings(kind, dtype), dtype=dtype, device_map="cpu"
    )


def measured(job, folder):
    """Return (bytes held, peak of a step, peak of an evaluation) of the job's real second step."""
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(job.base_config, dtype=job.dtype)
    model = get_peft_model(loaded(base, job.quantization, folder), job.method)
    apply_memory_savings(model, job.gradient_checkpointing, job.offload_activations, job.mlp_tile_size)
    model.train()
    rows = [{"input_ids": [1 + i % 200 for i in range(n)]} for n in job.lengths]
    pack = make_collator(model, 0, packing=True, share_prefix=False)([{**r, "labels": r["input_ids"]} for r in rows])
    optimizer = build_optimizer(model, job.optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        forward_backward(model, [pack])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluate():
        token_nll(model.eval(), pack)

    with packed_attention(model):
        step()
        moments = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        inner = [t for m in model.modules() if is_quantized(m) for t in kept_by(m)]
        return size_of([*all_tensors(model), *inner, *moments]), peak_of(step), peak_of(evaluate)


@needs_bitsandbytes
@EVERY
@pytest.mark.parametrize("make", [llama, lambda **k: llama(tie=True, **k), gpt2], ids=["llama", "tied", "gpt2"])
def test_the_layers_are_those_that_bitsandbytes_takes(make, kind, tmp_path):
    base = make(dtype=torch.float32)
    real = loaded(base, kind, tmp_path)
    with torch.device("meta"):
        ours = tf.AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    quantize(ours, kind)
    assert {n: (p.shape, p.dtype) for n, p in ours.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert any(map(is_quantized, ours.modules()))
    for name, module in ours.named_modules():
        if is_quantized(module):
            mine, theirs = get_weight(module), get_weight(real.get_submodule(name))
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


@needs_bitsandbytes
@EVERY
@pytest.mark.parametrize("sizes", [(64, 64), (7, 33), (3, 5), (129, 128), (256, 688)], ids=str)
def test_what_a_layer_holds_is_what_bitsandbytes_holds(sizes, kind):
    from bitsandbytes import nn as theirs

    out, into = sizes
    weight = torch.randn(sizes)
    if kind == "int8":
        real = theirs.Linear8bitLt(into, out, has_fp16_weights=False)
        real.weight = theirs.Int8Params(weight, requires_grad=False).to("cpu")
        real.init_8bit_state()
    else:
        real = theirs.Linear4bit(into, out)
        packed = theirs.Params4bit(weight, quant_type="nf4", compress_statistics=kind == "nf4")
        real.weight = packed.to("cpu")
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))
        layer = model.model.layers[0].self_attn.q_proj = nn.Linear(into, out)
    quantize(model, kind)
    assert sum(t.nbytes for t in all_tensors(layer)) == size_of([*real.parameters(), *kept_by(real)])


@needs_bitsandbytes
@EVERY
@pytest.mark.parametrize("method", ["lora", "hira"])
def test_a_step_takes_what_a_real_step_takes(method, kind, tmp_path):
    planned = job(kind, method)
    traced, (held, step, evaluation) = trace_memory(planned), measured(planned, tmp_path)
    assert traced.state_bytes == held
    assert traced.step == pytest.approx(held + step, rel=0.003)
    if kind != "int8":  # on a CPU, bitsandbytes evaluates by another kernel
        assert traced.peaks["evaluation"] == pytest.approx(held + evaluation, rel=0.01)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_in_8_bits_take_what_bitsandbytes_takes(dtype, tmp_path):
    # Of rank 8 some of A and B are below 4096 values, which stay in fp32, and some above.
    planned = job("nf4", dtype=dtype, optimizer="adamw-8bit")
    traced, (held, step, _) = trace_memory(planned), measured(planned, tmp_path)
    assert traced.state_bytes == held
    assert traced.step == pytest.approx(held + step, rel=0.003 if dtype == torch.float32 else 0.02)
    shapes = [p.shape for p in planned.build_model().parameters() if p.requires_grad]
    assert {n.numel() < 4096 for n in shapes} == {True, False}
    assert traced.state["optimizer"] == 2 * 1024 + sum(
        8 * n.numel() if n.numel() < 4096 else 2 * (n.numel() + 4 * -(-n.numel() // 256)) for n in shapes
    )


@needs_bitsandbytes
def test_a_step_of_the_optimizer_itself_takes_what_bitsandbytes_takes():
    shapes = [(100, 100), (64, 65), (7,)]
    real = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = adamw_8bit([{"params": real}], lr=1e-3)

    def step():
        optimizer.step()

    def begin(parameters):
        for p in parameters:
            p.grad = torch.zeros_like(p)

    begin(real)
    step()
    taken = peak_of(step)
    with fake_mode(), simulate_device("cpu"):
        fake = [nn.Parameter(torch.empty(shape)) for shape in shapes]
        planned = adamw_8bit([{"params": fake}], lr=1e-3)
        begin(fake)
        planned.step()
        with MemoryTracker() as tracker:
            planned.step()
    assert tracker.peak == pytest.approx(taken, rel=0.01)
    assert [set(s) for s in planned.state.values()] == [set(optimizer.state[p]) for p in real]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpointed_step_in_bf16_takes_what_a_real_step_takes(kind, tmp_path):
    planned = job(kind, dtype=torch.bfloat16, gradient_checkpointing=True)
    traced, (held, step, _) = trace_memory(planned), measured(planned, tmp_path)
    assert traced.state_bytes == held
    # oneDNN's products in bf16 take about 0.1 MB for themselves, whatever their sizes.
    assert traced.step == pytest.approx(held + step, rel=0.02)


@needs_bitsandbytes
def test_a_long_row_on_nf4_takes_what_its_real_step_takes(tmp_path):
    """What docs/long_rows.md plans for 8B, made small: tiled, checkpointed, sent away."""
    planned = replace(
        job("nf4", gradient_checkpointing=True, offload_activations=True, mlp_tile_size=64), lengths=(900,)
    )
    traced, (held, step, _) = trace_memory(planned), measured(planned, tmp_path)
    assert traced.state_bytes == held
    # The CPU's attention kernel works in a megabyte a thread, whatever the sizes; benchmarks/long_rows.py is larger.
    assert 0 <= held + step - traced.step < 2**20 * torch.get_num_threads() + 100_000


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["adaption_prompt", "lora+dora", "hira"])
def test_methods_that_read_the_weight_are_planned_without_bitsandbytes(method, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    planned = job(kind, method, device="cuda", gradient_checkpointing=True)
    frozen = sum(p.nbytes for p in job(None, method).build_model().parameters() if not p.requires_grad)
    assert trace_memory(planned).state["weights"] < frozen / 2


@EVERY
def test_values_are_counted_and_not_bytes(kind):
    assert (
        job(kind).build_model().get_nb_trainable_parameters() == job(None).build_model().get_nb_trainable_parameters()
    )


def layer_on_a_gpu(kind, tokens, name="gate_proj"):
    """Return the bytes of a layer's forward pass and its backward pass at their highest, and those kept between."""
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).to(torch.bfloat16)
    quantize(model, kind)
    layer = model.model.layers[0].mlp.get_submodule(name)
    with fake_mode(), simulate_device("cuda"):
        make_fake(layer)
        x = torch.empty(1, tokens, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        with MemoryTracker() as tracker:
            tracker.assign([*all_tensors(layer), x], "weights")
            before = tracker.peak
            tracker.start_phase("forward")
            y = layer(x)
            kept = sum(tracker.live.values()) - before
            tracker.start_phase("backward")
            y.backward(torch.empty_like(y))
    forward, backward = (sum(tracker.phases[p].values()) - before for p in ("forward", "backward"))
    return forward, kept, backward


@pytest.mark.parametrize("tokens", [64, 3000])
def test_what_a_layer_takes_on_a_gpu(tokens):
    into, out = 256, 688
    n, x, y = into * out, 2 * tokens * into, 2 * tokens * out
    backward = 2 * y + x + 2 * n  # the weight in bf16, beside y, its gradient and that of x
    # The weight in bf16 and two tables of fp32 scales beside y.
    assert layer_on_a_gpu("nf4", tokens) == (y + 2 * n + 2 * (n // 16), y, backward)
    assert layer_on_a_gpu("nf4-single", tokens) == (y + 2 * n, y, backward)
    # x in int8 and a scale for each row, and beside them the sums in int32, in fp16 and in bf16; where x is wide, x in
    # fp16 twice and where its outliers are.
    assert layer_on_a_gpu("int8", tokens) == (x // 2 + 4 * tokens + 4 * y, y, backward)
    wide = layer_on_a_gpu("int8", tokens, "down_proj")
    assert wide == (max(y // 2 + 4 * tokens + 4 * x, 3 * y + 4 * tokens), x, 2 * x + y + 2 * n)


def test_checkpointing_does_not_free_the_inputs_of_int8():
    def kept(kind):
        return trace_memory(job(kind, device="cuda", gradient_checkpointing=True)).parts["activations"]

    # bitsandbytes keeps them past `save_for_backward`: those of q, k and v, of o, of gate and up, and of down. The last
    # layer's lie there in any case.
    inputs = 4 * sum(job(None).lengths) * (3 * SIZES["hidden_size"] + SIZES["intermediate_size"])
    assert kept("int8") - kept("nf4") > 0.9 * inputs * (SIZES["num_hidden_layers"] - 1)


def test_a_checkpoint_that_is_quantized_is_planned_as_it_is_stored():
    def stored(**facts):
        return tf.LlamaConfig(**SIZES, quantization_config=facts)

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert quantization_kind(tf.LlamaConfig(**SIZES)) is None
    assert quantization_kind(tf.LlamaConfig(**SIZES), "int8") == "int8"
    assert quantization_kind(stored(**four)) == "nf4-single"
    assert quantization_kind(stored(**four, bnb_4bit_use_double_quant=True), "nf4") == "nf4"
    assert quantization_kind(stored(quant_method="bitsandbytes", load_in_8bit=True)) == "int8"
    with pytest.raises(UsageError, match="stored in int8, not in nf4"):
        quantization_kind(stored(load_in_8bit=True), "nf4")
    with pytest.raises(ModelError, match="stored in gptq, which cannot be planned"):
        quantization_kind(stored(quant_method="gptq", bits=4))


def test_what_cannot_be_quantized_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'nf' is no quantization; did you mean 'nf4'\?"):
        job("nf").build_model()
    with pytest.raises(UsageError, match="full fine-tuning would train weights"):
        job("nf4", "full").build_model()
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 0}))
    with pytest.raises(UsageError, match="no linear layer beside its head"):
        quantize(empty, "int8")
