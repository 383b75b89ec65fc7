"""Checkpoints in GPTQ and AWQ that gptqmodel wrote (`make_integer_checkpoints.py`), against what gptqmodel computes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models_zoo import tokens
from safetensors.torch import load_file, save_file
from tiny_run import adapter, recipe_of, settings_of_base

from slimtune import LoraConfig, get_peft_model
from slimtune.core.models.loader import load_base
from slimtune.core.models.quantization import dequantize_model
from slimtune.core.training.run_dir import RunDir
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import ConfigError, ModelError
from slimtune.export.merge import load_run_for_export, merge
from slimtune.extras.integer_checkpoints import read_integer_checkpoint
from slimtune.extras.quantized_weight import QuantizedLinear, QuantizedWeight
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload, build_plan_request

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
RECORDED = Path(__file__).parent / "integer_checkpoints"
NAMES = sorted(path.name for path in RECORDED.iterdir())


@pytest.fixture
def folder(request, tmp_path, tiny_tokenizer):
    """A tiny base as gptqmodel wrote it, and a tokenizer."""
    folder = shutil.copytree(RECORDED / request.param, tmp_path / "base")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_pattern_of_a_stranger_takes_bounded_time():
    settings = {"bits": 4, "dynamic": {"-:(x|xx)+!": {}}}
    with pytest.raises(ConfigError):
        read_integer_checkpoint("gptq", settings).has_layer("x" * 100)


def list_packed(model):
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}


def find_weight(model, name):
    """Return a weight by its name in gptqmodel, where each expert has a layer of its own."""
    layer, expert, projection = re.fullmatch(r"(.*?)(?:experts\.(\d+)\.)?(\w+)\.weight", name).groups()
    if expert is None:
        return model.get_parameter(name).dequantized()
    experts = model.get_submodule(f"{layer}experts")
    if projection == "down_proj":
        return experts.down_proj[int(expert)].dequantized()
    gate, up = experts.gate_up_proj[int(expert)].dequantized().chunk(2)
    return gate if projection == "gate_proj" else up


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_a_checkpoint_stays_packed_and_computes_what_its_library_computes(folder):
    base = load_base(str(folder), dtype="float32")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert base.quantization == settings["quant_method"]
    packed = list_packed(base.model)
    assert any(n.endswith("q_proj.weight") for n in packed)
    assert all(p.nbytes * 8 < (settings["bits"] + 3) * p.numel() for p in packed.values())
    expected = load_file(folder / "expected.safetensors")
    logits = expected.pop("logits").float()
    for name, weight in expected.items():
        assert torch.equal(find_weight(base.model, name).half(), weight), name
    with torch.no_grad():  # gptqmodel computes in 16 bits
        assert (base.model(tokens()).logits - logits).abs().max() < 0.01 * logits.abs().max()


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_gradients_equal_those_of_the_dequantized_model(folder):
    def run_step(*, dequantized):
        model = load_base(str(folder), dtype="float32").model
        model = dequantize_model(model, torch.float32) if dequantized else model
        assert any(isinstance(m, QuantizedLinear) for m in model.modules()) is not dequantized
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected, grads = run_step(dequantized=True), run_step(dequantized=False)
    for name, grad in grads.items():
        assert (grad - expected[name]).abs().max() <= 1e-6 * max(1, expected[name].abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_a_run_is_planned_trained_resumed_and_merged(folder, tmp_path):
    recipe, run = recipe_of(settings_of_base(folder, tmp_path), eval_steps=4), RunDir(tmp_path / "run")
    kind = train(recipe).quantization
    trained = adapter(run.path)
    proof = merge(run.path, tmp_path / "merged").comparison
    assert proof.mean_difference < 1e-4 * proof.effect
    merged = load_base(str(tmp_path / "merged"), dtype="float32")
    assert merged.quantization is None
    with torch.no_grad():
        logits = load_run(run.path).model(tokens()).logits
        for model in (load_run_for_export(run.path).model, merged.model):
            assert (model(tokens()).logits - logits).abs().max() < 1e-4
    shutil.rmtree(run.checkpoints / "checkpoint-8")
    shutil.rmtree(run.adapter)
    train(run.load_recipe(), resume=True)
    assert all(torch.equal(adapter(run.path)[n], t) for n, t in trained.items())
    base = load_base(str(folder), dtype="float32").model
    job = MicroBatchWorkload(base.config, recipe.method_config(), torch.float32, (64,), quantization=kind)
    weights = trace_training_step(job).state_bytes_by_part["weights"]
    assert weights == pytest.approx(sum(p.nbytes for p in base.parameters()), rel=0.01)
    (note,) = [n for n in build_plan_request(recipe, require_gpu_by_name("rtx-3060-12gb")).notes if "stored in" in n]
    assert kind.upper() in note


@pytest.mark.parametrize(
    ("folder", "changes", "named"),
    [
        ("gptq", {"bits": 3}, "GPTQ with bits 3"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("gptq", {"bits": 8}, r"qzeros .* shape"),
        ("awq", {"version": "gemv", "checkpoint_format": None, "format": None}, "version 'gemv'"),
        ("awq", {"bits": 8}, "AWQ with bits 8"),
    ],
    indirect=["folder"],
)
def test_what_is_not_read_is_refused_by_name(folder, changes, named):
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=named) as caught:
        load_base(str(folder))
    assert caught.value.expected and caught.value.hint  # noqa: PT018


@pytest.mark.parametrize(("folder", "leaf"), [("gptq_act_order", "g_idx"), ("awq", "scales")], indirect=["folder"])
def test_a_layer_that_lacks_a_tensor_is_named(folder, leaf):
    tensors = load_file(folder / "model.safetensors")
    lost = f"model.layers.0.self_attn.q_proj.{leaf}"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"layers.0.self_attn.q_proj .* lacks {leaf}"):
        load_base(str(folder))
