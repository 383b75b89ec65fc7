"""Memory for serving the tuned model: weights as the engine holds them, the cache of keys and values, overhead.

A GGUF file is planned by bits per weight of its file type, within 3 % of real files. The cache holds
`2 · kv_heads · head_dim` numbers for each token and layer; a layer with a sliding window holds only the window.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, UsageError, format_names, nearest
from ..setup import build_meta_model
from ..utils.formatting import format_bytes
from .gpus import GIB, Gpu
from .planner import judge_memory
from .result import Range, Verdict

ENGINES: dict[str, str] = {"ollama": "Q4_K_M", "llama.cpp": "Q4_K_M", "vllm": "bf16"}
"""Engines, each with the precision it serves by default."""


class GgufBits(NamedTuple):
    """Bits per weight of a GGUF file type.

    llama.cpp gives `attn_v` and `ffn_down` more bits than the other matrices, in some of the layers. It falls back to
    older types for matrices whose rows are no multiple of 256.

    Args:
        most: of most matrices.
        value_down: of `attn_v` and `ffn_down`, on average over the layers.
        most_fallback: of most matrices whose rows are no multiple of 256.
        value_down_fallback: of `attn_v` and `ffn_down` whose rows are no multiple of 256.
    """

    most: float
    value_down: float
    most_fallback: float
    value_down_fallback: float


GGUF_BITS: dict[str, GgufBits] = {
    **{name: GgufBits(bits, bits, bits, bits) for name, bits in {
        "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5,
    }.items()},
    "Q6_K": GgufBits(6.5625, 6.5625, 8.5, 8.5),
    "Q5_K_M": GgufBits(5.5, 6.01, 6.0, 7.25),
    "Q5_K_S": GgufBits(5.5, 5.5, 6.0, 6.0),
    "Q4_K_M": GgufBits(4.5, 5.50, 5.5, 7.01),
    "Q4_K_S": GgufBits(4.5, 4.65, 5.5, 5.59),
    "IQ4_NL": GgufBits(4.5, 4.70, 4.5, 4.71),
    "IQ4_XS": GgufBits(4.25, 4.50, 4.5, 4.72),
    "Q3_K_L": GgufBits(3.4375, 6.01, 4.5, 6.55),
    "Q3_K_M": GgufBits(3.4375, 4.81, 4.5, 5.86),
    "Q3_K_S": GgufBits(3.4375, 3.47, 4.5, 4.57),
    "IQ3_M": GgufBits(3.4375, 4.03, 4.5, 4.97),
    "IQ3_S": GgufBits(3.4375, 3.58, 4.5, 4.57),
    "Q2_K": GgufBits(2.625, 3.73, 4.5, 4.77),
}  # fmt: skip
"""By file type, without an importance matrix; the averages are fitted to the 49 bases of `models/known.json`."""
_VALUE_DOWN = re.compile(r"(v_proj|qkv_proj|c_attn|query_key_value|down_proj|fc2|mlp\.c_proj|dense_4h_to_h|w2)$")
"""Names in transformers of the matrices that llama.cpp calls `attn_v` and `ffn_down`; fused Q, K and V count as V."""
_UNQUANTIZED = re.compile(r"(^|\.)(wpe|gate|router)$")
"""Position embeddings and routers of experts, which GGUF files keep in float32."""

VLLM_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4 + 20 / 128, "nf4": 4.5}
"""Bits per weight of vLLM's linear layers; embedding and head stay at 16. int4 is AWQ or GPTQ in groups of 128 (scale
and zero point), nf4 bitsandbytes without its second quantization (a 32-bit scale for 64 weights)."""
LLAMA_CACHES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
VLLM_CACHES = {"bf16": 2.0, "f16": 2.0, "fp8": 1.0}
"""Bytes of a number in the cache; the first is the engine's default."""

UBATCH = 512
"""Tokens that llama.cpp computes at once (`--ubatch-size`)."""
UTILIZATION = 0.92
"""Share of the GPU that vLLM takes (`--gpu-memory-utilization`)."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves memory for (`--max-lora-rank`)."""
METADATA = 32
"""Bytes of a GGUF file for each token of the vocabulary: 23 (SentencePiece) to 61 (byte-level, with its merges)."""
RUNTIME = {"llama.cpp": Range(GIB // 5, 7 * GIB // 10), "vllm": Range(GIB // 2, 2 * GIB)}
"""What a CUDA context and libraries take; with vLLM's CUDA graphs, of which logs report 0.3 to 1 GiB."""


@dataclass(frozen=True)
class ServingPlan:
    """What serving a model takes.

    Args:
        engine: one of `ENGINES`.
        precision: of the weights; a GGUF file type for Ollama and llama.cpp.
        context: tokens of one request, prompt and answer.
        sequences: requests of this length at once.
        cache: precision of keys and values.
        merged: the adapter is part of the weights; else it is loaded beside them.
        file_bytes: size of the GGUF file; for vLLM, of the weights.
        bits: per weight, on average over the file.
        parts: bytes on the device: weights, adapter, cache.
        host_bytes: weights that llama.cpp keeps in CPU memory (the token embeddings).
        compute_bytes: buffers of a forward pass.
        runtime_bytes: the device's runtime, libraries and graphs.
        usable_bytes: what the GPU gives the engine, (surely, at most); None without a GPU.
        max_context: longest request of so many that surely fits; None without a GPU, 0: none.
        verdict: whether it fits; None without a GPU.
        reason: why, in one sentence.
        evidence: the kind of evidence by field, see `result.EVIDENCE`.
    """

    engine: str
    precision: str
    context: int
    sequences: int
    cache: str
    merged: bool
    file_bytes: int
    bits: float
    parts: dict[str, int]
    host_bytes: int
    compute_bytes: Range
    runtime_bytes: Range
    usable_bytes: Range | None
    max_context: int | None
    verdict: Verdict | None
    reason: str
    evidence: dict[str, str] = field(default_factory=dict)

    @property
    def need(self) -> Range:
        """Bytes that the device needs."""
        overhead = zip(self.compute_bytes, self.runtime_bytes, strict=True)
        return Range(*(sum(self.parts.values()) + c + r for c, r in overhead))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; ranges as `{"low", "high"}`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"need_bytes": self.need}
        return {k: v._asdict() if isinstance(v, Range) else v for k, v in values.items()}


def plan_serving(
    config: PreTrainedConfig,
    *,
    engine: str = "ollama",
    precision: str | None = None,
    context: int = 4096,
    sequences: int = 1,
    cache: str | None = None,
    adapter_bytes: int | None = None,
    rank: int = 16,
    utilization: float = UTILIZATION,
    gpu: Gpu | None = None,
) -> ServingPlan:
    """Return what serving a tuned model takes, and whether a GPU has it.

    Args:
        config: the base's.
        engine: one of `ENGINES`.
        precision: a file type of `GGUF_BITS` for Ollama and llama.cpp, one of `VLLM_BITS` for vLLM; None: the engine's
            default.
        context: tokens of one request, prompt and answer.
        sequences: requests of this length at once.
        cache: precision of keys and values, one of `LLAMA_CACHES` or `VLLM_CACHES`; None: 16 bits.
        adapter_bytes: size of an adapter that is loaded beside the model; None: it is merged.
        rank: of that adapter; vLLM reserves memory for this rank on every linear layer.
        utilization: share of the GPU that vLLM takes, above 0, at most 1.
        gpu: where it runs; None: no verdict.

    Raises:
        UsageError: an engine, precision or cache that does not exist; a number out of its range.
        ModelError: the model's cache is not keys and values of heads (linear attention, Mamba, latent attention).
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}", format_names(ENGINES))
    for name, number in (("context", context), ("sequences", sequences), ("rank", rank)):
        if number < 1:
            raise UsageError(f"{name} is {number}", "a whole number from 1")
    if not 0 < utilization <= 1:
        raise UsageError(f"utilization is {utilization}", "a number above 0, at most 1")
    if adapter_bytes is not None and adapter_bytes < 0:
        raise UsageError(f"adapter_bytes is {adapter_bytes}", "a number of bytes, or None for a merged adapter")
    is_vllm = engine == "vllm"
    precision = _find_name("precision", precision or ENGINES[engine], VLLM_BITS if is_vllm else GGUF_BITS)
    caches = VLLM_CACHES if is_vllm else LLAMA_CACHES
    cache = _find_name("cache", cache or next(iter(caches)), caches)

    text = config.get_text_config()
    model = build_meta_model(config, None, torch.bfloat16)
    file_bytes, embedding_bytes = vllm_bytes(model, precision) if is_vllm else gguf_bytes(model, precision)
    # llama.cpp reads embeddings from CPU memory; if they are tied to the head, the device has a second copy.
    separate_memory = gpu is None or (gpu.device == "cuda" and not gpu.unified)
    host_bytes = embedding_bytes if separate_memory and not is_vllm else 0
    weights = file_bytes - (0 if text.tie_word_embeddings else host_bytes)
    adapter = 0
    if adapter_bytes is not None:
        adapter = _vllm_adapter_bytes(model, rank) if is_vllm else adapter_bytes
    # vLLM's --max-num-batched-tokens and --max-num-seqs depend on the GPU.
    batch_tokens, batch_requests = UBATCH, 1
    if is_vllm:
        batch_tokens, batch_requests = (8192, 1024) if gpu is not None and gpu.memory >= 70 * GIB else (2048, 256)
    runtime = RUNTIME["vllm" if is_vllm else "llama.cpp"] if gpu is None or gpu.device == "cuda" else Range(0, 0)

    def need_at(length: int) -> tuple[int, Range, Range]:
        """Return the bytes of cache, buffers and everything for requests of this length."""
        cached = sequences * cache_bytes(config, length, engine, cache, batch_tokens)
        buffers = _vllm_buffers(text, batch_tokens, batch_requests) if is_vllm else _llama_buffers(text, length)
        total = (weights + adapter + cached + b + r for b, r in zip(buffers, runtime, strict=True))
        return cached, buffers, Range(*total)

    cached, buffers, need = need_at(context)
    needs = f"it takes {format_bytes(need.low)} to {format_bytes(need.high)}"
    usable = verdict = max_context = None
    if gpu is not None:
        share = utilization if is_vllm else 1.0
        usable = Range(*(int(n * share) for n in gpu.usable))
        needs += f", and {gpu.name} gives it {format_bytes(usable.low)} to {format_bytes(usable.high)}"
        verdict = judge_memory(need, Range(0, 0), usable)
        low = usable.low
        max_context = _longest_context(lambda n: need_at(n)[2].high <= low, text.max_position_embeddings)
    return ServingPlan(
        engine=engine,
        precision=precision,
        context=context,
        sequences=sequences,
        cache=cache,
        merged=adapter_bytes is None,
        file_bytes=file_bytes + (0 if is_vllm else METADATA * text.vocab_size),
        bits=8 * file_bytes / sum(p.numel() for p in model.parameters()),
        parts={"weights": weights, "adapter": adapter, "cache": cached},
        host_bytes=host_bytes,
        compute_bytes=buffers,
        runtime_bytes=runtime,
        usable_bytes=usable,
        max_context=max_context,
        verdict=verdict,
        reason=needs,
        evidence={
            **dict.fromkeys(("file_bytes", "bits", "weights", "adapter", "cache", "host_bytes"), "computed"),
            **dict.fromkeys(("compute_bytes", "runtime_bytes", "need_bytes", "max_context"), "guessed"),
            "usable_bytes": "published",
        },
    )


def gguf_bytes(model: Any, precision: str) -> tuple[int, int]:
    """Return the bytes of all tensors in a model's GGUF file, and of its token embeddings.

    Args:
        model: a transformers model, on any device; only names and shapes are read.
        precision: a file type of `GGUF_BITS`.

    Raises:
        UsageError: there is no such file type.
    """
    precision = _find_name("precision", precision, GGUF_BITS)
    bits = GGUF_BITS[precision]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = embedding_bits = 0.0
    for name, parameter, width in _unique_parameters(model):
        narrow = width % 256 != 0
        if not width or _UNQUANTIZED.search(name):
            each = 32.0
        elif parameter is head and bits.most < 16:  # Q8_0 or Q6_K, also if it is tied to the embeddings
            each = 8.5 if narrow or precision == "Q8_0" else 6.5625
        elif _VALUE_DOWN.search(name):
            each = bits.value_down_fallback if narrow else bits.value_down
        else:
            each = bits.most_fallback if narrow else bits.most
        total += each * parameter.numel()
        if parameter is embedding:
            embedding_bits = each * parameter.numel()
    return int(total / 8), int(embedding_bits / 8)


def vllm_bytes(model: Any, precision: str) -> tuple[int, int]:
    """Return the bytes of a model's weights in vLLM, and 0: its embeddings stay on the device."""
    bits = VLLM_BITS[precision]
    total = sum(
        p.numel() * (bits if _is_linear(model, name, p, width) else max(bits, 16.0)) / 8
        for name, p, width in _unique_parameters(model)
    )
    return int(total), 0


def cache_bytes(config: PreTrainedConfig, context: int, engine: str, cache: str = "f16", batch: int = UBATCH) -> int:
    """Return the bytes of keys and values of one request.

    Args:
        config: the model's.
        context: tokens of the request.
        engine: one of `ENGINES`; llama.cpp allocates 256 tokens at a time, vLLM 16.
        cache: precision, one of the engine's.
        batch: tokens computed at once, for which a sliding window has room too.

    Raises:
        ModelError: the model's cache is not keys and values of heads.
    """
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise ModelError("the model caches latent attention, not keys and values of heads", "attention with heads")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)
    if layers is None:
        # One window for every layer (Mistral v0.1, Phi-3) is known to vLLM; llama.cpp caches the whole context.
        layers = ["sliding_attention" if window and engine == "vllm" else "full_attention"] * text.num_hidden_layers
    if others := set(layers) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"the model has layers that cache no keys and values of heads: {format_names(sorted(others))}",
                         "full or sliding attention in every layer")  # fmt: skip
    if engine == "vllm":
        full = _round_up(context, 16)
        sliding = min(full, _round_up(min(context, (window or context) - 1 + batch), 16) + 16)
    else:
        full = _round_up(context, 256)
        sliding = min(full, _round_up((window or context) + batch, 256))
    tokens = sum(sliding if kind == "sliding_attention" else full for kind in layers)
    return int(tokens * 2 * heads * head_dim * (LLAMA_CACHES | VLLM_CACHES)[cache])


def _unique_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield name, parameter and row length (0 for a vector) of each parameter; tied ones once."""
    seen = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                width = 0 if parameter.dim() < 2 else parameter.shape[0 if isinstance(module, Conv1D) else -1]
                yield f"{path}.{own}".removesuffix(".weight"), parameter, width


def _is_linear(model: Any, name: str, parameter: nn.Parameter, width: int) -> bool:
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return bool(width) and not name.endswith("wpe") and all(parameter is not end for end in ends)


def _vllm_adapter_bytes(model: Any, rank: int) -> int:
    """Return what vLLM reserves for one adapter: A and B of the next larger rank on every linear layer, in 16 bits."""
    slot = next((r for r in RANKS if r >= rank), None)
    if slot is None:
        raise UsageError(f"rank is {rank}", f"at most {RANKS[-1]}, vLLM's limit", "merge the adapter")
    sides = sum(
        sum(p.shape[-2:]) * p.numel() // p.shape[-2:].numel()
        for name, p, width in _unique_parameters(model)
        if _is_linear(model, name, p, width) and not _UNQUANTIZED.search(name)
    )
    return slot * sides * 2


def _llama_buffers(text: Any, context: int) -> Range:
    """Return llama.cpp's buffers with flash attention, its default: logits of a batch, and the mask.

    258.5 MiB for Llama 3.1 8B and 304 MiB for Qwen 2.5 7B are what it reports; since 2026 it reserves logits for the
    last token alone if it can, which is the low end.
    """
    mask = UBATCH * _round_up(context, 256) * 2
    logits = 4 * UBATCH * (text.vocab_size + text.hidden_size)
    return Range(4 * UBATCH * text.hidden_size, logits + mask)


def _vllm_buffers(text: Any, batch_tokens: int, requests: int) -> Range:
    """Return the peak of vLLM's trial pass: an MLP on a full batch, and logits for the sampler."""
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    states = 2 * batch_tokens * (2 * inner + 4 * text.hidden_size)
    return Range(states // 2, states + 3 * 4 * requests * text.vocab_size)


def _longest_context(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest length up to `limit` that fits, in steps of 256; 0: none."""
    low, high = 0, max(limit // 256, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle - 1)
    return min(256 * low, limit)


def _find_name(what: str, name: str, known: Mapping[str, Any]) -> str:
    match = next((k for k in known if k.lower() == name.lower()), None)
    if match is None:
        close = nearest(name.lower(), [k.lower() for k in known])
        raise UsageError(f"there is no {what} {name!r}{close}", format_names(known, most=len(known)))
    return match


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
