"""Tiny bases and PEFT's adapters of them, made once."""

import re

import pytest
from faulty_adapters import copy, edit_tensors, make_base, save_adapter, save_base

LORAS = {
    "plain": ("llama", {}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"],
                              "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "dora": ("llama", {"use_dora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "biases": ("qwen2", {"bias": "lora_only"}),
    "biases-of-b": ("llama", {"lora_bias": True}),
    "shared-a": ("qwen2", {}),
    "token-rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "replicated": ("llama", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
}  # fmt: skip


def share_a(tensors):
    """Give k_proj and v_proj the A of q_proj."""
    return {k: tensors[re.sub("[kv]_proj", "q_proj", k)] if "lora_A" in k else t for k, t in tensors.items()}


@pytest.fixture(scope="session")
def made_adapters(tmp_path_factory):
    """Make a base and an adapter by name, once each: `made_adapters("plain")` is (base folder, adapter folder)."""
    made = {}

    def make(name):
        if name not in made:
            family, settings = LORAS[name]
            folder = tmp_path_factory.mktemp(name)
            base = save_base(make_base(family), folder / "base")
            made[name] = base, save_adapter(make_base(family), folder / "adapter", **settings)
            if name == "shared-a":  # as of a base that computes q, k and v as one
                edit_tensors(made[name][1], share_a)
        return made[name]

    return make


@pytest.fixture
def adapter_copy(made_adapters, tmp_path):
    """Return the base of an adapter of `LORAS`, and a copy of the adapter to change."""

    def make(name="plain"):
        base, adapter = made_adapters(name)
        return base, copy(adapter, tmp_path / "adapter")

    return make
