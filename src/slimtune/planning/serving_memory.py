"""Memory for serving the tuned model: weights as the engine holds them, the cache of keys and values, overhead.

A GGUF file is planned by bits per weight of its file type, within 3 % of real files. The cache holds
`2 · kv_heads · head_dim` numbers for each token and layer; a layer with a sliding window holds only the window.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..core.foundation.formatting import GIB, format_bytes
from ..core.models.base_config import get_max_positions
from ..errors import ModelError, UsageError, format_names, suggest
from .gpu_specs import GpuSpec
from .interval import Interval
from .meta_model import build_adapted_meta_model
from .plan_result import ServingEstimate
from .planner import find_largest_fitting, judge_memory_fit
from .serving_speed import estimate_decode_and_prefill_speed
from .weight_formats import ENGINES, GGUF_TYPES, VLLM_BITS, load_vllm_lora_rules

_VALUE_DOWN = re.compile(r"(v_proj|qkv_proj|c_attn|query_key_value|down_proj|fc2|mlp\.c_proj|dense_4h_to_h|w2)$")
"""Names in transformers of the matrices that llama.cpp calls `attn_v` and `ffn_down`; fused Q, K and V count as V."""
_UNQUANTIZED = re.compile(r"(^|\.)(wpe|gate|router)$")
"""Position embeddings and routers of experts, which GGUF files keep in float32."""
UBATCH = 512
"""Tokens that llama.cpp computes at once (`--ubatch-size`)."""
UTILIZATION = 0.92
"""Share of the GPU that vLLM takes (`--gpu-memory-utilization`)."""
METADATA = 32
"""Bytes of a GGUF file for each token of the vocabulary: 23 (SentencePiece) to 61 (byte-level, with its merges)."""


def estimate_serving_memory(
    config: PreTrainedConfig,
    *,
    engine: str = "ollama",
    precision: str | None = None,
    context: int = 4096,
    sequences: int = 1,
    cache: str | None = None,
    adapter_rank: int | None = None,
    gpu: GpuSpec | None = None,
) -> ServingEstimate:
    """Return what serving a tuned model takes, and whether a GPU has it.

    Args:
        config: the base's.
        engine: one of `ENGINES`.
        precision: one of the engine's; None: its default.
        context: tokens of one request, prompt and answer.
        sequences: requests of this length at once.
        cache: precision of keys and values, one of the engine's; None: 16 bits.
        adapter_rank: rank of an adapter on every linear layer that is loaded beside the model; None: it is merged.
        gpu: where it runs; None: no verdict.

    Raises:
        UsageError: an engine, precision or cache that does not exist; a number out of its range.
        ModelError: the model's cache is not keys and values of heads (linear attention, Mamba, latent attention).
    """
    engine = _find_name("engine", engine, ENGINES)
    is_vllm, facts = engine == "vllm", ENGINES[engine]
    precision = _find_name("precision", precision or facts.default_precision, facts.supported_precisions)
    cache = _find_name("cache", cache or next(iter(facts.bytes_by_cache_precision)), facts.bytes_by_cache_precision)
    for name, number in (("context", context), ("sequences", sequences), ("adapter_rank", adapter_rank)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}", "a whole number from 1")

    text = config.get_text_config()
    model = build_adapted_meta_model(config, None, torch.bfloat16)
    file_bytes, embedding_bytes = count_weight_and_embedding_bytes(model, precision)
    # llama.cpp reads embeddings from CPU memory; if they are tied to the head, the device has a second copy.
    separate_memory = gpu is None or (gpu.device == "cuda" and not gpu.unified)
    host_bytes = embedding_bytes if separate_memory and not is_vllm else 0
    weights = file_bytes - (0 if text.tie_word_embeddings else host_bytes)
    adapter = 0 if adapter_rank is None else _adapter_bytes(model, adapter_rank, is_vllm)
    # vLLM's --max-num-batched-tokens and --max-num-seqs depend on the GPU.
    batch_tokens, batch_requests = UBATCH, 1
    if is_vllm:
        batch_tokens, batch_requests = (8192, 1024) if gpu is not None and gpu.memory >= 70 * GIB else (2048, 256)
    runtime = facts.runtime_bytes if gpu is None or gpu.device == "cuda" else Interval(0, 0)

    def need_at(length: int) -> tuple[int, Interval, Interval]:
        """Return the bytes of cache, buffers and everything for requests of this length."""
        cached = sequences * count_request_kv_cache_bytes(config, length, engine, cache, batch_tokens)
        buffers = _vllm_buffers(text, batch_tokens, batch_requests) if is_vllm else _llama_buffers(text, length)
        return cached, buffers, Interval(*[weights + adapter + cached] * 2) + buffers + runtime

    cached, buffers, need = need_at(context)
    reason = f"it takes {format_bytes(need.low)} to {format_bytes(need.high)}"
    usable = verdict = max_context = None
    if gpu is not None:
        low, high = (int(n * UTILIZATION) if is_vllm else n for n in gpu.usable)
        usable = Interval(low, high)
        reason += f", and {gpu.name} gives it {format_bytes(low)} to {format_bytes(high)}"
        verdict = judge_memory_fit(need, usable)
        limit = get_max_positions(config) or context
        blocks = find_largest_fitting(lambda n: need_at(256 * n)[2].high <= low, max(limit // 256, 1))
        max_context = min(256 * blocks, limit)
    speed = None
    if gpu is not None and verdict != "does not fit":
        read_bytes, multiplied = count_weight_bytes_and_macs_per_token(model, precision)
        speed = estimate_decode_and_prefill_speed(
            gpu,
            engine,
            weight_bytes_per_token=read_bytes + adapter,
            kv_bytes_per_request=cached / sequences,
            matmul_weight_count=multiplied,
            layers=text.num_hidden_layers,
            vocab_size=text.vocab_size,
            concurrent_requests=sequences,
            precision=precision,
        )
    return ServingEstimate(
        engine=engine,
        precision=precision,
        context=context,
        sequences=sequences,
        cache=cache,
        merged=adapter_rank is None,
        file_bytes=file_bytes + (0 if is_vllm else METADATA * text.vocab_size),
        bits=8 * file_bytes / sum(p.numel() for p in model.parameters()),
        parts={"weights": weights, "adapter": adapter, "cache": cached},
        host_bytes=host_bytes,
        compute_bytes=buffers,
        runtime_bytes=runtime,
        usable_bytes=usable,
        max_context=max_context,
        decode_tokens_per_second=speed.decode if speed is not None else None,
        prefill_tokens_per_second=speed.prefill if speed is not None else None,
        verdict=verdict,
        reason=reason,
        evidence={
            **dict.fromkeys(("file_bytes", "bits", "weights", "adapter", "cache", "host_bytes"), "computed"),
            **dict.fromkeys(("compute_bytes", "runtime_bytes", "need_bytes", "max_context"), "guessed"),
            "usable_bytes": "published",
        }
        | (dict.fromkeys(("decode_tokens_per_second", "prefill_tokens_per_second"), speed.evidence) if speed else {}),
    )


def count_weight_and_embedding_bytes(model: Any, precision: str) -> tuple[int, int]:
    """Return the bytes of a model's weights, and of its token embeddings; `precision`: one of an engine's."""
    sizes = _weight_sizes(model, precision)
    embedding = model.get_input_embeddings().weight
    return int(sum(size for _, _, size in sizes)), int(sum(size for _, p, size in sizes if p is embedding))


def count_weight_bytes_and_macs_per_token(model: Any, precision: str) -> tuple[float, float]:
    """Return what one token takes: bytes of the weights that it reads, and numbers in matrices it is multiplied with.

    Of the token embeddings it reads a row, and of a mixture's experts those that its router picks.
    """
    text = model.config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    picked = (getattr(text, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    read_bytes = weights = 0.0
    for kind, parameter, size in _weight_sizes(model, precision):
        share = picked if parameter.dim() == 3 and parameter.shape[0] == experts else 1.0
        if kind != "embedding":
            read_bytes += share * size
        if kind in ("matrix", "value_down"):
            weights += share * parameter.numel()
    return read_bytes, weights


def _weight_sizes(model: Any, precision: str) -> list[tuple[str, nn.Parameter, float]]:
    """Return kind, weight and bytes of each weight; `precision`: one of an engine's."""
    if precision in VLLM_BITS:
        linear = VLLM_BITS[precision]
        by_kind = dict.fromkeys(("small", "embedding", "head"), max(linear, 16.0))
        by_kind |= dict.fromkeys(("matrix", "value_down"), linear)
        return [(kind, p, by_kind[kind] * p.numel() / 8) for kind, p, _ in _weights(model)]
    gguf_type = GGUF_TYPES[precision]

    def bits(kind: str, width: int) -> float:
        whole_blocks = width % 256 == 0
        if kind == "small":
            return 32.0
        if kind == "head" and gguf_type.bits < 16:  # it is in Q8_0 or Q6_K, also if it is tied to the embeddings
            return GGUF_TYPES["Q6_K" if precision != "Q8_0" and whole_blocks else "Q8_0"].bits
        return gguf_type.bits_of(value_down=kind == "value_down", whole_blocks=whole_blocks or kind == "head")

    return [(kind, p, bits(kind, width) * p.numel() / 8) for kind, p, width in _weights(model)]


def count_request_kv_cache_bytes(
    config: PreTrainedConfig, context: int, engine: str, cache_dtype: str = "f16", tokens_per_step: int = UBATCH
) -> int:
    """Return the bytes of keys and values of one request of `context` tokens.

    llama.cpp allocates 256 tokens at a time, vLLM 16. A sliding window also has room for the
    `tokens_per_step` tokens that are computed at once.

    Raises:
        ModelError: the model's cache is not keys and values of heads.
    """
    text = config.get_text_config()
    window, layers = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if layers is None:
        # One window for every layer (Mistral v0.1, Phi-3) is known to vLLM; llama.cpp caches the whole context.
        layers = ["sliding_attention" if window and engine == "vllm" else "full_attention"] * text.num_hidden_layers
    others = sorted(set(layers) - {"full_attention", "sliding_attention"})
    if getattr(text, "kv_lora_rank", None):
        others = ["latent attention"]
    if others:
        raise ModelError(f"the model has layers that cache no keys and values of heads: {format_names(others)}",
                         "full or sliding attention in every layer")  # fmt: skip
    if engine == "vllm":
        full = _round_up(context, 16)
        sliding = min(full, _round_up(min(context, (window or context) - 1 + tokens_per_step), 16) + 16)
    else:
        full = _round_up(context, 256)
        sliding = min(full, _round_up((window or context) + tokens_per_step, 256))
    # The last layers of Gemma 3n and 4 read the cache of earlier ones; Gemma 4's heads differ from layer to layer.
    own = len(layers) - (getattr(text, "num_kv_shared_layers", None) or 0)
    values = 0
    for kind, layer in zip(layers[:own], getattr(text, "per_layer_config", None) or [text] * own, strict=False):
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        values += 2 * heads * head_dim * (sliding if kind == "sliding_attention" else full)
    return int(values * ENGINES[engine].bytes_by_cache_precision[cache_dtype])


def _weights(model: Any) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield kind, weight and row length of each weight; tied ones once."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        is_conv1d = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        kind = "value_down" if _VALUE_DOWN.search(path) else "matrix"
        if parameter.dim() < 2 or _UNQUANTIZED.search(path):
            kind = "small"
        elif parameter is head or parameter is embedding:
            kind = "head" if parameter is head else "embedding"
        yield kind, parameter, parameter.shape[0 if is_conv1d else -1]


def _adapter_bytes(model: Any, rank: int, is_vllm: bool) -> int:
    """Return the bytes of A and B on every linear layer, in 16 bits; vLLM reserves them for the next larger rank."""
    if is_vllm:
        ranks = load_vllm_lora_rules().ranks
        if rank > ranks[-1]:
            raise UsageError(f"the adapter's rank is {rank}", f"at most {ranks[-1]}, vLLM's limit", "merge the adapter")
        rank = next(r for r in ranks if r >= rank)
    linear = (p for kind, p, _ in _weights(model) if kind in ("matrix", "value_down"))
    return rank * 2 * sum(sum(p.shape[-2:]) * p.numel() // p.shape[-2:].numel() for p in linear)


def _llama_buffers(text: Any, context: int) -> Interval:
    """Return llama.cpp's buffers with flash attention, its default: logits of a batch, and the mask.

    258.5 MiB for Llama 3.1 8B and 304 MiB for Qwen 2.5 7B are what it reports; since 2026 it reserves logits for the
    last token alone if it can, which is the low end.
    """
    mask = UBATCH * _round_up(context, 256) * 2
    return Interval(4 * UBATCH * text.hidden_size, 4 * UBATCH * (text.vocab_size + text.hidden_size) + mask)


def _vllm_buffers(text: Any, batch_tokens: int, requests: int) -> Interval:
    """Return the peak of vLLM's trial pass: an MLP on a full batch, and logits for the sampler."""
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    states = 2 * batch_tokens * (2 * inner + 4 * text.hidden_size)
    return Interval(states // 2, states + 3 * 4 * requests * text.vocab_size)


def _find_name(what: str, name: str, known: Mapping[str, Any]) -> str:
    match = next((k for k in known if k.lower() == name.lower()), None)
    if match is None:
        close = suggest(name.lower(), [k.lower() for k in known])
        raise UsageError(f"there is no {what} {name!r}{close}", format_names(known, most=len(known)))
    return match


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
