"""Checkpoints in MXFP4, against transformers' own loader, which dequantizes them."""

import json

import pytest
import torch
from models_zoo import tokens
from safetensors.torch import load_file, save_file
from tiny_families import build
from tiny_run import recipe_of, settings_of_base
from transformers import AutoModelForCausalLM, Mxfp4Config

from slimtune.core.models.loader import load_base
from slimtune.core.models.quantization import dequantize_model
from slimtune.core.training.nonfinite import find_nonfinite_weights
from slimtune.core.training.train import train
from slimtune.errors import UsageError
from slimtune.export.merge import merge
from slimtune.extras.quantized_weight import QuantizedWeight
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """A tiny gpt-oss in the layout of the published checkpoint, and its tokenizer, as a Hugging Face folder."""
    folder = tmp_path / "base"
    sizes = {"num_hidden_layers": 2, "vocab_size": 320, "max_position_embeddings": 512, "intermediate_size": 64}
    build("gpt_oss", **sizes).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, into, out = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, out, into // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(123, 126, (experts, out, into // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_stays_packed_and_computes_what_transformers_computes(folder, dtype):
    base = load_base(str(folder), dtype=str(dtype).removeprefix("torch."))
    assert base.quantization == "mxfp4"
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    experts = {n: p for n, p in base.model.named_parameters() if isinstance(p, QuantizedWeight)}
    assert len(experts) == 4
    for name, packed in experts.items():
        assert torch.equal(packed.dequantized(), expected.get_parameter(name))
        assert packed.nbytes * 8 == 4.25 * packed.numel()
    with torch.no_grad():
        logits = base.model(tokens()).logits
        assert torch.equal(logits, expected(tokens()).logits)
        plain = dequantize_model(base.model, dtype)
        assert not any(isinstance(p, QuantizedWeight) for p in plain.parameters())
        assert torch.equal(plain(tokens()).logits, logits)


def test_the_check_for_nan_dequantizes_nothing(folder, monkeypatch):
    model = load_base(str(folder), dtype="float32").model
    monkeypatch.setattr(QuantizedWeight, "dequantized", None)
    assert find_nonfinite_weights(model) == []
    model.lm_head.weight.data[0] = torch.nan
    assert find_nonfinite_weights(model) == ["lm_head.weight"]


def test_another_quantization_is_refused(folder):
    with pytest.raises(UsageError, match=r"mxfp4.*nf4"):
        load_base(str(folder), quantization="nf4")


@pytest.mark.slow
def test_a_run_is_planned_trained_and_merged(folder, tmp_path):
    recipe = recipe_of(settings_of_base(folder, tmp_path), max_steps=4)
    assert train(recipe).quantization == "mxfp4"
    proof = merge(tmp_path / "run", tmp_path / "merged").comparison
    assert proof.mean_difference < 1e-4 * proof.effect
    merged = load_base(str(tmp_path / "merged"), dtype="float32")
    assert merged.quantization is None
    config = load_base(str(folder), dtype="float32").model.config
    job = MicroBatchWorkload(config, recipe.method_config(), torch.float32, (64,), quantization="mxfp4")
    weights = trace_training_step(job).state_bytes_by_part["weights"]
    kept = sum(p.nbytes for p in load_base(str(folder), dtype="float32").model.parameters())
    assert weights == pytest.approx(kept, rel=0.01)
