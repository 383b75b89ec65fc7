"""Bases whose head does more than its config says, and recipes that ask to pack what is not exact, are refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny_families import VOCAB, build

from slimtune.core.models.lm_head import require_matching_lm_head_loss
from slimtune.core.training.loss import build_run_collator, make_collator
from slimtune.errors import ModelError, UsageError

CAP = {"final_logit_softcapping": 3.0}
SUPPORTED = {
    "opt": {},
    "gpt2": {},
    "qwen2": {},
    "phi": {},
    "gemma2": CAP,
    "gemma3_text": CAP,
    "granite": {"logits_scaling": 7.0},
    "cohere2": {"logit_scale": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name, dtype):
    model = build(name, **SUPPORTED[name]).to(dtype).train()
    require_matching_lm_head_loss(model)
    assert model.training


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_packing_is_refused_only_where_asked_for(family):
    model = build(family)
    assert not make_collator(model, 0).packing
    train = SimpleNamespace(packing=True, share_prefix=True, batch_size=2, max_tokens_per_micro_batch=64)
    recipe, tokenizer = SimpleNamespace(train=train), SimpleNamespace(pad_token_id=0)
    with pytest.raises(UsageError, match=r"(?s)train\.packing.*attention.*train\.packing=null"):
        build_run_collator(recipe.train, model, tokenizer, 8)
    train.packing = None
    assert not build_run_collator(recipe.train, model, tokenizer, 8).packing


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
    model = build("llama").to(dtype).train()
    model.__class__ = cls
    with pytest.raises(ModelError, match=cls.__name__):
        require_matching_lm_head_loss(model)
    assert model.training
