"""VeRA beside the contract: the shared matrices, in the file and out of it, and what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from models_zoo import bert_encoder, llama, run, shake, t5, tokens
from safetensors.torch import load_file

from slimtune import PeftModel, get_peft_model
from slimtune.errors import AdapterError, ConfigError, TargetError
from slimtune.methods.vera import VeraConfig

SHARED = {"base_model.vera_A", "base_model.vera_B"}
EVERY = {"r": 8, "target_modules": "all-linear"}


def test_all_layers_share_two_matrices_as_large_as_the_largest_needs(tmp_path):
    model = get_peft_model(llama(), VeraConfig(**EVERY))
    assert len({id(d.held[0]) for n, d in model.adapter_modules("default").items() if n != "model"}) == 1
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {k for k in file if "lambda" not in k} == SHARED
    assert file["base_model.vera_A"].shape == (8, 48)
    assert file["base_model.vera_B"].shape == (48, 8)


def test_left_out_of_the_file_they_come_from_the_seed(tmp_path):
    model = get_peft_model(llama(), VeraConfig(save_projection=False, projection_prng_key=3, **EVERY)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    assert not SHARED & set(load_file(tmp_path / "adapter_model.safetensors"))
    torch.manual_seed(99)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), run(model))


def test_a_file_without_them_that_says_it_has_them_is_an_error(tmp_path):
    get_peft_model(llama(), VeraConfig(save_projection=False, **EVERY)).save_pretrained(tmp_path)
    config = VeraConfig.from_pretrained(tmp_path)
    config.save_projection = True
    config.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"base_model\.vera_A"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_pattern_that_matches_nothing_is_an_error():
    """The backbone, which holds the matrices, is no target."""
    with pytest.raises(TargetError, match="matches no module"):
        get_peft_model(llama(), VeraConfig(target_modules=r".*\.query"))


def test_dropout_is_there_while_training():
    model = get_peft_model(llama(), VeraConfig(vera_dropout=0.5, **EVERY)).eval()
    shake(model)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


@pytest.mark.parametrize("base", [bert_encoder, t5])
def test_a_model_that_is_its_own_backbone_holds_them(base):
    model = get_peft_model(base(), VeraConfig(r=8)).eval()
    shake(model)
    assert not torch.equal(run(model), run(base()))
    assert torch.equal(run(model.unload()), run(base()))


def test_nothing_of_the_outputs_size_is_kept():
    model = get_peft_model(llama(), VeraConfig(r=2, target_modules=["up_proj"]))
    layer, x, kept = model.get_submodule("model.layers.0.mlp.up_proj"), torch.randn(64, 32, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    assert kept
    assert all(t.numel() <= 64 * 2 for t in kept if t.untyped_storage().data_ptr() not in own)


def test_it_trains_under_autocast():
    model = get_peft_model(llama(dtype=torch.float32), VeraConfig(**EVERY))
    shake(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"projection_prng_key": None}, {"vera_dropout": 1}, {"bias": "lora_only"}])
def test_what_is_out_of_range_is_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        VeraConfig(**wrong)
