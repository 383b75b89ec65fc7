"""Stacked experts in NF4 against bitsandbytes' own functions and the dequantized model; needs bitsandbytes."""

import copy
import shutil
from importlib.util import find_spec

import pytest
import torch
from models_zoo import tokens
from tiny_families import build
from tiny_run import adapter, recipe_of, settings_of_base
from torch import nn

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.adapter_module import MergeUnsupported
from slimtune.core.kernels.linear_layers import is_quantized, list_quantization_scales
from slimtune.core.models.loader import load_base
from slimtune.core.models.quantization import dequantize_model
from slimtune.core.training.nonfinite import find_nonfinite_weights
from slimtune.core.training.run_dir import RunDir
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.export.merge import load_run_for_export, merge
from slimtune.extras import quantized_weight
from slimtune.extras.nf4_experts import is_expert_parameter, quantize_experts_to_nf4
from slimtune.extras.quantized_weight import QuantizedWeight

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def make(family, implementation="grouped_mm", dtype=torch.float32, *, dequantized=False, **sizes):
    model = build(family, num_hidden_layers=2, **sizes)
    model.config._experts_implementation = implementation
    for name, weight in list(model.named_parameters()):
        if is_expert_parameter(model, name):
            packed = quantize_experts_to_nf4(weight.float())
            packed = QuantizedWeight(packed.packed, packed.format, packed.sizes, dtype)
            module, _, leaf = name.rpartition(".")
            new = nn.Parameter(packed.dequantized() if dequantized else packed, requires_grad=False)
            model.get_submodule(module)._parameters[leaf] = new
        else:
            weight.data = weight.data.to(dtype)
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj"], "target_parameters": BOTH, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, **settings)).eval()


def run_step(model):
    """Return the logits and the gradients by name."""
    logits = model(input_ids=tokens()).logits
    logits.double().logsumexp(-1).sum().backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", [(3, 96, 512), (4, 32, 48), (3, 7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_bitsandbytes(shape, dtype):
    from bitsandbytes import functional as bnb

    weight = torch.randn(shape).to(dtype)
    # As rows of an expert each: on a CPU, bitsandbytes dequantizes rows that are no multiple of 64 values wrongly.
    rows = (bnb.quantize_4bit(w.reshape(1, -1), compress_statistics=True, quant_type="nf4") for w in weight)
    expected = torch.stack([bnb.dequantize_4bit(*row) for row in rows]).view(shape)
    packed = quantize_experts_to_nf4(weight)
    assert torch.equal(packed.dequantized(), expected)
    assert torch.equal(packed[1:].mT.dequantized(), expected[1:].mT)
    assert torch.equal(packed[torch.tensor([2, 0, 2])].dequantized(), expected[[2, 0, 2]])
    assert torch.equal(packed + 0, expected)


def test_real_sizes_take_4_13_bits():
    packed = quantize_experts_to_nf4(torch.randn(2, 512, 512).bfloat16())
    assert 8 * packed.nbytes / packed.numel() == pytest.approx(4.127, abs=0.001)


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("grouped_mm", torch.float32, 1e-6), ("batched_mm", torch.float32, 1e-6), ("eager", torch.float64, 1e-9)],
)
@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_logits_and_gradients_equal_those_of_the_dequantized_model(
    family, implementation, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(quantized_weight, "GROUP_BYTES", 3 * 4 * 32 * 32)  # groups of some experts, the last smaller
    expected, their_grads = run_step(make(family, implementation, dtype, dequantized=True))
    logits, grads = run_step(make(family, implementation, dtype))
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert any("experts" in name for name in grads)
    for name, grad in grads.items():
        assert (grad - their_grads[name]).abs().max() <= tolerance * their_grads[name].abs().max(), name


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_no_dequantized_expert_is_kept_for_the_backward_pass(implementation):
    model = make("qwen3_moe", implementation, moe_intermediate_size=28)
    sizes = [{56, 32}, {28, 32}]  # of an expert's weights, and of no activation
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(input_ids=tokens()).logits.sum().backward()
    assert kept
    assert [t.shape for t in kept if set(t.shape[-2:]) in sizes] == []


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path, tiny_tokenizer):
    """A tiny mixture and its tokenizer as a Hugging Face folder."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 320, "max_position_embeddings": 512}
    build(request.param, **sizes).float().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_is_loaded_with_experts_in_4_bits(folder):
    model = load_base(str(folder), dtype="float32", quantization="nf4").model
    plain = load_base(str(folder), dtype="float32").model
    experts = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    assert experts.keys() == {n for n, p in plain.named_parameters() if p.dim() == 3}
    for name, weight in experts.items():
        assert torch.equal(weight.dequantized(), quantize_experts_to_nf4(plain.get_parameter(name)).dequantized())
        assert list_quantization_scales(weight)
    assert not find_nonfinite_weights(model)
    with pytest.raises(ValueError, match="serializable"):
        model.save_pretrained(folder.parent / "packed")
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(copy.deepcopy(model)(tokens()).logits, expected)
        dequantized = dequantize_model(model, torch.float32)
        assert not any(map(is_quantized, dequantized.modules()))
        assert (dequantized(tokens()).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_adapters_come_and_go():
    model = make("gpt_oss")
    before = {n: t.clone() for n, t in model.model.layers[0].mlp.experts.down_proj.packed.items()}
    adapted = model(tokens()).logits
    with model.disable_adapter():
        assert (model(tokens()).logits - adapted).abs().max() > 1e-3
    with pytest.raises(MergeUnsupported, match="experts"):
        model.merge_adapter()
    assert torch.equal(model(tokens()).logits, adapted)
    packed = model.unload().model.layers[0].mlp.experts.down_proj
    assert all(torch.equal(packed.packed[n], t) for n, t in before.items())


@pytest.mark.slow
def test_a_run_is_trained_resumed_merged_and_dequantized(folder, tmp_path):
    settings = settings_of_base(folder, tmp_path, quantization="nf4")
    train(recipe_of(settings, eval_steps=4))
    run = RunDir(tmp_path / "run")
    expected = adapter(run.path)
    assert any("experts" in name for name in expected)
    proof = merge(run.path, tmp_path / "merged").comparison
    assert proof.mean_difference < 1e-4 * proof.effect
    with torch.no_grad():
        logits = load_run(run.path).model(tokens()).logits
        assert (load_run_for_export(run.path).model(tokens()).logits - logits).abs().max() < 1e-4
        assert (load_base(str(tmp_path / "merged"), dtype="float32").model(tokens()).logits - logits).abs().max() < 1e-4
    shutil.rmtree(run.checkpoints / "checkpoint-8")
    shutil.rmtree(run.adapter)
    train(run.load_recipe(), resume=True)
    assert all(torch.equal(adapter(run.path)[n], t) for n, t in expected.items())
