"""What one request keeps on the device: keys and values of its tokens, and the constant state of recurrent layers.

An attention layer caches `2 · kv_heads · head_dim` numbers for each token; one with a sliding window or with chunks
those of the window or the chunk alone. Latent attention (DeepSeek, GLM-4.7-Flash, Kimi) caches one compressed vector
and one rotated key for all heads. An index that picks the tokens to attend to has a key of its own. DeepSeek V4 caches
one vector, key and value in one, for each token of a window, one for each 4 or 128 tokens of the whole row, and an
index of those for 4. A recurrent layer (Mamba, gated delta net, short convolution) caches the same for any number of
tokens. `layer_types` of transformers says which layer is which.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import ModelError, format_names
from .weight_formats import ENGINES

UBATCH = 512
"""Tokens that llama.cpp computes at once (`--ubatch-size`)."""
_INDEXED = {"indexed_attention", "minimax_m3_sparse"}
"""Kinds of layers that also cache a key of the index that picks the tokens to attend to."""
_INDEX_FIELDS = ("index_head_dim", "indexer_head_dim")
"""Fields of the numbers of that key."""
_WHOLE_ROW = {"full_attention", "hybrid", *_INDEXED}
"""Kinds of layers that cache every token; "hybrid" has attention and a recurrent part."""
_WINDOW_FIELDS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "compressed_sparse_attention": "sliding_window",
    "heavily_compressed_attention": "sliding_window",
}
"""The field of the number of tokens that a kind of layer caches at most."""
_NO_KEYS = {"linear_attention", "conv", "mlp", "moe"}
_STATE_BYTES = 4
"""llama.cpp holds states in float32, and so does vLLM where a base asks for it, which recent ones do."""


def count_request_kv_cache_bytes(
    config: PreTrainedConfig, context: int, engine: str, cache_dtype: str = "f16", tokens_per_step: int = UBATCH
) -> int:
    """Return the bytes of keys and values of one request of `context` tokens.

    llama.cpp allocates 256 tokens at a time, vLLM 16. A sliding window also has room for the
    `tokens_per_step` tokens that are computed at once.

    Raises:
        ModelError: what a layer caches is not known.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    per_layer = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    if kinds is None:
        # One window for every layer (Mistral v0.1, Phi-3) is known to vLLM; llama.cpp caches the whole context.
        window = engine == "vllm" and getattr(text, "sliding_window", None)
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    if others := sorted(set(kinds) - _WHOLE_ROW - set(_WINDOW_FIELDS) - _NO_KEYS):
        raise ModelError(
            f"what layers of the kind {format_names(others)} cache is not known",
            "attention, latent attention, Mamba, linear attention or short convolutions in every layer",
        )
    # The last layers of Gemma 3n and 4 read the cache of earlier ones; Gemma 4's heads differ from layer to layer.
    own = len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)
    numbers = 0
    for kind, layer in zip(kinds[:own], per_layer, strict=False):
        if kind not in _NO_KEYS:
            window = getattr(layer, _WINDOW_FIELDS[kind], None) if kind in _WINDOW_FIELDS else None
            cached_tokens = _count_cached_tokens(context, window, engine, tokens_per_step)
            numbers += cached_tokens * _count_cached_numbers_per_token(layer, kind)
            if kind in (rates := getattr(layer, "compress_rates", None) or {}):
                index = layer.index_head_dim if kind == "compressed_sparse_attention" else 0
                numbers += -(-context // rates[kind]) * (layer.head_dim + index)
    return int(numbers * ENGINES[engine].bytes_by_cache_precision[cache_dtype])


def _count_cached_tokens(context: int, window: int | None, engine: str, tokens_per_step: int) -> int:
    block = 16 if engine == "vllm" else 256
    whole = round_up(context, block)
    if window is None:
        return whole
    if engine == "vllm":
        return min(whole, round_up(min(context, window - 1 + tokens_per_step), block) + block)
    return min(whole, round_up(window + tokens_per_step, block))


def _count_cached_numbers_per_token(layer: Any, kind: str) -> int:
    """Return the numbers that a layer of this config caches for a token."""
    if getattr(layer, "compress_rates", None):
        return int(layer.head_dim)
    index = next((n for field in _INDEX_FIELDS if (n := getattr(layer, field, None))), 0) if kind in _INDEXED else 0
    if rank := getattr(layer, "kv_lora_rank", None):
        return int(rank + layer.qk_rope_head_dim + index)
    attention_heads = getattr(layer, "num_attention_heads", None)
    if not attention_heads:
        raise ModelError("what its layers cache is not known: they have no attention heads", "a base of attention")
    heads = getattr(layer, "num_key_value_heads", None) or attention_heads
    key = getattr(layer, "head_dim", None) or layer.hidden_size // attention_heads
    return int(heads * (key + (getattr(layer, "v_head_dim", None) or key)) + index)


def count_recurrent_state_bytes(model: Any) -> int:
    """Return the bytes of the states of one request in recurrent layers and convolutions; 0 if the base has none.

    A convolution keeps its last inputs. A Mamba layer keeps `inner size · state size` numbers, a layer of the
    delta rule `heads · key size · value size`.

    Raises:
        ModelError: the state of its linear layers is not known.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if not any(kind in ("linear_attention", "conv") or kind.startswith("hybrid") for kind in kinds):
        return 0
    convolutions = states = 0
    for module in model.get_decoder().modules():
        if isinstance(module, nn.Conv1d):
            convolutions += module.out_channels * (module.kernel_size[0] - 1)
        states += _count_state_numbers(module)
    if "linear_attention" in kinds and not states:
        raise ModelError(
            f"the state that its linear layers keep is not known ({model.config.model_type})",
            "Mamba, or a gated delta net",
        )
    return _STATE_BYTES * (convolutions + states)


def _count_state_numbers(module: nn.Module) -> int:
    """Return the numbers that a module's recurrence keeps; 0: it has none."""
    fields = vars(module)
    if "ssm_state_size" in fields:  # Mamba 1 and 2
        return int(fields["intermediate_size"] * fields["ssm_state_size"])
    if "head_k_dim" in fields:  # gated delta net (Qwen3-Next, Qwen3.5)
        return int(fields["num_v_heads"] * fields["head_k_dim"] * fields["head_v_dim"])
    if {"qkv_dim", "conv_dim"} <= fields.keys():  # Kimi delta attention; its forget gate has no convolution
        return int(fields["num_heads"] * fields["head_dim"] ** 2)
    return 0


def round_up(n: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `n`."""
    return -(-n // step) * step
