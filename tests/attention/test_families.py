"""Every family that is packed: packed rows equal rows run alone in float64; and those that are not packed."""

import inspect

import pytest
import torch
import transformers as tf
from torch.overrides import TorchFunctionMode

from slimtune.attention.register import (
    LAYOUT_FAMILIES,
    POSITION_FAMILIES,
    layout_unsupported_reason,
    packed_attention,
    packing_unsupported_reason,
)
from slimtune.train_step.loss import make_collator, token_nll

VOCAB = 128
SIZES = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size", "n_embd", "word_embed_proj_dim", "conv_dim", "lru_width"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "dff", "n_inner", "block_ff_dim"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "sliding_window"], 4),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "rotary_dim"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "linear_num_value_heads"], 2),
    **dict.fromkeys(["head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"], 8),
    **dict.fromkeys(["v_head_dim", "hidden_size_per_layer_input", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head", "state_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "eos_token_id"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 64),
    "num_kv_shared_layers": 0, "laurel_rank": 4, "linear_num_key_heads": 2, "pad_token_id": 0, "bos_token_id": 2,
    "hidden_dropout": 0.0, "n_head_kv": 4,
}  # fmt: skip
PREFIX = [(5 * i * i + 1) % 125 + 3 for i in range(5)]
ROWS = [[*(PREFIX if r else []), *((7 * i * i + 3 + 11 * r) % 125 + 3 for i in range(6 + 2 * r))] for r in range(4)]


class Float64(TorchFunctionMode):
    """Compute in float64 where a model asks for float32: norms, routers, rotary angles."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


def build(family, **more):
    text = tf.AutoConfig.for_model(family).get_text_config()
    cls = type(text)
    annotated = {a for c in cls.__mro__ for a in vars(c).get("__annotations__", {})}
    names = set(inspect.signature(cls.__init__).parameters) | annotated
    sizes = {k: v for k, v in SIZES.items() if k in names | set(getattr(cls, "attribute_map", {}))}
    if "qk_rope_head_dim" in names:
        sizes = {k: v for k, v in sizes.items() if k != "head_dim"} | {"num_key_value_heads": 4}
    for name in ("sliding_window", "q_lora_rank"):
        if getattr(text, name, None) is None:
            sizes.pop(name, None)
    for name in ("layer_types", "layers_block_type"):
        if isinstance(getattr(text, name, None), list) and not isinstance(getattr(cls, name, None), property):
            sizes[name] = (list(dict.fromkeys(getattr(text, name))) * 4)[:4]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(cls(**{**sizes, **more}), dtype=torch.float64).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            scale = 1 if "emb" in name or "wte" in name else 1.5 / p.shape[-1] ** 0.5
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    for part in (model, *model.modules()):
        if getattr(part, "config", None) is not None:
            part.config._experts_implementation = "eager"  # the grouped kernel has no float64
    return model


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
