"""VeRA beyond the contract: the shared matrices in files and from the seed, memory."""

import pytest
import torch
from models_zoo import bert_encoder, llama, run, shake, t5
from safetensors.torch import load_file

from slimtune import PeftModel, get_peft_model
from slimtune.errors import AdapterError, TargetError
from slimtune.methods.vera import VeraConfig

SHARED = {"base_model.vera_A", "base_model.vera_B"}
EVERY = {"r": 8, "target_modules": "all-linear"}


def test_layers_share_two_matrices(tmp_path):
    model = get_peft_model(llama(), VeraConfig(**EVERY))
    assert len({id(d.held[0]) for n, d in model.adapter_modules("default").items() if n != "model"}) == 1
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {k for k in file if "lambda" not in k} == SHARED
    assert file["base_model.vera_A"].shape == (8, 48)
    assert file["base_model.vera_B"].shape == (48, 8)


def test_without_projection_they_come_from_the_seed(tmp_path):
    model = get_peft_model(llama(), VeraConfig(save_projection=False, projection_prng_key=3, **EVERY)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    assert not SHARED & set(load_file(tmp_path / "adapter_model.safetensors"))
    torch.manual_seed(99)
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), run(model))


def test_a_file_that_lacks_them_is_refused(tmp_path):
    get_peft_model(llama(), VeraConfig(save_projection=False, **EVERY)).save_pretrained(tmp_path)
    config = VeraConfig.from_pretrained(tmp_path)
    config.save_projection = True
    config.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"base_model\.vera_A"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_regex_without_match_is_refused():
    """The backbone, where the matrices are stored, does not count as a target."""
    with pytest.raises(TargetError, match="matches no module"):
        get_peft_model(llama(), VeraConfig(target_modules=r".*\.query"))


@pytest.mark.parametrize("base", [bert_encoder, t5])
def test_a_model_that_is_its_own_backbone(base):
    model = get_peft_model(base(), VeraConfig(r=8)).eval()
    shake(model)
    assert not torch.equal(run(model), run(base()))
    assert torch.equal(run(model.unload()), run(base()))


def test_backward_saves_nothing_of_the_outputs_size():
    model = get_peft_model(llama(), VeraConfig(r=2, target_modules=["up_proj"]))
    layer, x, kept = model.get_submodule("model.layers.0.mlp.up_proj"), torch.randn(64, 32, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    assert kept
    assert all(t.numel() <= 64 * 2 for t in kept if t.untyped_storage().data_ptr() not in own)
