"""Whole models in `laid_out`: their hidden states, their other calls, what they are afterwards, and who is refused."""

from unittest.mock import patch

import models_zoo as zoo
import pytest
import torch
import transformers as tf
from plain_way import apart, gradients, loud
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import slimtune
from slimtune.attention import register as room
from slimtune.attention.packed_layout import PackedLayout
from slimtune.attention.register import LAYOUT_KWARG, empty_mask, packed_attention, packing_unsupported_reason
from slimtune.errors import ModelError

CPU = torch.device("cpu")
TREE = PackedLayout((5, 3, 2, 4, 1, 6), (-1, 0, 1, 0, -1, 4))
"""A beginning of 5, below it 3 and 4, below the 3 another 2; a beginning of 1, below it 6."""
MODELS = ["llama", "qwen2", "gemma2", "gemma3", "gpt2"]


def build(name, dtype=torch.float32):
    model = getattr(zoo, name)(dtype=dtype)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    loud(model)
    return model.requires_grad_(False)


def call(model, layout=TREE, **more):
    ids, at = zoo.tokens(1, layout.total), torch.tensor([layout.positions()])
    given = {"input_ids": ids, "position_ids": at, "use_cache": False} | more
    return model(**given, output_hidden_states=True)


def laid(model, layout=TREE, **more):
    return call(model, layout, **{LAYOUT_KWARG: layout, "attention_mask": empty_mask(CPU), **more})


def dense_masks(model, layout):
    def mask(window):
        seen = layout.dense_mask(window, CPU)[None, None]
        eager = model.config._attn_implementation == "eager"
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if eager else seen

    kinds = set(getattr(model.config, "layer_types", None) or ())
    if "sliding_attention" not in kinds:
        return mask(None)
    return {"full_attention": mask(None), "sliding_attention": mask(model.config.sliding_window)}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_the_dense_mask(name):
    model = build(name)
    want = call(model, attention_mask=dense_masks(model, TREE)).hidden_states
    with packed_attention(model) as can:
        assert can
        got = laid(model).hidden_states
    assert len(got) == 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_window_shows():
    """What is compared above would show a window that is lost."""
    model = build("gemma3")
    masks = dense_masks(model, TREE)
    want = call(model, attention_mask=masks).hidden_states[-1]
    lost = call(model, attention_mask=dict.fromkeys(masks, masks["full_attention"])).hidden_states[-1]
    assert (lost - want).norm() > 1e-2 * want.norm()


@pytest.mark.parametrize("name", MODELS)
def test_other_calls_go_on_as_before(name):
    """Also with padding; bit for bit."""
    model, ids = build(name), zoo.tokens()
    padded = torch.ones_like(ids)
    padded[1, -3:] = 0

    def run():
        return torch.stack([model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padded).logits])

    before = run()
    with packed_attention(model):
        laid(model)
        inside = run()
    for now in (inside, run()):
        assert torch.equal(now[:, 0], before[:, 0])
        assert torch.equal(now[:, 1, :-3], before[:, 1, :-3])


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_the_attention_of_the_model_comes_back(chosen):
    model = build("llama")
    model.set_attn_implementation(chosen)
    with packed_attention(model), packed_attention(model) as can:
        assert can
        assert model.config._attn_implementation == f"slimtune_{chosen}"
        laid(model)
    assert model.config._attn_implementation == chosen
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == chosen


def test_an_adapted_model_comes_back():
    model = slimtune.get_peft_model(build("llama"), slimtune.LoraConfig(target_modules="all-linear"))
    with packed_attention(model):
        laid(model)
        assert model.base_model.model.config._attn_implementation == "slimtune_sdpa"
    assert model.config._attn_implementation == "sdpa"
    assert model.base_model.model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_keeps_the_layout(name):
    model = slimtune.get_peft_model(build(name), slimtune.LoraConfig(target_modules="all-linear"))
    zoo.shake(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()

    def run():
        with packed_attention(model):
            laid(model).logits.square().mean().backward()

    want = gradients(model, run)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with patch.object(room, "_check_call", side_effect=room._check_call) as attended:
        assert apart(gradients(model, run), want) == 0
    assert attended.call_count == 4  # two layers, forwards and again backwards
    assert all(c.args[1] is TREE for c in attended.call_args_list)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_layout_of_another_length():
    model = build("llama")
    with (
        packed_attention(model),
        pytest.raises(ModelError, match="from 1 rows of 21 tokens to 21 keys, but the layout has one row of 20"),
    ):
        call(model, **{LAYOUT_KWARG: PackedLayout((20,), (-1,)), "attention_mask": empty_mask(CPU)})


def test_several_rows():
    model = build("llama")
    ids = zoo.tokens(2, 21)
    with packed_attention(model), pytest.raises(ModelError, match="from 2 rows of 21 tokens"):
        model(input_ids=ids, use_cache=False, **{LAYOUT_KWARG: TREE, "attention_mask": empty_mask(CPU)})


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_with_a_cache():
    model = build("llama")
    cache = model(input_ids=zoo.tokens(1, 4), use_cache=True).past_key_values
    with packed_attention(model), pytest.raises(ModelError, match="without a cache") as e:
        laid(model, use_cache=True, past_key_values=cache)
    assert "train.packing=false" in str(e.value)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_is_not_plain():
    layout = PackedLayout((4,), (-1,))
    given = [torch.ones(1, heads, 4, 16) for heads in (4, 2, 2)]
    module = LlamaAttention(tf.LlamaConfig(**zoo.DECODER), 0)

    def attend(**more):
        return room._attend("sdpa", module, *given, None, **{LAYOUT_KWARG: layout, "scaling": 0.3, **more})

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
