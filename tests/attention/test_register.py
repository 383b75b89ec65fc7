"""Whole models with packed layouts: hidden states, other calls, and which models and calls are refused."""

from unittest.mock import patch

import models_zoo as zoo
import pytest
import torch
import transformers as tf
from layouts import TREE
from reference import dense_mask, enlarge_weights, get_gradients, largest_relative_error
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import slimtune
from slimtune.attention import register
from slimtune.attention.packed_layout import PackedLayout
from slimtune.attention.register import LAYOUT_KWARG, empty_mask, packed_attention, packing_unsupported_reason
from slimtune.errors import ModelError

MODELS = ["llama", "qwen2", "gemma2", "gemma3", "gpt2"]


def build(name):
    model = getattr(zoo, name)(dtype=torch.float32)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    enlarge_weights(model)
    return model.requires_grad_(False)


def call(model, layout=TREE, **more):
    positions = torch.tensor([layout.positions()])
    inputs = {"input_ids": zoo.tokens(1, layout.total), "position_ids": positions, "use_cache": False} | more
    return model(**inputs, output_hidden_states=True)


def call_packed(model, layout=TREE, **more):
    return call(model, **{LAYOUT_KWARG: layout, "attention_mask": empty_mask(torch.device("cpu")), **more})


def dense_masks(model):
    """The layout's dense mask for each kind of layer."""

    def make(window):
        visible = dense_mask(TREE, window)[None, None]
        eager = model.config._attn_implementation == "eager"
        return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if eager else visible

    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return make(None)
    return {"full_attention": make(None), "sliding_attention": make(model.config.sliding_window)}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states(name):
    model = build(name)
    expected = call(model, attention_mask=dense_masks(model)).hidden_states
    with packed_attention(model) as can:
        assert can
        states = call_packed(model).hidden_states
    assert len(states) == 3
    for a, b in zip(states, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_window_changes_hidden_states():
    """The test above would notice a window that is lost."""
    model = build("gemma3")
    masks = dense_masks(model)
    expected = call(model, attention_mask=masks).hidden_states[-1]
    lost = call(model, attention_mask=dict.fromkeys(masks, masks["full_attention"])).hidden_states[-1]
    assert (lost - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
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
    with packed_attention(model):
        call_packed(model)
        assert torch.equal(run(), before)
    assert torch.equal(run(), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_restored(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    with packed_attention(model), packed_attention(model) as can:
        assert can
        assert model.config._attn_implementation == f"slimtune_{implementation}"
        call_packed(model)
    assert model.config._attn_implementation == implementation
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == implementation


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing(name):
    model = slimtune.get_peft_model(build(name), slimtune.LoraConfig(target_modules="all-linear"))
    zoo.shake(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()

    def run():
        with packed_attention(model):
            call_packed(model).logits.square().mean().backward()

    expected = get_gradients(model, run)
    assert model.config._attn_implementation in ("sdpa", "eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with patch.object(register, "_check_call", side_effect=register._check_call) as calls:
        assert largest_relative_error(get_gradients(model, run), expected) == 0
    assert [c.args[1] for c in calls.call_args_list] == [TREE] * 4  # two layers, forwards and recomputed


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_wrong_calls():
    model = build("llama")
    cache = model(input_ids=zoo.tokens(1, 4), use_cache=True).past_key_values
    other = PackedLayout((20,), (-1,))
    with packed_attention(model):
        with pytest.raises(ModelError, match="of 21 tokens to 21 keys, but the layout has one row of 20"):
            call_packed(model, **{LAYOUT_KWARG: other})
        with pytest.raises(ModelError, match="from 2 rows of 21 tokens"):
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
    with pytest.raises(ModelError, match="LlamaAttention is not causal, or adds a bias by position"):
        attend(position_bias=torch.zeros(1))
    module.config.sliding_window = 3
    with pytest.raises(ModelError, match="does not pass on its window"):
        attend()
    attend(sliding_window=3)
    module.is_causal = False
    with pytest.raises(ModelError, match="is not causal"):
        attend(sliding_window=3)


def test_models_that_cannot():
    bloom = tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=zoo.VOCAB))
    assert "attention of a BloomForCausalLM does not use" in packing_unsupported_reason(bloom)
    model = build("llama")
    assert packing_unsupported_reason(model) == ""
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "without plain attention (linear_attention)" in packing_unsupported_reason(model)
    del model.config.layer_types
    model.config.attention_chunk_size = 8
    assert "(chunked)" in packing_unsupported_reason(model)
    del model.config.attention_chunk_size
    model.set_attn_implementation("flex_attention")
    assert "'flex_attention', not 'sdpa' or 'eager'" in packing_unsupported_reason(model)
    with packed_attention(model) as can:
        assert not can
        assert model.config._attn_implementation == "flex_attention"
