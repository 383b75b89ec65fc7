"""Adapters that are right raise no alarm, over families and over PEFT's and our own files."""

import json

import peft
import pytest
import torch
from chatml import CHATML
from fault_walk import ask_peft
from faulty_adapters import make_base, save_adapter, save_base
from tiny_families import build_family

import slimtune
from slimtune.export.verify import check_adapter

PEFT_PAIRS = {
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
    "gemma3n_text": {"use_rslora": True, "target_modules": ["q_proj", "per_layer_projection", "down_proj"]},
    "gemma4_text": {"target_modules": ["q_proj", "down_proj"]},
    "qwen3_5": {"target_modules": ["q_proj", "in_proj_qkv", "down_proj"]},
    "qwen3_next": {"target_modules": ["in_proj_qkvz", "o_proj"]},
    "lfm2": {"rank_pattern": {"in_proj": 2}},
    "granitemoehybrid": {"target_modules": ["in_proj", "q_proj"]},
    "mamba2": {"target_modules": ["in_proj"]},
    "phi": {"bias": "lora_only"},
    "olmo3": {"init_lora_weights": "gaussian"},
    "olmoe": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "qwen2_moe": {"target_modules": ["q_proj", "shared_expert.up_proj"]},
    "glm4_moe": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "seed_oss": {"use_dora": True},
    "apertus": {"target_modules": ["embed_tokens", "v_proj"]},
    "falcon": {"target_modules": ["query_key_value"], "alpha_pattern": {"query_key_value": 3}},
    "bloom": {"modules_to_save": ["lm_head"]},
    "nemotron": {"kind": peft.IA3Config, "target_modules": ["k_proj"], "feedforward_modules": []},
    "helium": {"kind": peft.MissConfig, "r": 4, "target_modules": ["q_proj"]},
}  # fmt: skip
"""Settings of PEFT by the family of the base."""
OUR_PAIRS = {
    "llama": {}, "qwen2": {"bias": "lora_only"}, "gemma2": {}, "gpt2": {}, "mixtral": {}, "qwen3_moe": {},
    "qwen3": {"use_rslora": True}, "gemma3_text": {"use_dora": True}, "mistral": {"rank_pattern": {"q_proj": 2}},
    "phi3": {"alpha_pattern": {"qkv_proj": 3}}, "olmo2": {"modules_to_save": ["lm_head"]},
    "granite": {"target_modules": ["embed_tokens", "q_proj"]}, "gemma3n_text": {}, "qwen3_next": {}, "gpt_oss": {},
    "lfm2": {"layers_to_transform": [1], "target_modules": ["w1", "w2"]}, "falcon": {},
    "smollm3": {"init_lora_weights": "pissa"},
}  # fmt: skip
"""Settings of our LoRA by the family of the base."""
WRITERS = {
    "PEFT": (PEFT_PAIRS, lambda model, folder, settings: save_adapter(model, folder, **settings)),
    "slimtune": (OUR_PAIRS, lambda model, folder, settings: save_ours(model, folder, settings)),
}
SIZED = [*PEFT_PAIRS][: [*PEFT_PAIRS].index("gemma3n_text")]
"""Families that `make_base` makes; the others have sizes of their own."""
PAIRS = [(writer, family) for writer, (pairs, _) in WRITERS.items() for family in pairs]
FILE_ALONE = {"deepseek_v3", "qwen3_5", "granitemoehybrid"}
"""Families whose tiny base the test's server does not compute."""
KNOWN = {"tied-head", "start-in-base"}
"""What is so, and is said: a head that shares its weight, and a start that is a part of the base."""


def save_ours(model, folder, settings):
    given = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = slimtune.get_peft_model(model, slimtune.LoraConfig(**given))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def make_pair(folder, writer, family):
    """Save a base and a right adapter of it."""
    pairs, save = WRITERS[writer]
    model = make_base(family) if family in SIZED else build_family(family, vocab_size=320).float()
    base = save_base(model, folder / "base")
    return base, save(model, folder / "adapter", pairs[family])


@pytest.mark.parametrize(("writer", "family"), PAIRS)
def test_right_file_raises_no_alarm(tmp_path, writer, family):
    base, adapter = make_pair(tmp_path, writer, family)
    result = check_adapter(adapter, str(base))
    assert {f.code for f in result.file.findings} <= KNOWN, result.file.findings
    assert (result.passed, result.file.placed) == (True, result.file.tensors)
    assert result.file.tensors > 0


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "family"), [pair for pair in PAIRS if pair[1] not in FILE_ALONE])
def test_right_adapter_is_applied_where_peft_serves_it(tmp_path, tiny_tokenizer, writer, family):
    base, adapter = make_pair(tmp_path, writer, family)
    tiny_tokenizer(chat_template=CHATML).save_pretrained(base)
    assert ask_peft(base, adapter) == "applied"


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
