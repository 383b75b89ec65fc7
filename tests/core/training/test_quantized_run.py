"""A run on a base in 4 or 8 bits, from recipe to export; needs bitsandbytes, and is skipped by name without it."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import adapter, metrics, recipe_of
from transformers import AutoModelForCausalLM

from slimtune.cli.train_command import make_run_planner
from slimtune.core.config import Recipe
from slimtune.core.kernels.linear_layers import get_dequantized_weight, is_quantized
from slimtune.core.models import quantization
from slimtune.core.models.loader import load_base
from slimtune.core.training.base_model import load_base_model
from slimtune.core.training.run_dir import RunDir
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import ModelError, RecipeError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.export.merge import load_run_for_export, merge

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
IDS = torch.arange(3, 60)[None]


def quantized_recipe(settings, kind, **train):
    return recipe_of({**settings, "model": {**settings["model"], "quantization": kind}}, **train)


def planned_dtype(recipe):
    return json.loads(RunDir(recipe.output_dir).plan_file.read_text())["plan"]["dtype"]


@needs_bitsandbytes
@KINDS
@pytest.mark.slow
def test_quantized_run_from_plan_to_merge(settings, kind, tmp_path):
    recipe = quantized_recipe(settings, kind)
    result = train(recipe, planner=make_run_planner(False))
    assert (result.quantization, result.dtype, planned_dtype(recipe)) == (kind, "float32", kind)
    assert result.validation_loss < metrics(result.run, "train_loss")[0]
    layer = load_run(recipe.output_dir).model.model.layers[0].mlp.up_proj
    assert is_quantized(layer)
    measured = evaluate(recipe.output_dir, EvalSettings(split="validation"))
    assert measured.quantization == kind
    assert measured.measures.tuned_loss.value == pytest.approx(result.validation_loss, rel=1e-3)
    proof = merge(recipe.output_dir, tmp_path / "merged").comparison
    assert proof.mean_difference < 0.1 * proof.effect
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    # What is merged into is what the run multiplied by, not the base before it was quantized.
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name).model.layers[0].mlp.up_proj.weight
    module = layer.adapters["default"]
    change = module.scale * module.lora_B.weight @ module.lora_A.weight
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(weight, get_dequantized_weight(layer).float() + change, atol=1e-5)
    assert (weight - base - change).abs().max() > 1e-4


@needs_bitsandbytes
def test_dequantized_model_keeps_all_other_tensors(settings):
    base = load_base(settings["model"]["name"], dtype="bfloat16", quantization="nf4")
    before = {n: t.clone() for n, t in base.model.state_dict().items() if "norm" in n or "embed" in n}
    frequencies = base.model.model.rotary_emb.inv_freq.clone()
    weight = get_dequantized_weight(base.model.model.layers[0].mlp.up_proj)
    plain = quantization.dequantize_model(base.model, torch.bfloat16)
    after = plain.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    # In fp32, where a cast of the whole model would round it: positions would turn by other angles.
    assert torch.equal(plain.model.rotary_emb.inv_freq, frequencies)
    assert frequencies.dtype == torch.float32
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, weight)
    assert not plain.model.layers[0].mlp.up_proj.weight.requires_grad
    assert {t.dtype for t in after.values()} == {torch.bfloat16}


@needs_bitsandbytes
def test_dequantized_run_computes_what_the_quantized_one_computes(settings):
    recipe = quantized_recipe(settings, "nf4", max_steps=2)
    train(recipe)
    with torch.no_grad():
        expected = load_run(recipe.output_dir).model(IDS).logits
        trained = load_run_for_export(recipe.output_dir)
        assert trained.base.quantization == "nf4"
        assert not any(is_quantized(m) for m in trained.model.modules())
        assert (trained.model(IDS).logits - expected).abs().max() < 1e-4
        assert (load_run(recipe.output_dir, quantization="none").model(IDS).logits - expected).abs().max() > 1e-3


@needs_bitsandbytes
def test_8_bit_optimizer_resumes_bit_for_bit(settings):
    # Of rank 128, most of A and B have 4096 values of the tiny base and more, the least that are kept in 8 bits.
    settings["method"] |= {"r": 128}
    recipe = quantized_recipe(settings, "nf4", max_steps=6, eval_steps=3, optimizer="adamw-8bit")
    train(recipe)
    run = RunDir(Path(recipe.output_dir))
    states = load_file(run.checkpoints / "checkpoint-3" / "optimizer.safetensors")
    kinds = {(t.dtype, t.numel() >= 4096) for n, t in states.items() if "state" in n}
    assert kinds == {(torch.uint8, True), (torch.float32, False)}
    assert sum("qmap" in n for n in states) == 2  # the tables of what a byte means are written once
    expected = adapter(run.path)
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.adapter)
    train(run.load_recipe(), resume=True)
    assert all(torch.equal(adapter(run.path)[n], t) for n, t in expected.items())


@pytest.mark.slow
@needs_bitsandbytes
@KINDS
def test_quantized_checkpoint_is_loaded_as_it_is(settings, kind, tmp_path):
    folder = tmp_path / "packed"
    first = load_base(settings["model"]["name"], dtype="float32", quantization=kind)
    first.model.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)
    base = load_base(str(folder), dtype="bfloat16")
    assert base.quantization == kind
    layer, original = (b.model.model.layers[1].mlp.down_proj for b in (base, first))
    assert torch.equal(layer.weight.view(torch.uint8), original.weight.view(torch.uint8))
    if kind == "nf4":
        assert layer.compute_dtype == torch.bfloat16
    other = "int8" if kind == "nf4" else "nf4"
    with pytest.raises(UsageError, match=f"{kind}.*{other}"):
        load_base(str(folder), quantization=other)
    settings["model"]["name"] = str(folder)
    recipe = recipe_of(settings, max_steps=2)
    assert train(recipe, planner=make_run_planner(False)).quantization == planned_dtype(recipe) == kind
    assert merge(recipe.output_dir, tmp_path / "merged").comparison.positions > 0


@needs_bitsandbytes
def test_loftq_starts_nearer_to_the_base_before_quantization(settings):
    settings["method"] |= {"init_lora_weights": "loftq", "r": 16}
    recipe = quantized_recipe(settings, "nf4", max_steps=1, learning_rate=1e-12)
    train(recipe)
    config = json.loads((Path(recipe.output_dir) / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    with torch.no_grad():
        expected = load_base(recipe.model.name, dtype="float32").model(IDS).logits
        model = load_run(recipe.output_dir).model
        started = (model(IDS).logits - expected).norm()
        with model.disable_adapter():
            plain = (model(IDS).logits - expected).norm()
    assert started < 0.8 * plain


def test_settings_that_quantization_cannot_serve(settings):
    with pytest.raises(RecipeError, match=r"(?s)model\.quantization: .*'nf5'.*train\.optimizer: .*'adamw-4bit'"):
        quantized_recipe(settings, "nf5", optimizer="adamw-4bit")
    if find_spec("bitsandbytes"):
        settings["model"]["dtype"] = "float64"
        with pytest.raises(UsageError, match=r"nf4.*float64"):
            load_base_model(quantized_recipe(settings, "nf4").model, None, None)
    settings["method"] |= {"init_lora_weights": "loftq"}
    with pytest.raises(RecipeError, match=r"'loftq'.*model\.quantization"):
        Recipe.from_dict(settings)


def test_without_bitsandbytes_one_message_names_the_package(settings, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for recipe in (quantized_recipe(settings, "nf4"), recipe_of(settings, optimizer="adamw-8bit")):
        with pytest.raises(ModelError, match="bitsandbytes") as e:
            train(recipe)
        assert e.value.hint == "pip install 'slimtune[quant]'"
        assert not recipe.output_dir.exists()
