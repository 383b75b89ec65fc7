"""Bases whose head does more than its config says, and recipes that ask to pack what is not exact, are refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from models_zoo import DECODER, VOCAB
from reference import enlarge_weights

from slimtune import setup
from slimtune.errors import ModelError, UsageError
from slimtune.train_step.loss import check_lm_head, make_collator

PLAIN = {**DECODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
GEMMA = {**PLAIN, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
SUPPORTED = {
    "opt": tf.OPTConfig(**PLAIN, word_embed_proj_dim=32, ffn_dim=64),
    "gpt2": tf.GPT2Config(n_embd=32, **LAYERS),
    "qwen2": tf.Qwen2Config(**PLAIN),
    "gemma2": tf.Gemma2Config(**GEMMA),
    "gemma3": tf.Gemma3TextConfig(**GEMMA),
    "granite": tf.GraniteConfig(**PLAIN, logits_scaling=7.0),
    "cohere2": tf.Cohere2Config(**PLAIN, logit_scale=0.3, sliding_window=4),
    "phi": tf.PhiConfig(**PLAIN),
}


def build(cls, config):
    torch.manual_seed(0)
    model = cls(config)
    enlarge_weights(model)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name, dtype):
    model = build(tf.AutoModelForCausalLM.from_config, SUPPORTED[name]).to(dtype)
    check_lm_head(model)
    assert model.training


@pytest.mark.parametrize("config", [tf.BloomConfig(**LAYERS), tf.MambaConfig(**PLAIN, state_size=8)])
def test_packing_is_refused_only_where_asked_for(config):
    model = build(tf.AutoModelForCausalLM.from_config, config)
    assert not make_collator(model, 0).packing
    train = SimpleNamespace(packing=True, share_prefix=True, batch_size=2, max_tokens_per_micro_batch=64)
    recipe, tokenizer = SimpleNamespace(train=train), SimpleNamespace(pad_token_id=0)
    with pytest.raises(UsageError, match=r"(?s)train.packing is true, but .*attention.*train.packing=null"):
        setup.build_collator(recipe, model, tokenizer, 8)
    train.packing = None
    assert not setup.build_collator(recipe, model, tokenizer, 8).packing


class ScaledLlama(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


class ShiftedLlama(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(VOCAB, dtype=out.logits.dtype) / 50
        return out


@pytest.mark.parametrize(("cls", "dtype"), [(ScaledLlama, torch.float32), (ShiftedLlama, torch.bfloat16)])
def test_unknown_head(cls, dtype):
    model = build(cls, tf.LlamaConfig(**PLAIN)).to(dtype)
    with pytest.raises(ModelError, match=f"the loss of a {cls.__name__} differs from the model's own"):
        check_lm_head(model)
    assert model.training
