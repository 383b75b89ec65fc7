"""LoRA at nn.MultiheadAttention, with real peft as the oracle."""

import peft
import pytest
import torch
from adapter_checks import assert_loads, assert_merges
from models_zoo import shake
from torch import nn

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from slimtune.errors import ConfigError, MixedBatchError, TargetError
from slimtune.export.export_support import get_export_support_flags

NAMES = [f"base_model.model.mha.{part}lora_{m}.weight" for part in ("", "base_layer.out_proj.") for m in "AB"]


class Net(nn.Module):
    def __init__(self, dtype=torch.float64, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.mha, self.head = nn.MultiheadAttention(8, 2, dtype=dtype, **settings), nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.mha(x, x, x)[0])


def config(library=slimtune, **more):
    return library.LoraConfig(**{"target_modules": ["mha"], "r": 3, **more})


def sequence(dtype=torch.float64):
    return torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("settings", [{}, {"batch_first": True, "bias": False}, {"add_bias_kv": True}])
def test_files_outputs_and_gradients_are_pefts(settings, tmp_path):
    theirs = shake(peft.get_peft_model(Net(**settings), config(peft)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(Net(**settings), tmp_path / "theirs", is_trainable=True)
    assert list(get_peft_model_state_dict(ours)) == NAMES
    x = sequence()
    found, expected = ours(x), theirs(x)
    assert (found - Net(**settings)(x)).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-12
    for y in (found, expected):
        y.square().sum().backward()
    slopes = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    own = ours.get_submodule("mha").adapters["default"], ours.get_submodule("mha.out_proj").adapters["default"]
    for name, p in zip(NAMES, [p for m in own for p in m.parameters()], strict=True):
        # peft adds the update of out_proj twice, and differentiates one of them
        assert (p.grad - slopes[name] * (2 if "out_proj" in name else 1)).abs().max() < 1e-12, name
    assert_loads(ours, lambda: Net(**settings), tmp_path / "ours", lambda m: m(x), 1e-12)
    ours.eval()
    with torch.no_grad():  # PyTorch's fused path
        assert (ours(x) - found).abs().max() < 1e-12
    assert_merges(ours, lambda m: m(x), 1e-12)
    assert torch.equal(ours.unload()(x), Net(**settings)(x))


def test_several_adapters_bf16_and_conversion():
    model, x = get_peft_model(Net(torch.bfloat16), config()), sequence(torch.bfloat16)
    assert torch.equal(model(x), Net(torch.bfloat16)(x))
    model = get_peft_model(Net(), config()).eval()
    model.add_adapter("other", config(target_modules=["out_proj"], init_lora_weights="pissa"))
    assert model.match_report("other").adapted == ("mha.out_proj",)
    shake(model)
    model.set_adapter(["default", "other"])
    together, x = model(sequence()), sequence()
    assert_merges(model, lambda m: m(x), 1e-12)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    assert (model(x) - together).abs().max() < 1e-12
    with pytest.raises(MixedBatchError):
        model(x, adapter_names=["sum"] * 2 + ["__base__"] * 2)


def test_in_a_transformer_encoder_layer():
    """Its fused path reads the attention's weights without calling the attention."""

    def base():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    model, x = get_peft_model(base(), config(target_modules=["self_attn"])).eval(), sequence(torch.float32)
    shake(model)
    expected = model(x)
    with torch.no_grad():
        assert (model(x) - expected).abs().max() < 1e-5
        assert (base()(x) - expected).abs().max() > 1e-2


def test_trained_biases_and_exclusion():
    model = get_peft_model(Net(), config(bias="all"))
    keys = set(get_peft_model_state_dict(model))
    assert {"base_model.model.mha.base_layer.in_proj_bias", "base_model.model.head.bias"} < keys
    model = get_peft_model(Net(), config(exclude_modules=["out_proj"]))
    assert list(get_peft_model_state_dict(model)) == NAMES[:2]


def test_refusals():
    with pytest.raises(TargetError, match=r"MultiheadAttention.*\bquery\b"):
        get_peft_model(Net(kdim=4), config())
    for wrong in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "eva"}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} .*nn\.MultiheadAttention"):
            get_peft_model(Net(), config(**wrong))
    with pytest.raises(TargetError, match=r"mha .*MultiheadAttention.*loha"):
        get_peft_model(Net(), slimtune.LoHaConfig(target_modules=["mha"]))
    with pytest.warns(UserWarning, match="lora_dropout"):
        model = get_peft_model(Net(), config(lora_dropout=0.1))
    formats = get_export_support_flags(model)
    assert (formats.merged, formats.gguf, formats.vllm, formats.as_lora) == (True, False, False, False)
    assert "mha" not in get_peft_model(Net(), LoraConfig(target_modules="all-linear")).match_report().adapted
