"""Calls of a model that accepts packed layouts, and which calls are refused; test_gradients.py has what it computes."""

import models_zoo as zoo
import pytest
import torch
import transformers as tf
from layouts import TREE
from transformers.models.llama.modeling_llama import LlamaAttention

from slimtune.core.attention import attention_functions as register
from slimtune.core.attention.attention_functions import (
    LAYOUT_KWARG,
    make_placeholder_mask,
    packing_unsupported_reason_or_empty,
    using_packed_attention,
)
from slimtune.core.attention.packed_layout import PackedLayout
from slimtune.errors import ModelError


def build(name):
    model = getattr(zoo, name)(dtype=torch.float32)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def call_packed(model, **more):
    inputs = {
        "input_ids": zoo.tokens(1, TREE.total),
        "position_ids": torch.tensor([TREE.positions()]),
        "attention_mask": make_placeholder_mask(torch.device("cpu")),
        LAYOUT_KWARG: TREE,
    }
    return model(**inputs | {"use_cache": False, **more})


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2"])
def test_calls_without_layout(name):
    """They are as before bit for bit, also with padding."""
    model, ids = build(name), zoo.tokens()
    padding = torch.ones_like(ids)
    padding[1, -3:] = 0

    def run():
        logits = torch.stack([model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits])
        logits[:, 1, -3:] = 0
        return logits

    before = run()
    with using_packed_attention(model):
        call_packed(model)
        assert torch.equal(run(), before)
    assert torch.equal(run(), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_restored(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    with using_packed_attention(model), using_packed_attention(model) as can:
        assert can
        assert model.config._attn_implementation == f"slimtune_{implementation}"
        call_packed(model)
    assert model.config._attn_implementation == implementation
    with pytest.raises(ZeroDivisionError), using_packed_attention(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == implementation


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_wrong_calls():
    model = build("llama")
    cache = model(input_ids=zoo.tokens(1, 4), use_cache=True).past_key_values
    other = PackedLayout((20,), (-1,))
    with using_packed_attention(model):
        with pytest.raises(ModelError, match=r"\b21 .*\b21 .*\b20\b"):
            call_packed(model, **{LAYOUT_KWARG: other})
        with pytest.raises(ModelError, match=r"\b2 .*\b21\b"):
            call_packed(model, input_ids=zoo.tokens(2, 21), position_ids=None)
        with pytest.raises(ModelError, match=r"(?s)without a cache.*train.packing=false"):
            call_packed(model, use_cache=True, past_key_values=cache)


def test_attention_modules_that_cannot():
    inputs = [torch.ones(1, heads, 4, 16) for heads in (4, 2, 2)]
    module = LlamaAttention(tf.LlamaConfig(**zoo.DECODER), 0)

    def attend(**more):
        options = {LAYOUT_KWARG: PackedLayout((4,), (-1,)), "scaling": 0.3, **more}
        return register._attend("sdpa", module, *inputs, None, **options)

    attend()
    with pytest.raises(ModelError, match=r"LlamaAttention.*\bbias\b"):
        attend(position_bias=torch.zeros(1))
    module.config.sliding_window = 3
    with pytest.raises(ModelError, match="window"):
        attend()
    attend(sliding_window=3)
    module.is_causal = False
    with pytest.raises(ModelError, match="causal"):
        attend(sliding_window=3)


def test_another_attention_cannot():
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    assert "'flex_attention'" in packing_unsupported_reason_or_empty(model)
    with using_packed_attention(model) as can:
        assert not can
        assert model.config._attn_implementation == "flex_attention"
