"""A tiny model of any family of transformers, in float64."""

import inspect

import torch
import transformers as tf
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

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
EXAMPLES = [{"input_ids": row, "labels": row} for row in ROWS]


class Float64(TorchFunctionMode):
    """Compute in float64 where a model asks for float32: norms, routers, rotary angles."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


@torch.no_grad()
def nll_alone(model):
    """Return the loss of every token of `ROWS` after the first of its row, each row in a call of its own."""
    losses = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
    return torch.cat(losses)


def build(family, auto=None, **more):
    """Return a model of this `model_type` in float64, weights as large as trained ones; `more` is for its config."""
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
        own_name = getattr(cls, "attribute_map", {}).get(name, name)
        if isinstance(getattr(text, name, None), list) and not isinstance(getattr(cls, own_name, None), property):
            sizes[name] = (list(dict.fromkeys(getattr(text, name))) * 4)[: more.get("num_hidden_layers", 4)]
    return make(cls(**{**sizes, **more}), auto)


def make(config, auto=None):
    """Return a model of this config in float64 with weights as large as trained ones; `auto`: another Auto class."""
    torch.manual_seed(0)
    sees_images = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = auto or (tf.AutoModelForImageTextToText if sees_images else tf.AutoModelForCausalLM)
    model = auto.from_config(config, dtype=torch.float64).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            scale = 1 if "emb" in name or "wte" in name else 1.5 / p.shape[-1] ** 0.5
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    for part in (model, *model.modules()):
        if getattr(part, "config", None) is not None:
            part.config._experts_implementation = "eager"  # the grouped kernel has no float64
    return model


# --- families whose sizes depend on each other, and models that also see images ---------------------------------------

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
SPECIAL = {
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2}),
    "bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 64}),
    "granitemoehybrid": ("granitemoehybrid", {**_MAMBA, "layer_types": ["mamba", "attention"] * 2}),
    "recurrent_gemma": ("recurrent_gemma", {"block_types": ["recurrent", "attention"], "num_attention_heads": 4}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "num_experts": 4}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "llama (1 layer)": ("llama", {"num_hidden_layers": 1}),
    "qwen3 (2 layers)": ("qwen3", {"num_hidden_layers": 2}),
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
}
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_hidden_layers": 1, "num_heads": 2,
           "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 32, "embed_dim": 16,
           "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
VISION_FAMILIES = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3")


def build_family(name, vocab_size=VOCAB):
    """Return a tiny model of a family as its checkpoints are, in float64."""
    if name not in VISION_FAMILIES:
        family, more = SPECIAL.get(name, (name, {}))
        if name in ("gemma3n_text", "gemma4_text"):
            more = {"vocab_size_per_layer_input": vocab_size}
        return build(family, **{"vocab_size": vocab_size, **more})
    text = {**_TEXT, "vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name.startswith("qwen"):
        text["rope_parameters"] = {**_ROPE, "rope_theta": 10000.0}
    if name == "qwen3_5":
        text["layer_types"] = ["linear_attention", "full_attention"] * 2
    vision = {**_VISION, "hidden_size": 32 if name == "qwen2_vl" else 16}
    return make(tf.AutoConfig.for_model(name, text_config=text, vision_config=vision))
