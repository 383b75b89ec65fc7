"""A run on a base in 4 or 8 bits, from recipe to export; needs bitsandbytes, and is skipped by name without it."""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import recipe_of
from transformers import AutoModelForCausalLM

from slimtune.cli.train import make_planner
from slimtune.config import Recipe
from slimtune.errors import ModelError, RecipeError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.export.merge import load_trained, merge
from slimtune.models import quantization
from slimtune.models.loader import load_base
from slimtune.run_dir import RunDir
from slimtune.setup import load_base_from_recipe, load_run
from slimtune.training.train import train
from slimtune.utils.linear_layers import get_weight, is_quantized

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])


def with_quant(settings, kind, **train):
    recipe = {**settings, "model": {**settings["model"], "quantization": kind}}
    return recipe_of(recipe, **train)


@needs_bitsandbytes
@KINDS
def test_a_quantized_run_trains_evaluates_merges_and_is_the_same_again(settings, kind, tmp_path):
    recipe = with_quant(settings, kind)
    result = train(recipe, planner=make_planner(False))
    assert (result["quantization"], result["dtype"]) == (kind, "float32")
    assert (
        result["validation_loss"]
        < json.loads(RunDir(recipe.output_dir).metrics_file.read_text().split("\n")[0])["train_loss"]
    )
    plan = json.loads(RunDir(recipe.output_dir).plan_file.read_text())["plan"]
    assert plan["dtype"] == kind
    loaded = load_run(recipe.output_dir)
    assert loaded.base.quantization == kind
    assert is_quantized(loaded.model.model.layers[0].mlp.up_proj)
    said = evaluate(recipe.output_dir, EvalSettings(split="validation"))
    assert said["quantization"] == kind
    assert said["tuned_loss"] == pytest.approx(result["validation_loss"], rel=1e-3)
    made = merge(recipe.output_dir, tmp_path / "merged")
    assert made["mean_difference"] < 0.1 * made["effect"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    # What is merged into is what the run multiplied by, not the base before it was quantized.
    layer = load_run(recipe.output_dir).model.model.layers[0].mlp.up_proj
    alone = AutoModelForCausalLM.from_pretrained(recipe.model.name).model.layers[0].mlp.up_proj.weight
    delta = layer.adapters["default"]
    change = delta.scale * delta.lora_B.weight @ delta.lora_A.weight
    there = merged.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(there, get_weight(layer).float() + change, atol=1e-5)
    assert (there - alone - change).abs().max() > 1e-4


@needs_bitsandbytes
def test_unpacking_leaves_all_else_as_it_is(settings):
    base = load_base(settings["model"]["name"], dtype="bfloat16", quantization="nf4")
    before = {n: t.clone() for n, t in base.model.state_dict().items() if "norm" in n or "embed" in n}
    turns = base.model.model.rotary_emb.inv_freq.clone()
    weight = get_weight(base.model.model.layers[0].mlp.up_proj)
    plain = quantization.dequantize_model(base.model, torch.bfloat16)
    there = plain.state_dict()
    assert all(torch.equal(there[n], t) for n, t in before.items())
    # In fp32, where a cast of the whole model would round it: positions would turn by other angles.
    assert torch.equal(plain.model.rotary_emb.inv_freq, turns)
    assert turns.dtype == torch.float32
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, weight)
    assert not plain.model.layers[0].mlp.up_proj.weight.requires_grad
    assert {t.dtype for t in there.values()} == {torch.bfloat16}


@needs_bitsandbytes
def test_an_unpacked_run_says_what_the_quantized_one_says(settings):
    recipe = with_quant(settings, "nf4", max_steps=2)
    train(recipe)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        quantized_one = load_run(recipe.output_dir).model(ids).logits
        trained = load_trained(recipe.output_dir)
        assert trained.base.quantization == "nf4"
        assert not any(is_quantized(m) for m in trained.model.modules())
        assert (trained.model(ids).logits - quantized_one).abs().max() < 1e-4
        assert (load_run(recipe.output_dir, quantization="none").model(ids).logits - quantized_one).abs().max() > 1e-3
        trained.model.merge_adapter()
        assert (trained.model(ids).logits - quantized_one).abs().max() < 1e-4


@needs_bitsandbytes
def test_resumed_with_states_in_8_bits_it_is_the_same_run(settings, tmp_path):
    # Of rank 128, most of A and B have 4096 values of the tiny base and more, the least that are kept in 8 bits.
    settings["method"] |= {"r": 128}
    recipe = with_quant(settings, "nf4", max_steps=6, eval_steps=3, optimizer="adamw-8bit")
    train(recipe)
    run = RunDir(recipe.output_dir)
    states = load_file(run.checkpoints / "checkpoint-3" / "optimizer.safetensors")
    kinds = {(t.dtype, t.numel() >= 4096) for n, t in states.items() if "state" in n}
    assert kinds == {(torch.uint8, True), (torch.float32, False)}
    assert sum("qmap" in n for n in states) == 2  # the tables of what a byte means are written once
    expected = load_file(run.adapter / "adapter_model.safetensors")
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.adapter)
    train(run.load_recipe(), resume=True)
    again = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in expected.items())


@needs_bitsandbytes
@KINDS
def test_a_checkpoint_that_is_quantized_is_loaded_as_it_is(settings, kind, tmp_path):
    folder = tmp_path / "packed"
    first = load_base(settings["model"]["name"], dtype="float32", quantization=kind)
    first.model.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)
    base = load_base(str(folder), dtype="bfloat16")
    assert base.quantization == kind
    layer = base.model.model.layers[1].mlp.down_proj
    assert torch.equal(
        layer.weight.view(torch.uint8), first.model.model.layers[1].mlp.down_proj.weight.view(torch.uint8)
    )
    if kind == "nf4":
        assert layer.compute_dtype == torch.bfloat16
    other = "int8" if kind == "nf4" else "nf4"
    with pytest.raises(UsageError, match=f"is stored in {kind}, and {other} was asked for"):
        load_base(str(folder), quantization=other)
    settings["model"]["name"] = str(folder)
    recipe = recipe_of(settings, max_steps=2)
    result = train(recipe, planner=make_planner(False))
    assert result["quantization"] == kind
    assert json.loads(RunDir(recipe.output_dir).plan_file.read_text())["plan"]["dtype"] == kind
    assert merge(recipe.output_dir, tmp_path / "merged")["positions"] > 0


@needs_bitsandbytes
def test_loftq_starts_nearer_to_the_base_before_quantization(settings):
    settings["method"] |= {"init_lora_weights": "loftq", "r": 16}
    recipe = with_quant(settings, "nf4", max_steps=1, learning_rate=1e-12)
    train(recipe)
    config = json.loads((RunDir(recipe.output_dir).adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    whole, ids = load_base(recipe.model.name, dtype="float32").model, torch.arange(3, 60)[None]
    with torch.no_grad():
        loaded, wanted = load_run(recipe.output_dir), whole(ids).logits
        started = (loaded.model(ids).logits - wanted).norm()
        with loaded.model.disable_adapter():
            plain = (loaded.model(ids).logits - wanted).norm()
    assert started < 0.8 * plain


def test_loftq_on_a_plain_base_and_unknown_bits_are_faults_of_the_recipe(settings):
    settings["method"] |= {"init_lora_weights": "loftq"}
    with pytest.raises(RecipeError, match=r"starts from the error of quantization, and model\.quantization is null"):
        Recipe.from_dict(settings)
    with pytest.raises(RecipeError, match=r"(?s)model\.quantization: got 'nf5'.*train\.optimizer: got 'adamw-4bit'"):
        with_quant(settings, "nf5", optimizer="adamw-4bit")


def test_without_bitsandbytes_one_message_names_the_package(settings, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for recipe in (with_quant(settings, "nf4"), recipe_of(settings, optimizer="adamw-8bit")):
        with pytest.raises(ModelError, match="needs the package bitsandbytes") as said:
            train(recipe)
        assert said.value.hint == "pip install 'slimtune[quant]'"
        assert not recipe.output_dir.exists()


@needs_bitsandbytes
def test_a_dtype_that_the_kernels_do_not_have_is_refused(settings):
    settings["model"]["dtype"] = "float64"
    with pytest.raises(UsageError, match="a base in nf4 cannot compute in float64"):
        load_base_from_recipe(with_quant(settings, "nf4"))
