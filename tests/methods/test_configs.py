"""Settings of every method: what is refused, with the field's name; dropout; fields that differ by layer."""

import json
import subprocess
import sys

import pytest
import torch
from models_zoo import llama, run, shake
from packaging.version import Version

from slimtune import LoraConfig, PeftConfig, get_peft_model
from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.adapters.method_registry import get_method_config_class, list_methods
from slimtune.errors import ConfigError, TargetError

BAD_SETTINGS = [
    ("adalora", {"init_r": 4}, "init_r is 4"),
    ("adalora", {"tinit": 5, "tfinal": 5, "total_step": 10}, "total_step is 10"),
    ("adalora", {"beta1": 1.0}, "beta1 is 1.0"),
    ("adalora", {"use_rslora": True}, "no field 'use_rslora'"),
    ("bottleneck", {"non_linearity": "rleu"}, "did you mean 'relu'"),
    ("bottleneck", {"reduction_factor": 0}, "reduction_factor is 0"),
    ("bottleneck", {"reduction_factor": 4, "bottleneck_size": 8}, "bottleneck_size is 8"),
    ("bottleneck", {"output_adapter": False}, "output_adapter is False"),
    ("bottleneck", {"mh_adapter": True, "original_ln_before": True}, "original_ln_before is True"),
    ("bottleneck", {"leave_out": [1], "target_modules": ["mlp"]}, "leave_out is"),
    ("bottleneck", {"phm_layer": True}, "no field 'phm_layer'"),
    ("hira", {"init_weights": "pissa"}, "init_weights is 'pissa'"),
    ("hira", {"rank_pattern": {"q": 0}}, "rank_pattern is"),
    ("ia3", {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, "should be a subset of"),
    ("loha", {"rank_dropout": 1}, "rank_dropout is 1"),
    ("lokr", {"decompose_factor": 0}, "decompose_factor is 0"),
    ("lora", {"r": True}, "r is True"),
    ("lora", {"init_lora_weights": "pissa_niter_x"}, "pissa_niter_x"),
    ("lora", {"init_lora_weights": "orthogonal", "r": 3}, "r is 3"),
    ("lora", {"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "rank_pattern is"),
    ("lora", {"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ("lora", {"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
    ("lora", {"bias": "lora"}, "did you mean 'lora_only'"),
    ("lora", {"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    ("lora", {"task_type": "CAUSAL"}, "did you mean 'CAUSAL_LM'"),
    ("lora", {"loftq_config": {"loftq_bits": 4}}, "loftq_config is"),
    ("lora", {"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias=True is not"),
    ("lora", {"base_model_name_or_path": -1}, "base_model_name_or_path is -1"),
    ("lora", {"lora_bias": True, "use_dora": True}, "lora_bias=True is not"),
    ("lora", {"init_lora_weights": "mica", "use_dora": True}, "init_lora_weights is 'mica'"),
    ("lora", {"lr_ratio": 0}, "lr_ratio is 0"),
    ("lora", {"eva_config": {"x": 1}}, r"eva_config\.x"),
    ("lora", {"target_modules": "x", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
    ("lora", {"target_modules": ["x"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    ("lora", {"lora_alhpa": 3}, "did you mean 'lora_alpha'"),
    ("lora", {"megatron_core": "another"}, "LoraConfig has no field 'megatron_core'"),
    ("lora", {"trainable_token_indices": [3, 3]}, "trainable_token_indices is"),
    ("oft", {"r": 4}, "oft_block_size is 32"),
    ("trainable_tokens", {"token_indices": []}, "token_indices is"),
    ("trainable_tokens", {"token_indices": [-1]}, "token_indices is"),
    ("trainable_tokens", {"token_indices": [True]}, "token_indices is"),
    ("vera", {"projection_prng_key": None}, "projection_prng_key is None"),
    ("vera", {"bias": "lora_only"}, "bias is 'lora_only'"),
]


@pytest.mark.parametrize(("method", "settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(method, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        get_method_config_class(method)(**settings).check_required()
    assert caught.value.exit_code == 2


def test_configs_need_no_torch():
    """A recipe's method is checked before torch, whose import takes seconds."""
    code = "; ".join([
        "import sys, slimtune",
        "from slimtune.core.adapters.method_registry import METHODS, get_method_config_class",
        "print([get_method_config_class(name).__name__ for name in METHODS.built_in_names()])",
        "sys.exit('torch' in sys.modules)",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoraConfig" in done.stdout


@pytest.mark.parametrize("method", list_methods())
def test_every_field_is_declared_once(method):
    """Every field has its help, and its default is in its range."""
    shared = {"base_model_name_or_path", "revision", "auto_mapping", "peft_type", "peft_version", "runtime_config"}
    for spec in list_settings(get_method_config_class(method)):
        assert spec.name in shared or spec.help, spec.name
        required = spec.default is None and "required" in spec.help
        assert required or spec.find_error(spec.default) is None, spec.name


def test_values_become_what_they_are_in_peft():
    config = LoraConfig(target_modules=["v_proj", "q_proj"], rank_pattern=None, layers_to_transform=range(2))
    values = config.target_modules, config.rank_pattern, config.layers_to_transform
    assert values == ({"q_proj", "v_proj"}, {}, [0, 1])
    assert config.to_dict()["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("method", ["lora", "adalora", "hira", "miss", "vera", "bottleneck"])
def test_dropout_is_active_in_training_only(method):
    cls = get_method_config_class(method)
    field = next(spec.name for spec in list_settings(cls) if spec.name.endswith("dropout"))
    rank = {} if method in ("adalora", "bottleneck") else {"r": 4}
    model = shake(get_peft_model(llama(), cls(**{field: 0.5}, **rank)).eval())
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


@pytest.mark.parametrize(("method", "tensor"), [("lora", "lora_A.weight"), ("hira", "hira_A"), ("loha", "hada_w1_b")])
def test_a_layer_has_its_own_rank(method, tensor):
    make = get_method_config_class(method)
    model = get_peft_model(llama(), make(target_modules=["q_proj", "v_proj"], r=4, rank_pattern={"v_proj": 2}))
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    assert dict(layer.adapters["default"].named_parameters())[tensor].shape == (2, 32)
    with pytest.raises(TargetError, match="rank_pattern"):
        get_peft_model(llama(), make(target_modules=["q_proj"], rank_pattern={"v_proj": 2}))


@pytest.mark.parametrize(
    "method", [m for m in list_methods() if "rank" in getattr(get_method_config_class(m), "short_names", {})]
)
def test_rank_that_dwarfs_the_layers_is_refused_before_memory_is_taken(method):
    config_class = get_method_config_class(method)
    rank = config_class.short_names["rank"]
    with pytest.raises(ConfigError, match=rf"{rank}\W.*10,?000,?000\b"):
        get_peft_model(llama(), config_class(**{rank: 10**7}, target_modules=["q_proj"]))


def test_peft_version_names_the_format_and_the_writer(tmp_path, monkeypatch):
    LoraConfig().save_pretrained(tmp_path)
    written = Version(json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"].partition("@")[0])
    assert written.base_version == "0.21.2"
    assert str(written.local).startswith("slimtune.")
    monkeypatch.setattr("slimtune.core.adapters.peft_config.FORMAT_VERSION", "9.9")
    assert LoraConfig().peft_version == "9.9"
    assert PeftConfig.from_pretrained(tmp_path).peft_version.startswith(str(written))
