"""LoRA trained through the rounding of a GGUF: what the forward pass computes with is what the file contains."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hand_run import save_adapter_of
from tiny_gguf import write_tiny_base
from tiny_ggufs import MAKERS, SIZES, write
from tiny_run import distance, recipe_of, train_in_two_parts, write_settings

import slimtune
from slimtune.core.training.train import train
from slimtune.errors import ConfigError, RecipeError, UsageError
from slimtune.export import expected_logps
from slimtune.export.exporter import export
from slimtune.export.gguf import convert_to_llama_cpp_tensors, make_gguf_module_name_mapper
from slimtune.export.gguf_roundings import find_weight_roundings
from slimtune.export.llama_cpp_tools import quantize_gguf
from slimtune.export.merge import load_run_for_export
from slimtune.methods.lora.rounded_lora import RoundedLinearLora

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
SMALL_BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "IQ4_NL"]


def read_tensors(file: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def list_linear_layers(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]


@pytest.mark.parametrize("precision", ["Q4_K_M", "IQ4_XS"])
def test_types_are_those_of_the_file_that_llama_cpp_writes(precision, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 320}  # some rows are no whole blocks of K-quants
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    quantize_gguf(write(tmp_path / "f32.gguf", model, tokenizer), tmp_path / "q.gguf", precision)
    names, tensors = make_gguf_module_name_mapper(model.config), read_tensors(tmp_path / "q.gguf")
    for layer, rounding in find_weight_roundings(model, list_linear_layers(model), precision).items():
        assert rounding.type_name == tensors[f"{names(layer)}.weight"].tensor_type.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MAKERS.keys() - {"gpt_oss", "gemma3", "gpt2"}))
def test_llama_cpp_chooses_types_for_every_architecture(kind):
    model = MAKERS[kind](261)
    names = make_gguf_module_name_mapper(model.config)
    layers = [n for n in list_linear_layers(model) if names(n) is not None and "router" not in n]
    assert len(find_weight_roundings(model, layers, "Q4_0")) == len(layers) > 0


@pytest.mark.parametrize("precision", [*SMALL_BLOCKS, "Q4_K_M"])
def test_an_untrained_adapter_leaves_the_base_as_near_as_ggml_rounds_it(precision, tiny_llama):
    base = tiny_llama(hidden_size=256, intermediate_size=256, head_dim=64)
    for name, rounding in find_weight_roundings(base, list_linear_layers(base), precision).items():
        weight = base.get_submodule(name).weight.detach()
        as_ggml = rounding.block_format.dequantize(rounding.block_format.quantize_as_ggml(weight)).flatten(1)
        error, least = ((w - weight).square().sum() for w in (rounding.round(weight.clone(), weight), as_ggml))
        assert error <= 1.0001 * least  # ggml rounds before it stores the scale in f16


@pytest.fixture
def base(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch) -> Path:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    return write_tiny_base(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer, intermediate_size=256)


def save_adapter(base: Path, folder: Path, precision: str) -> Path:
    return save_adapter_of(
        base, folder, slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", qat=precision)
    )


@pytest.mark.parametrize("precision", [*(pytest.param(p, marks=pytest.mark.slow) for p in SMALL_BLOCKS), "Q4_K_M"])
def test_the_file_contains_the_weights_of_the_forward_pass_bit_for_bit(precision, base, tmp_path):
    run = save_adapter(base, tmp_path / "run", precision)
    found = export(run, "gguf", tmp_path / "out", {"merged": True, "precision": precision}, verify=False)
    assert found.facts["matrices_rounded_as_trained"] == 14
    model: Any = load_run_for_export(run).model
    names, tensors = make_gguf_module_name_mapper(model.config), read_tensors(tmp_path / "out" / "model.gguf")
    for layer, module in model.adapter_modules("default").items():
        seen = module.get_rounded_weight(model.get_submodule(layer).weight, torch.float32)
        ((name, weight),) = convert_to_llama_cpp_tensors(f"{layer}.weight", seen, model.config, names).items()
        assert np.array_equal(gguf.dequantize(tensors[name].data, tensors[name].tensor_type), weight.numpy())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_the_engine_computes_what_was_trained(base, tmp_path, monkeypatch):
    for name, value in {"MAX_TOKENS": 48, "MAX_POSITIONS": 60, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 4}.items():
        monkeypatch.setattr(expected_logps, name, value)
    run = save_adapter(base, tmp_path / "run", "Q4_0")
    found = export(run, "gguf", tmp_path / "out", {"merged": True, "precision": "Q4_0"}, threads=1)
    assert found.check.passed


def test_export_says_that_another_precision_was_trained_for(base, tmp_path):
    run = save_adapter(base, tmp_path / "run", "Q4_0")
    found = export(run, "gguf", tmp_path / "out", {"merged": True, "precision": "Q5_0"}, verify=False)
    assert "matrices_rounded_as_trained" not in found.facts
    assert any("Q4_0" in note and "Q5_0" in note for note in found.notes)


def test_an_adapter_beside_its_base_is_refused(base, tmp_path):
    with pytest.raises(UsageError):
        export(save_adapter(base, tmp_path / "run", "Q4_0"), "gguf", tmp_path / "out", verify=False)


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_what_cannot_be_rounded_is_refused_with_the_settings(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        slimtune.LoraConfig(qat="Q4_0", **setting)


def test_other_methods_and_precisions_are_refused_before_a_weight_is_loaded(tmp_path, tiny_llama, tiny_tokenizer):
    settings = write_settings(tmp_path, tiny_llama, tiny_tokenizer)
    for method in ({"name": "vera", "qat": "Q4_0"}, {"name": "lora", "qat": "Q4_9"}):
        with pytest.raises(RecipeError, match=r"method\.qat"):
            recipe_of(settings | {"method": method})


def test_layers_other_than_linear_ones_are_refused(tiny_llama):
    with pytest.raises(ConfigError, match="embed_tokens"):
        slimtune.get_peft_model(tiny_llama(), slimtune.LoraConfig(target_modules=["embed_tokens"], qat="Q4_0"))


@pytest.fixture
def layer(tiny_llama) -> tuple[Any, RoundedLinearLora]:
    torch.manual_seed(0)
    config = slimtune.LoraConfig(r=4, target_modules=["down_proj"], qat="Q4_0")
    model: Any = slimtune.get_peft_model(tiny_llama(), config)
    name, module = next(iter(model.adapter_modules("default").items()))
    torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    return model.get_submodule(name), module


def test_gradients_are_those_of_the_rounded_weight_plus_a_change_of_the_merged_one(layer):
    linear, module = layer
    x, g = torch.randn(7, 64, dtype=torch.float64, requires_grad=True), torch.randn(7, 32, dtype=torch.float64)
    y = linear(x)
    rounded = module.get_rounded_weight(linear.weight, torch.float64)
    assert torch.equal(y, x @ rounded.t())
    A, B = module.lora_A.weight, module.lora_B.weight
    found = torch.autograd.grad(y, [x, A, B], g)
    a, b = A.detach().double(), B.detach().double()

    def loss(x: torch.Tensor, new_a: torch.Tensor, new_b: torch.Tensor) -> torch.Tensor:
        return (x @ (rounded + module.scale * (new_b @ new_a - b @ a)).t() * g).sum()

    inputs = [x.detach(), a, b]
    for i, gradient in enumerate(found):
        direction = torch.randn_like(inputs[i])
        moved = [[t + sign * 1e-4 * direction if i == j else t for j, t in enumerate(inputs)] for sign in (1, -1)]
        difference = (loss(*moved[0]) - loss(*moved[1])) / 2e-4
        assert (gradient.double() * direction).sum() == pytest.approx(difference.item(), rel=1e-5)


def test_separate_operations_give_the_same_gradients(layer, monkeypatch):
    linear, module = layer
    x, parameters = torch.randn(7, 64), [module.lora_A.weight, module.lora_B.weight]
    fused = torch.autograd.grad(linear(x).square().sum(), parameters)
    monkeypatch.setattr("slimtune.methods.lora.rounded_lora.needs_unfused_operations", lambda x: True)
    for a, b in zip(fused, torch.autograd.grad(linear(x).square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_rounded_weight_is_computed_again_after_an_optimizer_step(layer):
    linear, module = layer
    x = torch.randn(7, 64)
    before, weight = linear(x), module.get_rounded_weight(linear.weight, torch.float32)
    assert module.get_rounded_weight(linear.weight, torch.float32) is weight
    optimizer = torch.optim.AdamW([module.lora_B.weight], lr=0.1, fused=True)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(linear(x), before)


def test_steps_before_the_start_train_the_weights_as_they_are(tiny_llama):
    config = slimtune.LoraConfig(r=4, target_modules=["down_proj"], qat="Q4_0", qat_start=0.5)
    model: Any = slimtune.get_peft_model(tiny_llama(), config).train()
    config.on_train_begin(total_steps=4)
    ids, found = torch.arange(9)[None], []
    with torch.no_grad():
        for step in range(4):
            found.append(torch.equal(model(ids).logits, tiny_llama()(ids).logits))
            model.update_and_allocate(step + 1)
        assert found == [True, True, False, False]
        model.adapter_modules("default")["model.layers.0.mlp.down_proj"].rounds_while_training = False
        assert not torch.equal(model.eval()(ids).logits, tiny_llama()(ids).logits)


@pytest.mark.parametrize("start", [0, 0.5])
def test_an_interrupted_run_ends_in_the_same_bits(start, tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    settings = write_settings(tmp_path, tiny_llama, tiny_tokenizer)
    settings["method"] = {"name": "lora", "r": 4, "qat": "Q4_0", "qat_start": start}
    train(recipe_of(settings))
    in_parts = recipe_of(settings | {"output_dir": str(tmp_path / "parts")})
    train_in_two_parts(in_parts, monkeypatch, 3 if start == 0 else 5)
    assert distance(tmp_path / "whole", tmp_path / "parts") == 0
