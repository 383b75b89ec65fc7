"""Checkpoints in FP8, made by transformers' own code, and of compressed-tensors."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from models_zoo import tokens
from safetensors.torch import load_file, save_file
from tiny_families import build
from tiny_run import recipe_of, settings_of_base
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from slimtune.core.models.loader import load_base
from slimtune.core.training.train import train
from slimtune.errors import ModelError
from slimtune.export.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
BLOCK = (16, 16)


def write_base(folder, family, tiny_tokenizer, settings):
    sizes = {"num_hidden_layers": 2, "vocab_size": 320, "max_position_embeddings": 512}
    build(family, **sizes).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.fixture(params=["qwen3", "qwen3_moe"])
def folder(request, tmp_path, tiny_tokenizer):
    """A tiny base in FP8 with a scale for each block, quantized by transformers."""
    settings = {"quant_method": "fp8", "weight_block_size": BLOCK, "modules_to_not_convert": ["lm_head"]}
    folder = write_base(tmp_path / "base", request.param, tiny_tokenizer, settings)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=BLOCK)))
    packed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        packed |= quantize.convert({name: tensor}) if name.endswith("_proj.weight") else {name: tensor}
    assert {t.dtype for t in packed.values()} == {torch.float8_e4m3fn, torch.float32}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fp8_is_dequantized_as_it_is_loaded(folder):
    base = load_base(str(folder), dtype="float32")
    how = FineGrainedFP8Config(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).eval()
    assert base.quantization == "fp8"
    with torch.no_grad():
        assert torch.equal(base.model(tokens()).logits, expected(tokens()).logits)


@pytest.mark.slow
def test_a_run_on_fp8_is_trained_and_merged(folder, tmp_path):
    train(recipe_of(settings_of_base(folder, tmp_path), max_steps=4))
    proof = merge(tmp_path / "run", tmp_path / "merged").comparison
    assert proof.mean_difference < 1e-4 * proof.effect
    assert load_base(str(tmp_path / "merged"), dtype="float32").quantization is None


@pytest.mark.slow
def test_what_compressed_tensors_wrote_is_dequantized_trained_and_merged(tmp_path, tiny_tokenizer):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as quantize

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
    model, folder = build("qwen3", max_position_embeddings=512, **sizes).bfloat16(), tmp_path / "base"
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    )
    settings = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
    quantize(model, settings)
    for layer in (m for m in model.modules() if hasattr(m, "weight_scale")):
        layer.weight_scale.data = (layer.weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5).to(torch.bfloat16).detach()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tiny_tokenizer().save_pretrained(folder)
    how = CompressedTensorsConfig(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).eval()
    base = load_base(str(folder), dtype="float32")
    assert base.quantization == "compressed-tensors"
    with torch.no_grad():
        assert torch.equal(base.model(tokens()).logits, expected(tokens()).logits)
    train(recipe_of(settings_of_base(folder, tmp_path), max_steps=4))
    proof = merge(tmp_path / "run", tmp_path / "merged").comparison
    assert proof.mean_difference < 1e-4 * proof.effect


@pytest.mark.skipif(find_spec("compressed_tensors") is not None, reason="compressed-tensors is installed")
def test_a_checkpoint_whose_library_is_missing_is_refused_by_name(tmp_path, tiny_tokenizer):
    folder = write_base(tmp_path / "base", "qwen3", tiny_tokenizer, {"quant_method": "compressed-tensors"})
    with pytest.raises(ModelError, match=r"compressed-tensors.*compressed_tensors") as caught:
        load_base(str(folder))
    assert "pip install compressed-tensors" in caught.value.hint
