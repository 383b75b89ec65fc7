"""Tiny random models of the architectures adapters can be written for, as Hugging Face has them and as llama.cpp does.

Only the numbers a GGUF's header holds are written here; names, order and shifts of tensors are the product's own, so
that what llama.cpp computes from them proves them.
"""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tiny_gguf import add_vocabulary, finish_gguf

from slimtune.export.gguf import (
    convert_to_llama_cpp_tensors,
    make_gguf_module_name_mapper,
    require_gguf_architecture_spec,
)

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# llama.cpp's Gemma scales by the head's width, whatever the config asks for.
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
MOE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
# As many keys as queries; llama.cpp takes an MLP of four times the width for Phi-2.
PHI = {"num_key_value_heads": 4, "intermediate_size": 256}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
GPT_OSS |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
VISION = {**dict.fromkeys(["hidden_size", "intermediate_size"], 16), "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
MAKERS = {
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, vocab_size=v)),
    "mistral": lambda v: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, vocab_size=v, sliding_window=None)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, vocab_size=v)),
    "qwen3": lambda v: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, vocab_size=v, head_dim=16)),
    "gemma": lambda v: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, vocab_size=v, head_dim=16)),
    "gemma2": lambda v: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA, vocab_size=v)),
    "gemma3_text": lambda v: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA, vocab_size=v)),
    "phi3": lambda v: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, vocab_size=v, original_max_position_embeddings=256)),
    "qwen3_moe": lambda v: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, **MOE, vocab_size=v, head_dim=16, num_experts=4, norm_topk_prob=True)
    ),
    "mixtral": lambda v: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, vocab_size=v, num_local_experts=4)),
    "olmoe": lambda v: tf.OlmoeForCausalLM(  # llama.cpp takes as many keys as queries
        tf.OlmoeConfig(**SIZES | {"num_key_value_heads": 4}, vocab_size=v, num_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda v: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, **GPT_OSS, vocab_size=v)),
    "smollm3": lambda v: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**SIZES, vocab_size=v)),
    "granite": lambda v: tf.GraniteForCausalLM(
        tf.GraniteConfig(**SIZES, vocab_size=v, logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5)
    ),
    "olmo": lambda v: tf.OlmoForCausalLM(tf.OlmoConfig(**SIZES, vocab_size=v)),
    "olmo2": lambda v: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES, vocab_size=v)),
    "phi": lambda v: tf.PhiForCausalLM(tf.PhiConfig(**SIZES | PHI, vocab_size=v)),
    "cohere2": lambda v: tf.Cohere2ForCausalLM(
        tf.Cohere2Config(**{**SIZES, "num_hidden_layers": 4, "vocab_size": v, "sliding_window": 8, "logit_scale": 2.0})
    ),
    "lfm2": lambda v: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**SIZES, vocab_size=v, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])
    ),
    "gpt_neox": lambda v: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES | PHI, vocab_size=v)),
    "gemma3": lambda v: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config={**GEMMA, "vocab_size": v}, vision_config=VISION)
    ),
    "gpt2": lambda v: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=v, bos_token_id=1, eos_token_id=2)
    ),
}


def model_of(kind: str, vocabulary: int) -> Any:
    """Return a random model in fp32 whose norms and biases are not what they start at."""
    torch.manual_seed(0)
    model = MAKERS[kind](vocabulary).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(4)  # far from uniform attention
    return model


def write(file: Path, model: Any, tokenizer: Any) -> Path:
    """Write a model and a byte-level tokenizer as an f32 GGUF."""
    import gguf

    whole, config = model.config, model.config.get_text_config()
    w = gguf.GGUFWriter(str(file), require_gguf_architecture_spec(whole).name)
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_head_count(config.num_attention_heads)
    w.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        w.add_feed_forward_length(4 * config.hidden_size)
        w.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        _rotary(w, config)
    add_vocabulary(w, tokenizer, "gpt-2", config.vocab_size)
    names = make_gguf_module_name_mapper(whole)
    for name, parameter in model.named_parameters():
        for gguf_name, tensor in convert_to_llama_cpp_tensors(name, parameter.detach(), whole, names).items():
            w.add_tensor(gguf_name, tensor.float().contiguous().numpy())
    finish_gguf(w)
    return file


def _rotary(w: Any, config: Any) -> None:
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    w.add_feed_forward_length(config.intermediate_size)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if config.model_type == "lfm2":
        heads = [0 if kind == "conv" else heads for kind in config.layer_types]
        w.add_shortconv_l_cache(config.conv_L_cache)
    w.add_head_count_kv(heads)
    if eps := getattr(config, "rms_norm_eps", getattr(config, "norm_eps", None)):
        w.add_layer_norm_rms_eps(eps)
    else:
        w.add_layer_norm_eps(getattr(config, "layer_norm_eps", 1e-5))
    if config.model_type != "lfm2":
        w.add_key_length(head)
        w.add_value_length(head)
    rope = config.rope_parameters
    w.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    w.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if config.model_type == "phi3":
        w.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        w.add_expert_count(experts)
        w.add_expert_used_count(config.num_experts_per_tok)
        w.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    if config.model_type == "gpt_neox":
        w.add_parallel_residual(config.use_parallel_residual)
    if config.model_type == "cohere2":
        w.add_logit_scale(config.logit_scale)
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if config.model_type in ("gemma2", "gemma3_text", "gpt_oss", "cohere2"):
        w.add_sliding_window(config.sliding_window)
    if config.model_type == "granite":
        w.add_logit_scale(config.logits_scaling)
        w.add_embedding_scale(config.embedding_multiplier)
        w.add_residual_scale(config.residual_multiplier)
        w.add_attention_scale(config.attention_multiplier)
    if config.model_type == "gemma2":
        w.add_attn_logit_softcapping(config.attn_logit_softcapping)
        w.add_final_logit_softcapping(config.final_logit_softcapping)
