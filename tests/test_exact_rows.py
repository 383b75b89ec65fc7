"""Rows laid end to end must be as if alone; an architecture that cannot do that is refused, not trained wrongly."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MambaConfig, OPTConfig, Qwen2Config

from slimtune.errors import ModelError
from slimtune.train_step.loss import check_packing_supported, make_collator

SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NOT = {
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **SMALL),
}  # fmt: skip
EXACT = {
    "opt": OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                     **SMALL),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, **SMALL),
    "qwen2": Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, **SMALL),
}  # fmt: skip


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", NOT)
def test_refused(name):
    model = make(NOT[name]).train()
    with pytest.raises(ModelError, match="packed rows change each other") as e:
        check_packing_supported(model, make_collator(model, 0))
    assert e.value.exit_code == 1
    assert "train.packing=false" in str(e.value)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_taken(name, dtype):
    model = make(EXACT[name]).to(dtype)
    for share in (True, False):
        assert check_packing_supported(model, make_collator(model, 0, share_prefix=share)) is None
