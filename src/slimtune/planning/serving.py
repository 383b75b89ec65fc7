"""Will the tuned model run where it is going: weights as the engine holds them, the cache of keys and values, overhead.

Weights of a GGUF file follow llama.cpp's own choice for each matrix (`llama_tensor_get_type` in its llama-quant.cpp):
Q4_K_M, say, keeps half of `attn_v` and `ffn_down` in Q6_K and the output matrix as well, so that Llama 3.1 8B has 4.89
bits a weight. A cache holds, for a token in a layer, `2 · kv_heads · head_dim` numbers; a layer with a sliding window
holds the window alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, UsageError, format_names, nearest
from ..setup import build_meta_model
from ..utils.formatting import format_bytes
from .gpus import GIB, Gpu
from .result import Range, Verdict

ENGINES: dict[str, str] = {"ollama": "Q4_K_M", "llama.cpp": "Q4_K_M", "vllm": "bf16"}
"""Engines, each with the precision it serves if none is named."""

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "IQ4_NL": (32, 18),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ3_S": (256, 110), "IQ4_XS": (256, 136),
}  # fmt: skip
"""Numbers in a block of ggml's types, and its bytes (ggml-common.h)."""
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}  # fmt: skip
"""What a matrix takes whose rows are no multiple of its type's block."""

Rule = tuple[str, str]
MIXES: dict[str, tuple[str, dict[str, list[Rule]]]] = {
    **{name: (name, {}) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    "Q6_K": ("Q6_K", {}),
    "Q5_K_M": ("Q5_K", {"attn_v": [("more", "Q6_K")], "ffn_down": [("more", "Q6_K")]}),
    "Q5_K_S": ("Q5_K", {}),
    "Q4_K_M": ("Q4_K", {"attn_v": [("more", "Q6_K")], "ffn_down": [("more", "Q6_K")]}),
    "Q4_K_S": ("Q4_K", {"attn_v": [("four", "Q5_K")], "ffn_down": [("eighth", "Q5_K")]}),
    "IQ4_NL": ("IQ4_NL", {"attn_v": [("shared", "Q5_K")], "ffn_down": [("eighth", "Q5_K")]}),
    "IQ4_XS": ("IQ4_XS", {"attn_v": [("shared", "Q5_K")], "ffn_down": [("eighth", "Q5_K")]}),
    "Q3_K_L": ("Q3_K", {"attn_v": [("all", "Q5_K")], "ffn_down": [("all", "Q5_K")], "attn_output": [("all", "Q5_K")]}),
    "Q3_K_M": ("Q3_K", {"attn_v": [("two", "Q5_K"), ("all", "Q4_K")],
                        "ffn_down": [("sixteenth", "Q5_K"), ("all", "Q4_K")], "attn_output": [("all", "Q4_K")]}),
    "Q3_K_S": ("Q3_K", {}),
    "IQ3_M": ("IQ3_S", {"attn_v": [("all", "Q4_K")], "ffn_down": [("eighth", "Q4_K")],
                        "attn_output": [("all", "Q4_K")]}),
    "IQ3_S": ("IQ3_S", {"attn_v": [("shared", "Q4_K")]}),
    "Q2_K": ("Q2_K", {"attn_v": [("shared", "Q4_K"), ("all", "Q3_K")], "ffn_down": [("all", "Q3_K")],
                      "attn_output": [("all", "Q3_K")]}),
}  # fmt: skip
"""By file type: the type of most matrices, and for some kinds the first rule that holds, as `(layers, type)`.

These are what llama-quantize makes today without an importance matrix; with one, IQ4 files are 0.8 % smaller. Matrices
of fused queries, keys and values (Phi-3) had other rules before 2026, up to 2 % off at 4 bits and more.
"""
LAYERS: dict[str, Callable[[int, int, float], bool]] = {
    "all": lambda i, n, shared: True,
    "two": lambda i, n, shared: i < 2,
    "four": lambda i, n, shared: i < 4,
    "sixteenth": lambda i, n, shared: i < n // 16,
    "eighth": lambda i, n, shared: i < n // 8,
    "more": lambda i, n, shared: i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
    "shared": lambda i, n, shared: shared >= 4,
}
"""Layers a rule speaks of: layer i of n, where `shared` query heads have one head of keys and values in common."""

KINDS = {
    "embed_tokens": "token_embd", "wte": "token_embd", "embed_in": "token_embd", "lm_head": "output",
    "embed_out": "output", "wpe": "position_embd", "v_proj": "attn_v", "qkv_proj": "attn_v", "c_attn": "attn_v",
    "query_key_value": "attn_v", "k_proj": "attn_k", "o_proj": "attn_output", "dense": "attn_output",
    "attn.c_proj": "attn_output", "down_proj": "ffn_down", "fc2": "ffn_down", "mlp.c_proj": "ffn_down",
    "dense_4h_to_h": "ffn_down", "w2": "ffn_down", "gate": "router", "router": "router",
}  # fmt: skip
"""llama.cpp's kind of a matrix by the name transformers gives it; fused queries, keys and values count as values."""

VLLM_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4 + 20 / 128, "nf4": 4.5}
"""Bits a weight of vLLM's linear layers; embedding and head stay at 16. int4 is AWQ or GPTQ in groups of 128 (scale and
zero point), nf4 bitsandbytes without its second quantization (a 32-bit scale for 64 weights)."""
LLAMA_CACHES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
VLLM_CACHES = {"bf16": 2.0, "f16": 2.0, "fp8": 1.0}
"""Bytes a number of the cache; the first is the engine's own."""

UBATCH = 512
"""Tokens llama.cpp computes at once (`--ubatch-size`)."""
UTILIZATION = 0.92
"""Share of the card vLLM takes (`--gpu-memory-utilization`)."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks vLLM keeps room for (`--max-lora-rank`)."""
METADATA = 32
"""Bytes of a GGUF file for each token of the vocabulary: 23 (SentencePiece) to 61 (byte-level, with its merges)."""
RUNTIME = {"llama.cpp": Range(GIB // 5, 7 * GIB // 10), "vllm": Range(GIB // 2, 2 * GIB)}
"""What a CUDA context and libraries take; vLLM's CUDA graphs with them, which logs put at 0.3 to 1 GiB."""


@dataclass(frozen=True)
class ServingPlan:
    """What serving a model takes.

    Args:
        engine: as asked for.
        precision: of the weights; a GGUF file type for Ollama and llama.cpp.
        context: tokens of one request, prompt and answer.
        sequences: requests of this length at once.
        cache: precision of keys and values.
        merged: the adapter is part of the weights; else it lies beside them.
        file_bytes: size of the GGUF file; of the weights, for vLLM.
        bits: of a weight, on average over the file.
        parts: bytes on the device: weights, adapter, cache.
        host_bytes: weights that llama.cpp keeps in the machine's own memory (the table of token embeddings).
        compute_bytes: buffers of a pass.
        runtime_bytes: the device's runtime, libraries and graphs.
        usable_bytes: what the card gives the engine, (surely, at most); None without a card.
        max_context: longest request of so many that surely fits; None without a card, 0: none.
        verdict: whether it runs; None without a card.
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
        """What the device has to give."""
        overhead = zip(self.compute_bytes, self.runtime_bytes, strict=True)
        return Range(*(sum(self.parts.values()) + c + r for c, r in overhead))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; bands as `{"low", "high"}`."""
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
    card: Gpu | None = None,
) -> ServingPlan:
    """Tell what serving a tuned model takes, and whether a card has it.

    Args:
        config: the base's.
        engine: one of `ENGINES`.
        precision: a file type of `MIXES` for Ollama and llama.cpp, one of `VLLM_BITS` for vLLM; None: the engine's own.
        context: tokens of one request, prompt and answer.
        sequences: requests of this length at once.
        cache: precision of keys and values, one of `LLAMA_CACHES` or `VLLM_CACHES`; None: 16 bits.
        adapter_bytes: size of an adapter that is loaded beside the model; None: it is merged.
        rank: of that adapter; vLLM keeps room for this rank on every linear layer, whatever the adapter has.
        utilization: share of the card vLLM takes.
        card: where it is to run; None: only what it takes is told.

    Raises:
        UsageError: an engine, precision or cache that does not exist; a number that is out of its range.
        ModelError: layers whose cache is no keys and values of heads (linear attention, Mamba, latent attention).
    """
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}{nearest(engine, ENGINES)}", format_names(ENGINES))
    _in_range(context=context, sequences=sequences, rank=rank)
    if not 0 < utilization <= 1:
        raise UsageError(f"utilization is {utilization}", "a number above 0, at most 1")
    if adapter_bytes is not None and adapter_bytes < 0:
        raise UsageError(f"adapter_bytes is {adapter_bytes}", "a number of bytes, or None for a merged adapter")
    on_vllm = engine == "vllm"
    precision = _known("precision", precision or ENGINES[engine], VLLM_BITS if on_vllm else MIXES)
    caches = VLLM_CACHES if on_vllm else LLAMA_CACHES
    cache = _known("cache", cache or next(iter(caches)), caches)
    text = config.get_text_config()
    model = build_meta_model(config, None, torch.bfloat16)
    file_bytes, embeddings = _vllm_weights(model, precision) if on_vllm else gguf_bytes(model, precision)
    numbers = sum(p.numel() for p in model.parameters())
    # llama.cpp looks tokens up on the host; a table that is the output matrix too has a second copy on the device.
    host = embeddings if card is None or (card.device == "cuda" and not card.unified) else 0
    parts = {"weights": file_bytes - (0 if text.tie_word_embeddings else host), "adapter": 0, "cache": 0}
    if adapter_bytes is not None:
        parts["adapter"] = _slots(model, rank) if on_vllm else adapter_bytes
    batch, rows = _batch(card) if on_vllm else (UBATCH, 1)
    runtime = RUNTIME["vllm" if on_vllm else "llama.cpp"] if card is None or card.device == "cuda" else Range(0, 0)

    def at(length: int) -> tuple[int, Range, Range]:
        """Return the cache, the buffers and all of it for requests of this length."""
        held = sequences * cache_bytes(config, length, engine, cache, batch)
        compute = _vllm_buffers(text, batch, rows) if on_vllm else _llama_buffers(text, length)
        fixed = parts["weights"] + parts["adapter"] + held
        return held, compute, Range(*(fixed + c + r for c, r in zip(compute, runtime, strict=True)))

    parts["cache"], compute, need = at(context)
    share = utilization if on_vllm else 1.0
    usable = None if card is None else Range(*(int(n * share) for n in card.usable))
    longest = None
    if usable is not None:
        low = usable.low
        longest = _longest(lambda n: at(n)[2].high <= low, text.max_position_embeddings)
    return ServingPlan(
        engine=engine,
        precision=precision,
        context=context,
        sequences=sequences,
        cache=cache,
        merged=adapter_bytes is None,
        file_bytes=file_bytes + (0 if on_vllm else METADATA * text.vocab_size),
        bits=8 * file_bytes / numbers,
        parts=parts,
        host_bytes=host,
        compute_bytes=compute,
        runtime_bytes=runtime,
        usable_bytes=usable,
        max_context=longest,
        verdict=None if usable is None else _verdict(need, usable),
        reason=_reason(need, usable, card),
        evidence={
            **dict.fromkeys(("file_bytes", "bits", *parts, "host_bytes"), "computed"),
            **dict.fromkeys(("compute_bytes", "runtime_bytes", "need_bytes", "max_context"), "guessed"),
            "usable_bytes": "published",
        },
    )


def gguf_bytes(model: Any, precision: str) -> tuple[int, int]:
    """Return the bytes of all tensors in a model's GGUF file, and of its token embeddings.

    Args:
        model: a transformers model, on any device; shapes and names are read.
        precision: a file type of `MIXES`.

    Raises:
        UsageError: there is no such file type.
    """
    precision = _known("precision", precision, MIXES)
    default, rules = MIXES[precision]
    text = model.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    shared = heads / (getattr(text, "num_key_value_heads", None) or heads)
    plain = default in ("F32", "F16", "BF16")
    total = embeddings = 0
    for width, kind, layer, shape in _matrices(model):
        if width == 0 or kind in ("position_embd", "router"):
            as_type = "F32"
        elif plain:
            as_type = default
        elif kind == "output" or (kind == "token_embd" and text.tie_word_embeddings):
            as_type = "Q8_0" if default == "Q8_0" or width % BLOCKS[default][0] else "Q6_K"
        else:
            fitting = (t for where, t in rules.get(kind, ()) if LAYERS[where](layer, layers, shared))
            as_type = next(fitting, default)
            if kind == "attn_v" and layers == 80 and shared > 1 and as_type in ("Q3_K", "Q4_K"):
                as_type = "Q5_K"  # llama.cpp's exception for 70B models, whose `attn_v` is small
        size = _ggml_bytes(shape.numel(), width, as_type)
        total += size
        embeddings += size if kind == "token_embd" else 0
    return total, embeddings


def cache_bytes(config: PreTrainedConfig, context: int, engine: str, cache: str = "f16", batch: int = UBATCH) -> int:
    """Return the bytes of keys and values of one request.

    Args:
        config: the model's.
        context: its tokens.
        engine: one of `ENGINES`; llama.cpp takes 256 tokens at a time, vLLM 16, and each keeps a window in its own way.
        cache: precision, one of the engine's.
        batch: tokens computed at once, for which a sliding window has room too.

    Raises:
        ModelError: layers whose cache is no keys and values of heads.
    """
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise ModelError("the model keeps latent attention, not keys and values of heads", "attention with heads")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        # One window for every layer (Mistral v0.1, Phi-3) is known to vLLM; llama.cpp keeps the whole context.
        kinds = ["sliding_attention" if window and engine == "vllm" else "full_attention"] * text.num_hidden_layers
    if others := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"the model has layers that keep no keys and values of heads: {format_names(sorted(others))}",
                         "full or sliding attention in every layer")  # fmt: skip
    if engine == "vllm":
        full = _padded(context, 16)
        slid = min(full, _padded(min(context, (window or context) - 1 + batch), 16) + 16)
    else:
        full = _padded(context, 256)
        slid = min(full, _padded((window or context) + batch, 256))
    cells = sum(slid if kind == "sliding_attention" else full for kind in kinds)
    return int(cells * 2 * heads * width * (LLAMA_CACHES | VLLM_CACHES)[cache])


def _matrices(model: Any) -> Iterator[tuple[int, str, int, torch.Size]]:
    """Yield the width of every parameter's rows (0: a vector), llama.cpp's kind of it, its layer, its shape."""
    seen = set()
    for path, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) in seen:  # a tied matrix counts once, as the embedding it is
                continue
            seen.add(id(p))
            names = f"{path}.{own}".removesuffix(".weight").split(".")
            kind = KINDS.get(".".join(names[-2:])) or KINDS.get(names[-1], "other")
            layer = next((int(x) for x in names if x.isdigit()), 0)
            width = 0 if p.dim() < 2 else p.shape[0] if isinstance(module, Conv1D) else p.shape[-1]
            yield width, kind, layer, p.shape


def _ggml_bytes(numbers: int, width: int, as_type: str) -> int:
    if width and width % BLOCKS[as_type][0]:
        as_type = FALLBACK[as_type]
        as_type = "F16" if width % BLOCKS[as_type][0] else as_type
    per, size = BLOCKS[as_type]
    return numbers // per * size


def _vllm_weights(model: Any, precision: str) -> tuple[int, int]:
    bits = VLLM_BITS[precision]
    wide = max(bits, 16.0)
    total = sum(
        shape.numel() * (bits if width and kind not in ("token_embd", "output", "position_embd") else wide) / 8
        for width, kind, _, shape in _matrices(model)
    )
    return int(total), 0


def _slots(model: Any, rank: int) -> int:
    """Return what vLLM sets aside for one adapter: A and B of the rank's size on every linear layer, in 16 bits."""
    room = next((r for r in RANKS if r >= rank), None)
    if room is None:
        raise UsageError(f"rank is {rank}", f"at most {RANKS[-1]}, vLLM's limit", "merge the adapter")
    sides = sum(
        sum(shape[-2:]) * shape.numel() // shape[-2:].numel()
        for width, kind, _, shape in _matrices(model)
        if width and kind not in ("token_embd", "position_embd", "output", "router")
    )
    return room * sides * 2


def _batch(card: Gpu | None) -> tuple[int, int]:
    """Return vLLM's tokens and requests in one pass (`--max-num-batched-tokens`, `--max-num-seqs`), by the card."""
    return (8192, 1024) if card is not None and card.memory >= 70 * GIB else (2048, 256)


def _llama_buffers(text: Any, context: int) -> Range:
    """Buffers of llama.cpp with flash attention, its default: scores of the vocabulary for a batch, and the mask.

    258.5 MiB for Llama 3.1 8B and 304 MiB for Qwen 2.5 7B are what it reports; since 2026 it reserves scores for the
    last token alone where it can, which is the low end.
    """
    mask = UBATCH * _padded(context, 256) * 2
    scores = 4 * UBATCH * (text.vocab_size + text.hidden_size)
    return Range(4 * UBATCH * text.hidden_size, scores + mask)


def _vllm_buffers(text: Any, batch: int, rows: int) -> Range:
    """Peak of vLLM's trial pass: a feed-forward layer on a full batch, and scores of the vocabulary for the sampler."""
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    states = 2 * batch * (2 * inner + 4 * text.hidden_size)
    return Range(states // 2, states + 3 * 4 * rows * text.vocab_size)


def _verdict(need: Range, usable: Range) -> Verdict:
    if need.high <= usable.low:
        return "fits"
    return "tight" if need.low <= usable.high else "does not fit"


def _reason(need: Range, usable: Range | None, card: Gpu | None) -> str:
    needs = f"{format_bytes(need.low)} to {format_bytes(need.high)}"
    if usable is None or card is None:
        return f"it takes {needs}"
    return f"it takes {needs}, and {card.name} gives it {format_bytes(usable.low)} to {format_bytes(usable.high)}"


def _longest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest length up to `most` that fits, in steps of 256; 0: none."""
    low, high = 0, max(most // 256, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle - 1)
    return min(256 * low, most)


def _known(what: str, name: str, known: dict[str, Any]) -> str:
    found = next((k for k in known if k.lower() == name.lower()), None)
    if found is None:
        close = nearest(name.lower(), [k.lower() for k in known])
        raise UsageError(f"there is no {what} {name!r} here{close}", format_names(known, most=len(known)))
    return found


def _in_range(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} is {number}", "a whole number of 1 and more")


def _padded(n: int, step: int) -> int:
    return -(-n // step) * step
