"""Tiny bases and PEFT's adapters of them, made once."""

import pytest
from faulty_adapters import copy, make_base, save_adapter, save_base

LORAS = {
    "plain": ("llama", {}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"],
                              "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "dora": ("llama", {"use_dora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
}  # fmt: skip


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
        return made[name]

    return make


@pytest.fixture
def adapter_copy(made_adapters, tmp_path):
    """Return the base of an adapter of `LORAS`, and a copy of the adapter to change."""

    def make(name="plain"):
        base, adapter = made_adapters(name)
        return base, copy(adapter, tmp_path / "adapter")

    return make
