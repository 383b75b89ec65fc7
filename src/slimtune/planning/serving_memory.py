"""Memory for serving the tuned model: weights as the engine holds them, the cache of keys and values, overhead.

A GGUF file is planned by bits per weight of its file type, within 3 % of real files. The cache holds
`2 · kv_heads · head_dim` numbers for each token and layer; a layer with a sliding window holds only the window.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..core.foundation.formatting import GIB, format_bytes
from ..core.models.base_config import get_max_positions
from ..errors import ModelError, SlimtuneError, UsageError, format_names, suggest
from .cpu_experts import count_layers_on_cpu, estimate_cpu_experts, find_expert_layers
from .gpu_specs import GpuSpec
from .interval import Interval
from .meta_model import build_adapted_meta_model
from .plan_result import CpuExpertsEstimate, ServingEstimate
from .planner import find_largest_fitting, judge_memory_fit
from .serving_cache import UBATCH, count_recurrent_state_bytes, count_request_kv_cache_bytes, round_up
from .serving_speed import (
    LayerStructure,
    ServingSpeed,
    describe_guessed_speeds,
    estimate_decode_and_prefill_speed,
)
from .weight_formats import (
    ENGINES,
    EXPERT_BITS,
    GGUF_TYPES,
    MLX_BITS,
    VLLM_BITS,
    find_published_precision,
    load_vllm_lora_rules,
)

_VALUE_DOWN = re.compile(
    r"(v_proj|qkv_proj|in_proj_qkvz?|c_attn|query_key_value|down_proj|fc2|mlp\.c_proj|dense_4h_to_h|w2)$"
)
"""Names in transformers of the matrices that llama.cpp calls `attn_v` and `ffn_down`; fused Q, K and V count as V."""
_UNQUANTIZED = re.compile(r"(^|\.)(wpe|gate|router)$")
"""Position embeddings and routers of experts, which GGUF files keep in float32."""
_PICKED_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
"""Fields of a config with the number of experts that a token reads, where no router says it."""
_ROUTER_DISTANCE = 4
"""How many modules above its experts a router may be: `experts`, the mixture, the layer."""
UTILIZATION = 0.92
"""Share of the GPU that vLLM takes (`--gpu-memory-utilization`)."""
MLX_STEP = 2048
"""Tokens of a prompt that MLX computes at once (`--prefill-step-size`)."""
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
    model: Any = None,
) -> ServingEstimate:
    """Return what serving a tuned model takes, and whether a GPU has it.

    Args:
        config: the base's.
        engine: one of `ENGINES`.
        precision: one of the engine's; None: that of the published checkpoint if the engine has it, else its default.
        context: tokens of one request, prompt and answer.
        sequences: requests of this length at once.
        cache: precision of keys and values, one of the engine's; None: 16 bits.
        adapter_rank: rank of an adapter on every linear layer that is loaded beside the model; None: it is merged.
        gpu: where it runs; None: no verdict.
        model: the base on meta, by `build_served_model`, if it exists already: for many GPUs it is built once.

    Raises:
        UsageError: an engine, precision or cache that does not exist; a number out of its range.
        ModelError: what the model's layers cache is not known, or the model cannot be built from its config.
    """
    with _translating_model_errors(config):
        model = build_served_model(config) if model is None else model
        return _estimate_serving_memory(config, engine, precision, context, sequences, cache, adapter_rank, gpu, model)


def build_served_model(config: PreTrainedConfig) -> Any:
    """Return a base on meta, as engines load it; ModelError if it cannot be built from its config."""
    with _translating_model_errors(config):
        return build_adapted_meta_model(config, None, torch.bfloat16)


@contextmanager
def _translating_model_errors(config: PreTrainedConfig) -> Iterator[None]:
    """Raise ModelError where code of transformers or of the base fails."""
    try:
        yield
    except SlimtuneError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"serving a base of the kind {config.model_type} cannot be planned ({type(error).__name__}: {first_line})",
            "a base that generates text",
        ) from error


def _estimate_serving_memory(
    config: PreTrainedConfig,
    engine: str,
    precision: str | None,
    context: int,
    sequences: int,
    cache: str | None,
    adapter_rank: int | None,
    gpu: GpuSpec | None,
    model: Any,
) -> ServingEstimate:
    engine = _find_name("engine", engine, ENGINES)
    is_vllm, facts = engine == "vllm", ENGINES[engine]
    is_gguf = facts.supported_precisions is GGUF_TYPES
    if engine == "mlx" and gpu is not None and gpu.vendor != "apple":
        raise UsageError(
            f"serving by MLX is not planned for {gpu.name}",
            "a GPU by Apple, e.g. m4-max-64gb",
            "choose another --engine",
        )
    if gpu is not None and gpu.architecture in facts.unsupported_architectures:
        architectures = format_names(facts.unsupported_architectures)
        raise UsageError(
            f"{engine} does not run on {gpu.name}",
            f"a GPU of another architecture than {architectures}",
            "choose another --engine, such as llama.cpp",
        )
    precision = precision or find_published_precision(config, engine) or facts.default_precision
    precision = _find_name("precision", precision, facts.supported_precisions)
    cache = _find_name("cache", cache or next(iter(facts.bytes_by_cache_precision)), facts.bytes_by_cache_precision)
    for name, number in (("context", context), ("sequences", sequences), ("adapter_rank", adapter_rank)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}", "a whole number from 1")

    text = config.get_text_config()
    # llama.cpp reads embeddings from CPU memory.
    separate_memory = gpu is None or (gpu.device == "cuda" and not gpu.unified)
    placed = _place_weights(model, precision, embeddings_on_host=separate_memory and is_gguf, with_vision=is_vllm)
    state = sequences * count_recurrent_state_bytes(model)
    adapter = 0 if adapter_rank is None else _adapter_bytes(model, adapter_rank, is_vllm)
    # vLLM's --max-num-batched-tokens and --max-num-seqs depend on the GPU.
    batch_tokens, batch_requests = UBATCH if is_gguf else MLX_STEP, sequences
    if is_vllm:
        batch_tokens, batch_requests = (8192, 1024) if gpu is not None and gpu.memory >= 70 * GIB else (2048, 256)
    runtime = facts.runtime_bytes if gpu is None or gpu.device == "cuda" else Interval(0, 0)

    def need_at(length: int) -> tuple[int, Interval, Interval]:
        """Return the bytes of cache, buffers and everything for requests of this length."""
        cached = sequences * count_request_kv_cache_bytes(config, length, engine, cache, batch_tokens)
        buffers = _llama_buffers(text, length) if is_gguf else _batch_buffers(text, batch_tokens, batch_requests)
        return cached, buffers, Interval(*[placed.device_bytes + adapter + cached + state] * 2) + buffers + runtime

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
    speed = cpu_experts = None

    def estimate_speed(gpu: GpuSpec, engine: str, *, without: float = 0.0) -> ServingSpeed | None:
        """Return the speed, of a token that does not read some bytes of the weights."""
        read_bytes, multiplied = count_weight_bytes_and_macs_per_token(model, precision)
        return estimate_decode_and_prefill_speed(
            gpu,
            engine,
            weight_bytes_per_token=read_bytes + adapter - without,
            kv_bytes_per_request=(cached + state) / sequences,
            matmul_weight_count=multiplied,
            layers=text.num_hidden_layers,
            vocab_size=text.vocab_size,
            concurrent_requests=sequences,
            precision=precision,
            structure=describe_layer_structure(model, precision),
        )

    if gpu is not None and verdict != "does not fit":
        speed = estimate_speed(gpu, engine)
    elif gpu is not None and usable is not None and is_gguf and separate_memory:
        cpu_experts = _estimate_cpu_experts(model, precision, need, usable, placed.host_bytes, gpu, estimate_speed)
    guesses = []
    if gpu is not None and speed is not None and "guessed" in (speed.evidence, speed.prefill_evidence):
        guesses = list(describe_guessed_speeds(gpu, engine))
    return ServingEstimate(
        engine=engine,
        precision=precision,
        context=context,
        sequences=sequences,
        cache=cache,
        merged=adapter_rank is None,
        file_bytes=placed.file_bytes + (METADATA * text.vocab_size if is_gguf else 0),
        bits=8 * placed.file_bytes / placed.numbers,
        parts={"weights": placed.device_bytes, "adapter": adapter, "cache": cached}
        | ({"state": state} if state else {}),
        host_bytes=placed.host_bytes,
        compute_bytes=buffers,
        runtime_bytes=runtime,
        usable_bytes=usable,
        max_context=max_context,
        decode_tokens_per_second=speed.decode if speed is not None else None,
        prefill_tokens_per_second=speed.prefill if speed is not None else None,
        verdict=verdict,
        reason=reason,
        cpu_experts=cpu_experts,
        notes=[*_list_serving_notes(config, engine), *guesses],
        evidence={
            **dict.fromkeys(("file_bytes", "bits", "weights", "adapter", "cache", "state", "host_bytes"), "computed"),
            **dict.fromkeys(("compute_bytes", "runtime_bytes", "need_bytes", "max_context"), "guessed"),
            "usable_bytes": "published",
        }
        | (
            {"decode_tokens_per_second": speed.evidence, "prefill_tokens_per_second": speed.prefill_evidence}
            if speed
            else {}
        ),
    )


def _estimate_cpu_experts(
    model: Any,
    precision: str,
    need: Interval,
    usable: Interval,
    host_bytes: int,
    gpu: GpuSpec,
    estimate_speed: Callable[..., ServingSpeed | None],
) -> CpuExpertsEstimate | None:
    """Return what serving takes with the fewest experts in CPU memory; None: it is no mixture, or all do not help."""
    shares, structure = _find_active_expert_shares(model), describe_layer_structure(model, precision)
    layers = find_expert_layers([name for name, p in model.named_parameters() if id(p) in shares])
    count = count_layers_on_cpu(need.high, usable.low, structure.all_expert_bytes, len(layers))
    if count is None:
        return None
    picked = sum(shares[id(p)] * size for _, p, size in _weight_sizes(model, precision) if id(p) in shares)
    read_bytes = picked * count / len(layers)
    return estimate_cpu_experts(
        layers=layers,
        count=count,
        structure=structure,
        need=need,
        host_bytes=host_bytes,
        speed=estimate_speed(gpu, "llama.cpp", without=read_bytes),
        read_bytes=read_bytes,
    )


def _list_serving_notes(config: PreTrainedConfig, engine: str) -> list[str]:
    """Return what the estimate leaves out, in whole sentences."""
    if config.get_text_config() is config:
        return []
    beside = {"vllm": "vLLM loads what sees or hears, too", "mlx": "mlx-lm leaves out what sees or hears"}
    other = "what sees or hears is a file of its own (mmproj)"
    return [f"File and speed are of the language part: {beside.get(engine, other)}."]


class _PlacedWeights(NamedTuple):
    """Where an engine holds the weights of a model, in bytes."""

    file_bytes: int  # of the language part
    device_bytes: int
    host_bytes: int
    numbers: int  # in the language part


def _place_weights(model: Any, precision: str, *, embeddings_on_host: bool, with_vision: bool) -> _PlacedWeights:
    sizes = _weight_sizes(model, precision)
    language = [(kind, p, size) for kind, p, size in sizes if kind != "not language"]
    file_bytes, embedding_bytes = count_weight_and_embedding_bytes(model, precision)
    if with_vision:  # vLLM loads what sees and hears, too; llama.cpp only if it is given that file
        device_bytes = sum(size for _, _, size in sizes)
    elif embeddings_on_host:  # if they are tied to the head, the device has a second copy
        device_bytes = sum(size for kind, _, size in language if kind != "embedding")
    else:
        device_bytes = file_bytes
    host_bytes = embedding_bytes if embeddings_on_host else 0
    return _PlacedWeights(file_bytes, int(device_bytes), host_bytes, sum(p.numel() for _, p, _ in language))


def count_weight_and_embedding_bytes(model: Any, precision: str) -> tuple[int, int]:
    """Return the bytes of a model's language part, and of its embeddings; `precision`: one of an engine's."""
    sizes = [sized for sized in _weight_sizes(model, precision) if sized[0] != "not language"]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    looked_up = (size for kind, p, size in sizes if kind == "embedding" or (kind == "head" and id(p) in embeddings))
    return int(sum(size for _, _, size in sizes)), int(sum(looked_up))


def count_weight_bytes_and_macs_per_token(model: Any, precision: str) -> tuple[float, float]:
    """Return what one token takes: bytes of the weights that it reads, and numbers in matrices it is multiplied with.

    Of embeddings it reads a row, and of a mixture's experts those that its router picks.
    """
    shares = _find_active_expert_shares(model)
    read_bytes = weights = 0.0
    for kind, parameter, size in _weight_sizes(model, precision):
        share = shares.get(id(parameter), 1.0)
        if kind not in ("embedding", "not language"):
            read_bytes += share * size
        if kind in ("matrix", "value_down"):
            weights += share * parameter.numel()
    return read_bytes, weights


def describe_layer_structure(model: Any, precision: str) -> LayerStructure:
    """Return what of a model is not dense layers of attention; `precision`: one of an engine's."""
    shares = _find_active_expert_shares(model)
    experts = [(p, size) for _, p, size in _weight_sizes(model, precision) if id(p) in shares]
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    return LayerStructure(
        # The experts of a layer are a matrix up, with the gate, and one down.
        expert_layers=len(experts) // 2,
        recurrent_layers=sum(kind == "linear_attention" or kind.startswith("hybrid") for kind in kinds),
        convolution_layers=kinds.count("conv"),
        is_slow_in_ollama=text.model_type.startswith("qwen3_5"),
        expert_macs=sum(shares[id(p)] * p.numel() for p, _ in experts),
        expert_share=max((shares[id(p)] for p, _ in experts), default=1.0),
        all_expert_bytes=sum(size for _, size in experts),
        hidden_size=text.hidden_size,
        per_layer_embeddings=bool(getattr(text, "hidden_size_per_layer_input", None)),
    )


@lru_cache(maxsize=2)
def _find_active_expert_shares(model: Any) -> dict[int, float]:
    """Return the share of its experts that a token reads, by the id of each parameter that holds experts.

    The experts of a layer are one parameter of three dimensions. How many a token picks is `top_k` of the router
    beside them, in every family of transformers but those that only have a field of the config.
    """
    text, shares = model.config.get_text_config(), {}
    for name, parameter in model.named_parameters():
        path, _, _ = name.rpartition(".")
        if parameter.dim() != 3 or isinstance(model.get_submodule(path), nn.Conv1d):
            continue
        picked = None
        for _ in range(_ROUTER_DISTANCE):
            beside = (vars(module).get("top_k") for module in model.get_submodule(path).modules())
            if (picked := next((k for k in beside if isinstance(k, int) and k), None)) or not path:
                break
            path = path.rpartition(".")[0]
        picked = picked or next((k for field in _PICKED_FIELDS if (k := getattr(text, field, None))), None)
        shares[id(parameter)] = min(1.0, (picked or parameter.shape[0]) / parameter.shape[0])
    return shares


@lru_cache(maxsize=2)  # the same model is asked about on many GPUs
def _weight_sizes(model: Any, precision: str) -> list[tuple[str, nn.Parameter, float]]:
    """Return kind, weight and bytes of each weight; `precision`: one of an engine's."""
    bits = _vllm_bits if precision in VLLM_BITS else _mlx_bits if precision in MLX_BITS else _gguf_bits
    return [
        (kind, p, bits(precision, kind, width, holds_experts=p.dim() == 3) * p.numel() / 8)
        for kind, p, width in _weights(model)
    ]


def _vllm_bits(precision: str, kind: str, _: int, *, holds_experts: bool) -> float:
    """Return the bits per weight of a kind of weights in vLLM."""
    linear = VLLM_BITS[precision]
    if kind not in ("matrix", "value_down"):
        return max(linear, 16.0)
    return EXPERT_BITS.get(precision, linear) if holds_experts else linear


def _mlx_bits(precision: str, kind: str, _: int, *, holds_experts: bool) -> float:
    """Return the bits per weight of a kind of weights in MLX."""
    if kind == "small":
        return 16.0
    return EXPERT_BITS.get(precision, MLX_BITS[precision]) if holds_experts else MLX_BITS[precision]


def _gguf_bits(precision: str, kind: str, width: int, *, holds_experts: bool) -> float:
    """Return the bits per weight of a kind of weights, in rows of `width` numbers, in a GGUF file."""
    gguf_type, whole_blocks = GGUF_TYPES[precision], width % 256 == 0
    if kind == "small":
        return 32.0
    if kind == "head" and gguf_type.bits < GGUF_TYPES["Q8_0"].bits:  # also if it is tied to the embeddings
        return GGUF_TYPES["Q6_K" if whole_blocks else "Q8_0"].bits
    if holds_experts and gguf_type.expert_bits:
        return gguf_type.expert_bits
    return gguf_type.bits_of(value_down=kind == "value_down", whole_blocks=whole_blocks or kind == "head")


def _weights(model: Any) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield kind, weight and row length of each weight; tied ones once."""
    head = model.get_output_embeddings().weight
    language = _list_language_weights(model)
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        module = model.get_submodule(name.rpartition(".")[0])
        kind = "value_down" if _VALUE_DOWN.search(path) else "matrix"
        if language is not None and id(parameter) not in language:
            kind = "not language"
        elif parameter.dim() < 2 or _UNQUANTIZED.search(path) or isinstance(module, nn.Conv1d):
            kind = "small"
        elif parameter is head or isinstance(module, nn.Embedding):
            kind = "head" if parameter is head else "embedding"
        yield kind, parameter, parameter.shape[0 if isinstance(module, Conv1D) else -1]


def _list_language_weights(model: Any) -> set[int] | None:
    """Return the ids of the weights that read and write text; None: all do."""
    if model.config.get_text_config() is model.config:
        return None
    return {id(p) for m in (model.get_decoder(), model.get_output_embeddings()) for p in m.parameters()}


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
    mask = UBATCH * round_up(context, 256) * 2
    return Interval(4 * UBATCH * text.hidden_size, 4 * UBATCH * (text.vocab_size + text.hidden_size) + mask)


def _batch_buffers(text: Any, batch_tokens: int, requests: int) -> Interval:
    """Return the peak of vLLM's trial pass, or of a step of MLX: an MLP on a full batch, and logits for the sampler."""
    layer = next(iter(getattr(text, "per_layer_config", None) or [text]))
    inner = getattr(layer, "intermediate_size", None) or getattr(layer, "n_inner", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list) else inner
    states = 2 * batch_tokens * (2 * inner + 4 * text.hidden_size)
    return Interval(states // 2, states + 3 * 4 * requests * text.vocab_size)


def _find_name(what: str, name: str, known: Mapping[str, Any]) -> str:
    match = next((k for k in known if k.lower() == name.lower()), None)
    if match is None:
        close = suggest(name.lower(), [k.lower() for k in known])
        raise UsageError(f"there is no {what} {name!r}{close}", format_names(known, most=len(known)))
    return match
