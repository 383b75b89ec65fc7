"""Fake layers in NF4 and int8 against bitsandbytes' own layers and steps on this CPU, measured by torch's profiler.

What bitsandbytes takes on a GPU is written down by hand, from its source.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import tiny_families
import torch
import transformers as tf
from error_facts import has_code
from method_cases import CASES
from models_zoo import DECODER, gpt2, llama
from torch import nn

from slimtune import LoraConfig
from slimtune.core.foundation.device import simulating_device_for_kernel_choice
from slimtune.core.kernels.linear_layers import get_dequantized_weight, is_quantized
from slimtune.errors import ModelError, UsageError
from slimtune.extras.bitsandbytes_loading import make_load_options
from slimtune.planning.fake_quantization import KINDS, fake_quantize_model, resolve_quantization_kind
from slimtune.planning.fake_tensors import fake_tensor_mode, list_module_tensors, replace_meta_with_fake_cpu_tensors
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.memory_tracker import MemoryTracker
from slimtune.planning.plan_request import MicroBatchWorkload

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
each_kind = pytest.mark.parametrize("kind", sorted(KINDS))
BF16 = torch.bfloat16
# Its MLP has neither a multiple of 64 columns nor of 256 blocks.
SIZES = {**DECODER, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "vocab_size": 256}


def make_job(kind, method="lora", dtype=torch.float32, **settings):
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    config = lora if method == "lora" else CASES[method](task_type="CAUSAL_LM")
    return MicroBatchWorkload(tf.LlamaConfig(**SIZES), config, dtype, (64, 40), quantization=kind, **settings)


@needs_bitsandbytes
@each_kind
@pytest.mark.parametrize("make", [llama, lambda **k: llama(tie=True, **k), gpt2], ids=["llama", "tied", "gpt2"])
def test_same_layers_as_bitsandbytes(make, kind, referee):
    base = make(dtype=torch.float32)
    real = referee.quantized(base, kind)
    with torch.device("meta"):
        fake = tf.AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    fake_quantize_model(fake, kind)
    shapes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (fake, real)]
    assert shapes[0] == shapes[1]
    quantized = [name for name, module in fake.named_modules() if is_quantized(module)]
    assert quantized
    for name in quantized:
        weights = [get_dequantized_weight(model.get_submodule(name)) for model in (fake, real)]
        assert (weights[0].shape, weights[0].dtype) == (weights[1].shape, weights[1].dtype)


@needs_bitsandbytes
@each_kind
@pytest.mark.parametrize("sizes", [(64, 64), (7, 33), (129, 128), (256, 688)], ids=str)
def test_layer_holds_what_bitsandbytes_holds(sizes, kind, referee):
    from bitsandbytes import nn as bnb

    out, into = sizes
    if kind == "int8":
        real = bnb.Linear8bitLt(into, out, has_fp16_weights=False)
        real.weight = bnb.Int8Params(torch.randn(sizes), requires_grad=False).to("cpu")
        real.init_8bit_state()
    else:
        real = bnb.Linear4bit(into, out)
        packed = bnb.Params4bit(torch.randn(sizes), quant_type="nf4", compress_statistics=kind == "nf4")
        real.weight = packed.to("cpu")
    kept = {t.data_ptr(): t.nbytes for t in (*real.parameters(), *referee.quantization_tensors(real))}
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))
        layer = model.model.layers[0].self_attn.q_proj = nn.Linear(into, out)
    fake_quantize_model(model, kind)
    assert sum(t.nbytes for t in list_module_tensors(layer)) == sum(kept.values())


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize(
    ("kind", "method", "dtype", "settings", "tolerance"),
    [
        ("nf4", "lora", torch.float32, {}, 0.003),
        ("nf4", "hira", torch.float32, {}, 0.003),
        ("nf4-single", "lora", torch.float32, {}, 0.003),
        ("int8", "lora", torch.float32, {}, 0.003),
        ("int8", "hira", torch.float32, {}, 0.003),
        ("nf4", "lora", torch.float32, {"optimizer": "adamw-8bit"}, 0.003),
        # oneDNN's products in bf16 take about 0.1 MB for themselves, 0.15 on some CPUs, whatever their sizes.
        ("nf4", "lora", BF16, {"optimizer": "adamw-8bit", "gradient_checkpointing": True}, 0.05),
        ("int8", "lora", BF16, {"gradient_checkpointing": True}, 0.05),
    ],
)
def test_step_takes_what_a_real_step_takes(kind, method, dtype, settings, tolerance, referee):
    job = make_job(kind, method, dtype, **settings)
    trace, (state, peak) = trace_training_step(job), referee.measured(job)
    assert trace.state_bytes == state
    assert trace.step == pytest.approx(peak, rel=tolerance)


MIXTURE = {"hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 320, "head_dim": 32}


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("dtype", "settings", "tolerance"),
    [(torch.float32, {}, 0.01), (torch.float32, {"gradient_checkpointing": True}, 0.01), (BF16, {}, 0.02)],
)
def test_mixture_in_nf4_takes_what_a_real_step_takes(family, dtype, settings, tolerance, referee):
    """Its experts are more than half of it, and are dequantized inside their products."""
    config = tiny_families.build(family, num_hidden_layers=2, vocab_size=256, **MIXTURE).config
    config._experts_implementation = "grouped_mm"
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    job = MicroBatchWorkload(config, lora, dtype, (64, 40), quantization="nf4", **settings)
    trace = trace_training_step(job)
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's bf16 products hold up to 4 % more, by the CPU's vectors
        state, peak = referee.measured(job)
    assert trace.state_bytes == state
    assert trace.step == pytest.approx(peak, rel=tolerance)


def test_states_in_8_bits():
    """Of rank 8 some of A and B are below 4096 values, which stay in fp32, and some above."""
    job = make_job("nf4", optimizer="adamw-8bit")
    sizes = [p.numel() for p in job.build_model().parameters() if p.requires_grad]
    assert {n < 4096 for n in sizes} == {True, False}
    expected = 2 * 1024 + sum(8 * n if n < 4096 else 2 * (n + 4 * -(-n // 256)) for n in sizes)
    assert trace_training_step(job).state_bytes_by_part["optimizer"] == expected


@pytest.mark.slow
@needs_bitsandbytes
def test_long_row_with_every_saving(referee):
    """What docs/long_rows.md plans for 8B, made small."""
    job = make_job("nf4", gradient_checkpointing=True, offload_activations=True, mlp_tile_size=64)
    job = replace(job, lengths=(900,))
    trace, (state, peak) = trace_training_step(job), referee.measured(job)
    assert trace.state_bytes == state
    # The CPU's attention kernel works in a megabyte a thread, whatever the sizes; benchmarks/long_rows.py is larger.
    assert 0 <= peak - trace.step < 2**20 * torch.get_num_threads() + 100_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["adaption_prompt", "lora+dora", "hira"])
def test_no_bitsandbytes(method, kind, monkeypatch):
    """Also methods that read the weight are planned."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    job = make_job(kind, method, device="cuda", gradient_checkpointing=True)
    frozen = sum(p.nbytes for p in make_job(None, method).build_model().parameters() if not p.requires_grad)
    assert trace_training_step(job).state_bytes_by_part["weights"] < frozen / 2


@each_kind
def test_values_are_counted_and_not_bytes(kind):
    counts = [make_job(k).build_model().get_nb_trainable_parameters() for k in (kind, None)]
    assert counts[0] == counts[1]


def trace_layer_on_gpu(kind, tokens, name="gate_proj"):
    """Return the peak bytes of a layer's forward and of its backward pass, and those kept between."""
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).to(BF16)
    fake_quantize_model(model, kind)
    layer = model.model.layers[0].mlp.get_submodule(name)
    with fake_tensor_mode(), simulating_device_for_kernel_choice("cuda"):
        replace_meta_with_fake_cpu_tensors(layer)
        x = torch.empty(1, tokens, layer.in_features, dtype=BF16, requires_grad=True)
        with MemoryTracker() as tracker:
            tracker.assign([*list_module_tensors(layer), x], "weights")
            before = tracker.peak
            tracker.start_phase("forward")
            y = layer(x)
            kept = sum(tracker.live.values()) - before
            tracker.start_phase("backward")
            y.backward(torch.empty_like(y))
    forward, backward = (sum(tracker.phases[p].values()) - before for p in ("forward", "backward"))
    return forward, kept, backward


@pytest.mark.parametrize("tokens", [64, 3000])
def test_layer_on_a_gpu(tokens):
    into, out = 256, 688
    n, x, y = into * out, 2 * tokens * into, 2 * tokens * out
    backward = 2 * y + x + 2 * n  # the weight in bf16, beside y, its gradient and that of x
    # The weight in bf16 and two tables of fp32 scales beside y.
    assert trace_layer_on_gpu("nf4", tokens) == (y + 2 * n + 2 * (n // 16), y, backward)
    assert trace_layer_on_gpu("nf4-single", tokens) == (y + 2 * n, y, backward)
    # x in int8 and a scale for each row, and beside them the sums in int32, in fp16 and in bf16; where x is wide, x in
    # fp16 twice and where its outliers are.
    assert trace_layer_on_gpu("int8", tokens) == (x // 2 + 4 * tokens + 4 * y, y, backward)
    wide = trace_layer_on_gpu("int8", tokens, "down_proj")
    assert wide == (max(y // 2 + 4 * tokens + 4 * x, 3 * y + 4 * tokens), x, 2 * x + y + 2 * n)


def test_checkpointing_does_not_free_the_inputs_of_int8():
    """bitsandbytes keeps those of q, k and v, of o, of gate and up, and of down; the last layer's exist in any case."""
    nf4, int8 = (
        trace_training_step(make_job(kind, device="cuda", gradient_checkpointing=True)).parts["activations"]
        for kind in ("nf4", "int8")
    )
    inputs = 4 * sum(make_job(None).lengths) * (3 * SIZES["hidden_size"] + SIZES["intermediate_size"])
    assert int8 - nf4 > 0.9 * inputs * (SIZES["num_hidden_layers"] - 1)


FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("stored", "requested", "kind"),
    [
        (None, None, None),
        (None, "int8", "int8"),
        (FOUR, None, "nf4-single"),
        ({**FOUR, "bnb_4bit_use_double_quant": True}, "nf4", "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None, "int8"),
    ],
)
def test_kind_of_a_checkpoint(stored, requested, kind):
    config = tf.LlamaConfig(**SIZES, **({"quantization_config": stored} if stored else {}))
    assert resolve_quantization_kind(config, requested) == kind


def test_checkpoints_that_cannot_be_planned():
    with pytest.raises(UsageError, match=r"int8.*nf4"):
        resolve_quantization_kind(tf.LlamaConfig(**SIZES, quantization_config={"load_in_8bit": True}), "nf4")
    with pytest.raises(ModelError, check=has_code("quantized-base")):
        resolve_quantization_kind(tf.LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 3}))


def test_what_cannot_be_quantized():
    with pytest.raises(UsageError, match=r"'nf'.*'nf4'"):
        make_job("nf").build_model()
    with pytest.raises(UsageError, match="quantized"):
        make_job("nf4", "full").build_model()
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 0}))
    with pytest.raises(UsageError, match=r"linear.*head"):
        fake_quantize_model(empty, "int8")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_that_a_family_clamps_as_it_trains_are_not_quantized(quantization):
    config = tiny_families.build("gemma3n_text", vocab_size_per_layer_input=tiny_families.VOCAB).config
    method = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trace_training_step(MicroBatchWorkload(config, method, torch.bfloat16, (16,), quantization=quantization))
    skipped = make_load_options(config, quantization, False, torch.bfloat16, torch.device("cpu"))["quantization_config"]
    assert "lm_head" in skipped.llm_int8_skip_modules
