"""Every family that is packed: packed rows equal rows run alone in float64; and those that are not packed."""

import pytest
import torch
import transformers as tf
from tiny_families import ROWS, Float64, build

from slimtune.attention.register import (
    LAYOUT_FAMILIES,
    POSITION_FAMILIES,
    layout_unsupported_reason,
    packed_attention,
    packing_unsupported_reason,
)
from slimtune.train_step.loss import make_collator, token_nll


@torch.no_grad()
def packing_error(model):
    examples = [{"input_ids": row, "labels": row} for row in ROWS]
    with Float64():
        alone = []
        for row in ROWS:
            ids = torch.tensor([row])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            alone.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        collator = make_collator(model, 0)
        assert collator.packing
        with packed_attention(model):
            packed = token_nll(model, collator(examples))
    return (packed - torch.cat(alone)).abs().max().item()


@pytest.mark.parametrize("family", sorted(LAYOUT_FAMILIES | POSITION_FAMILIES))
def test_packed_rows_equal_rows_alone(family):
    model = build(family)
    assert packing_unsupported_reason(model) == ""
    assert bool(layout_unsupported_reason(model)) == (family in POSITION_FAMILIES)
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
    assert words in packing_unsupported_reason(model)
    assert not make_collator(model, 0).packing


def test_code_of_others_is_not_packed():
    class Own(tf.LlamaForCausalLM):
        pass

    model = Own(build("llama").config)
    assert packing_unsupported_reason(model) == "the code of Own is not transformers' own"
    assert not make_collator(model, 0).packing
