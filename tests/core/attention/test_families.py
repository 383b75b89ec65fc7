"""Every family that is packed: packed rows equal rows run alone in float64; and those that are not packed."""

import pytest
import torch
import transformers as tf
from tiny_families import EXAMPLES, Float64, build, nll_alone

import slimtune
from slimtune.core.attention.attention_functions import (
    LAYOUT_FAMILIES,
    POSITION_FAMILIES,
    layout_unsupported_reason_or_empty,
    packing_unsupported_reason_or_empty,
    using_packed_attention,
)
from slimtune.core.training.loss import compute_supervised_token_nll, forward_backward, make_collator


@torch.no_grad()
def packing_error(model):
    with Float64():
        alone, collator = nll_alone(model), make_collator(model, 0)
        assert collator.packing
        with using_packed_attention(model):
            return (compute_supervised_token_nll(model, collator(EXAMPLES)) - alone).abs().max().item()


@pytest.mark.parametrize("family", sorted(LAYOUT_FAMILIES | POSITION_FAMILIES))
def test_packed_rows_equal_rows_alone(family):
    model = build(family)
    assert packing_unsupported_reason_or_empty(model) == ""
    assert bool(layout_unsupported_reason_or_empty(model)) == (family in POSITION_FAMILIES)
    assert packing_error(model) < 1e-10


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("bloom", {}, "does not use transformers' attention interface"),
        ("mpt", {}, "does not use transformers' attention interface"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("mamba", {}, "layers without plain attention"),
        ("jamba", {}, "layers without plain attention"),
        ("qwen3_5_text", {}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}, "conv"),
        ("rwkv", {}, "does not use transformers' attention interface"),
        ("llama4_text", {}, "chunked"),
        ("roberta", {"is_decoder": True}, "not proven to stay apart"),
    ],
)
def test_families_that_are_not_packed(family, more, words):
    with torch.device("meta"):
        text = tf.AutoConfig.for_model(family).get_text_config()
        model = tf.AutoModelForCausalLM.from_config(type(text)(**{"num_hidden_layers": 4, **more}))
    assert words in packing_unsupported_reason_or_empty(model)
    assert not make_collator(model, 0).packing


def test_code_of_others_is_not_packed():
    class Own(tf.LlamaForCausalLM):
        pass

    model = Own(build("llama").config)
    assert "Own" in packing_unsupported_reason_or_empty(model)
    assert not make_collator(model, 0).packing


def test_gemma3_is_packed_though_bfloat16_rounds_much():
    """Its large norm weights make attention sharp: rounding grows to a fifth of the losses' spread over 24 layers."""
    layers = (["sliding_attention"] * 5 + ["full_attention"]) * 4
    model = build("gemma3_text", num_hidden_layers=24, layer_types=layers)
    for name, p in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            p.data.fill_(8)
        elif "post_attention" in name:
            p.data.fill_(3)
    assert packing_error(model) < 1e-8
    model = model.bfloat16()
    alone = nll_alone(model)
    with torch.no_grad(), using_packed_attention(model):
        packed = compute_supervised_token_nll(model, make_collator(model, 0)(EXAMPLES))
    assert (packed - alone).abs().mean() > 0.05 * alone.std()
    assert packing_unsupported_reason_or_empty(model) == ""
    assert make_collator(model, 0).packing


def test_bfloat16_gemma3_is_packed_and_trains():
    """Its rounding is larger than many a threshold, and says nothing about whether rows see each other."""
    model = build("gemma3_text").bfloat16()
    model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = make_collator(model, 0)(EXAMPLES)
    assert packing_unsupported_reason_or_empty(model) == ""
    assert make_collator(model, 0).packing
    alone = nll_alone(model).mean()
    with torch.no_grad(), using_packed_attention(model):
        packed = compute_supervised_token_nll(model, batch).mean()
    assert 1e-4 < abs(packed - alone) / alone < 0.1
    losses = []
    with using_packed_attention(model.train()):
        for _ in range(2):
            losses.append(forward_backward(model, [batch]))
            with torch.no_grad():
                for p in (p for p in model.parameters() if p.grad is not None):
                    p.sub_(p.grad, alpha=0.05)
            model.zero_grad()
    assert losses[1] < losses[0]
