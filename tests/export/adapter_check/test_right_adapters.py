"""Adapters that are right raise no alarm, over families and over PEFT's and our own files."""

import json

import peft
import pytest
from faulty_adapters import make_base, save_adapter, save_base

import slimtune
from slimtune.export.verify import check_adapter

LORAS = {
    "llama": {},
    "qwen2": {"bias": "lora_only"},
    "qwen3": {"use_rslora": True},
    "gemma2": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "gemma3": {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    "mistral": {"use_dora": True},
    "phi3": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 6}},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "olmo2": {"modules_to_save": ["lm_head"]},
    "qwen3_moe": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "granite": {"target_modules": ["embed_tokens", "q_proj"]},
    "stablelm": {"kind": peft.IA3Config, "target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    "cohere": {"kind": peft.LoHaConfig, "r": 4, "target_modules": ["q_proj"]},
    "opt": {"init_lora_weights": "orthogonal"},
    "gpt_neox": {"use_rslora": True},
    "starcoder2": {"bias": "all"},
    "glm4": {"lora_bias": True},
    "smollm3": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "exaone4": {"exclude_modules": ["down_proj"]},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "deepseek_v3": {},  # whose dense layers have none of the parameters that PEFT writes patterns for
    "arcee": {"layer_replication": [[0, 2], [1, 2]], "target_modules": r".*\.(up|down)_proj"},
    "gemma3_text": {"kind": peft.LoKrConfig, "r": 4},
    "olmo": {"kind": peft.VeraConfig, "target_modules": ["q_proj", "v_proj"]},
    "ministral": {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("family", LORAS)
def test_no_alarm_at_a_file_of_peft(tmp_path, family):
    model = make_base(family)
    base = save_base(model, tmp_path / "base")
    result = check_adapter(save_adapter(model, tmp_path / "adapter", **LORAS[family]), str(base))
    assert [f for f in result.file.findings if f.code != "tied-head"] == []
    assert result.file.placed == result.file.tensors > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "mixtral", "qwen3_moe"])
def test_no_alarm_at_a_file_of_ours(tmp_path, family):
    model = make_base(family)
    base = save_base(model, tmp_path / "base")
    adapted = slimtune.get_peft_model(
        model, slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    result = check_adapter(tmp_path / "adapter", str(base))
    assert (result.file.findings, result.file.placed) == ([], result.file.tensors)
    assert len(result.file.layers) == 2


def test_what_is_not_proven_is_said(adapter_copy):
    _, adapter = adapter_copy()
    result = check_adapter(adapter)  # its base is a model in memory
    assert (result.passed, result.file.base, result.file.placed) == (True, None, None)
    assert result.file.not_proven


def test_command_prints_the_result(slimtune, adapter_copy):
    base, adapter = adapter_copy()
    done = slimtune("check", adapter, "--base", base, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["file"]["placed"] == 28


def test_command_fails_at_a_fault(slimtune, adapter_copy):
    base, adapter = adapter_copy()
    (adapter / "adapter_config.json").unlink()
    done = slimtune("check", adapter, "--base", base, "--json")
    assert done.exit_code == 1
    assert [f["code"] for f in json.loads(done.stdout)["file"]["findings"]] == ["config-unreadable"]


def test_missing_adapter_is_wrong_use(slimtune, tmp_path):
    assert slimtune("check", tmp_path / "none").exit_code == 2


def test_unknown_base_is_wrong_use(slimtune, adapter_copy):
    assert slimtune("check", adapter_copy()[1], "--base", "no-such-base").exit_code == 2
