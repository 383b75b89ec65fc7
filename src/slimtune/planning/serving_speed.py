"""Serving speed: tokens a second of decoding from bandwidth, of prefill from arithmetic.

A decoded token reads every active weight and the cached keys, values and states, and starts the kernels of each layer:

    seconds = bytes / (share of bandwidth · bandwidth) + layers · seconds of a layer

A layer with experts counts more than one layer, as it has a router and a gather, and so does a recurrent layer; a
short convolution counts less. A token of a prompt takes

    seconds = 2 · (weights + 9,000 · layers · hidden size + experts' weights · E / tokens of an expert) / (share · rate)
              + bytes of all experts / (tokens of a batch · bandwidth) + recurrent layers · seconds of a scan

because a layer computes beside its matrices, an expert sees few tokens of a batch, which reads all of them once, and a
recurrent layer goes from token to token. Shares are fitted to published runs (benchmarks/data,
`python benchmarks/published_serving.py`, of prompts `python benchmarks/fit_prompt_speeds.py`) by engine and kind of
hardware. A range is as wide, on both sides of the formula and by a factor, as held for nine in ten runs of sources left
out of the fit, by the kind of hardware and of base, whichever is wider; of fewer than six sources it is wider than they
need. No range of decoding ends above what the bandwidth allows. Where an engine has no fit for a vendor, the range is
from the slowest to the fastest of all fits of this engine and of this vendor, and guessed. It imports no torch, so that
machines are compared at once.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from ..core.foundation.json_results import make_json_key_metadata
from .gpu_specs import GpuSpec
from .interval import Interval
from .weight_formats import ENGINES

EXPERT_LAYER, RECURRENT_LAYER, CONVOLUTION_LAYER, EMBEDDING_LAYER = 0.60, 0.77, -0.20, 0.45
"""What a layer with experts, a recurrent one, a short convolution instead of attention, or one with an embedding of its
own takes beside its traffic more than a layer of attention, in layers."""
MLX_EXPERT_LAYER, MLX_RECURRENT_LAYER = 1.11, 0.29
"""The same in MLX."""
OLLAMA_SLOWDOWN, OLLAMA_EXPERT_SLOWDOWN = 1.10, 1.22
"""Time of a token in Ollama as a multiple of that in llama.cpp, and of a mixture's."""
OLLAMA_DELTA_LAYER_S = 0.38e-3
"""Seconds that a layer of Qwen3.5's gated delta rule takes longer in slow versions of Ollama's own engine."""
EXPERT_TOKENS = {"nvidia": 63, "amd": 38, "apple": 24, "intel": 38, "": 38}
"""Tokens of a batch at which an expert's matrices reach half of the rate, by vendor: half of a kernel's tile. Of Intel
and of unknown vendors AMD's are taken."""
MLX_EXPERT_TOKENS = 54
"""The same in MLX."""
LAYER_MACS = 9000
"""What a layer computes for a token of a prompt beside its matrices, in products for each number of the hidden size."""
RECURRENT_TOKEN_S = 1.6e-6
"""Seconds that a recurrent layer's scan takes longer for a token of a prompt; it is no faster on a larger GPU."""
BATCH_TOKENS = 512
"""Tokens of a prompt that llama.cpp computes at once (`--ubatch-size`)."""
MLX_BATCH_TOKENS = 2048
"""Tokens of a prompt that MLX computes at once (`prefill_step_size`)."""
EXPERT_BANDWIDTH_SHARE = 0.8
"""Share of the bandwidth at which a batch of a prompt reads the experts."""

BaseKind = Literal["dense", "per-layer embeddings", "mixtures", "hybrids"]


class LayerStructure(NamedTuple):
    """What of a base is not dense layers of attention."""

    expert_layers: int = 0
    recurrent_layers: int = 0  # Mamba, gated delta net
    convolution_layers: int = 0  # short convolutions
    is_slow_in_ollama: bool = False  # Ollama computes its recurrent layers in its own engine, slowly in some versions
    expert_macs: float = 0.0  # numbers that a token is multiplied with in the experts that its router picks
    expert_share: float = 1.0  # of the experts, which a router picks
    all_expert_bytes: float = 0.0
    hidden_size: int = 0
    per_layer_embeddings: bool = False

    @property
    def kind(self) -> BaseKind:
        """The kind of base that a range is for."""
        if self.recurrent_layers or self.convolution_layers:
            return "hybrids"
        if self.expert_layers:
            return "mixtures"
        return "per-layer embeddings" if self.per_layer_embeddings else "dense"


DENSE_LAYERS = LayerStructure()


class DecodingSpeedFit(NamedTuple):
    """How fast an engine decodes on a kind of hardware."""

    bandwidth_share: float  # of the bandwidth
    layer_s: float  # seconds that each layer takes beside its traffic
    spread: float  # factor between measured speed and the formula, nine in ten runs of sources left out
    fitted_source_count: int  # authors, sites and repositories of the runs; fewer than two: guessed


class PrefillSpeedFit(NamedTuple):
    """How fast an engine reads a prompt on a kind of hardware."""

    rate_share: float  # of the rate
    rate_dtype: (
        str  # dtype of the rate: float32 where the engine computes on integers, whose rate is proportional to it
    )
    spread: float
    fitted_source_count: int


SpeedFits = Mapping[tuple[str, str], DecodingSpeedFit] | Mapping[tuple[str, str], PrefillSpeedFit]
"""Fits by engine and kind of hardware."""
Fit = TypeVar("Fit", DecodingSpeedFit, PrefillSpeedFit)


@dataclass(frozen=True)
class ServingSpeed:
    """Tokens a second of one request."""

    decode: Interval = field(metadata=make_json_key_metadata("decode_tokens_per_second"))
    """Written after a prompt."""
    prefill: Interval = field(metadata=make_json_key_metadata("prefill_tokens_per_second"))
    """Of a prompt that is read."""
    evidence: str
    """Kind of evidence of decode."""
    prefill_evidence: str
    """Kind of evidence of prefill."""


DECODING = {
    ("llama.cpp", "nvidia"): DecodingSpeedFit(0.88, 51e-6, 1.26, 40),
    ("llama.cpp", "nvidia blackwell"): DecodingSpeedFit(0.88, 40e-6, 1.26, 12),
    ("llama.cpp", "nvidia pascal"): DecodingSpeedFit(0.83, 194e-6, 1.50, 4),
    # It has no products of four integers (compute capability 6.0), by which llama.cpp multiplies quantized weights.
    ("llama.cpp", "nvidia p100"): DecodingSpeedFit(0.28, 143e-6, 1.65, 1),
    ("llama.cpp", "nvidia hbm"): DecodingSpeedFit(0.66, 97e-6, 1.35, 6),
    ("llama.cpp", "nvidia hbm3"): DecodingSpeedFit(0.58, 71e-6, 1.65, 2),
    ("llama.cpp", "nvidia unified"): DecodingSpeedFit(0.82, 45e-6, 1.25, 7),
    ("llama.cpp", "amd"): DecodingSpeedFit(0.79, 68e-6, 1.30, 14),
    ("llama.cpp", "amd hbm"): DecodingSpeedFit(0.50, 200e-6, 1.70, 1),
    ("llama.cpp", "amd unified"): DecodingSpeedFit(0.82, 72e-6, 1.27, 12),
    # Runs by SYCL and by Vulkan differ by up to a factor of 2 (`python fit_intel_speeds.py`).
    ("llama.cpp", "intel"): DecodingSpeedFit(0.73, 155e-6, 2.4, 12),
    ("llama.cpp", "intel unified"): DecodingSpeedFit(0.73, 155e-6, 2.4, 1),
    ("llama.cpp", "apple m1, m2"): DecodingSpeedFit(0.71, 160e-6, 1.41, 13),
    ("llama.cpp", "apple m5"): DecodingSpeedFit(0.82, 54e-6, 1.35, 5),
    ("llama.cpp", "apple"): DecodingSpeedFit(0.86, 116e-6, 1.25, 16),
    ("mlx", "apple m1, m2"): DecodingSpeedFit(0.82, 96e-6, 1.42, 6),
    ("mlx", "apple m5"): DecodingSpeedFit(0.79, 42e-6, 1.35, 4),
    ("mlx", "apple"): DecodingSpeedFit(0.85, 74e-6, 1.31, 11),
    # Two runs of vLLM were found (A100: 0.78 of the bandwidth, RTX 4090: 0.66), too few to fit.
    ("vllm", "nvidia"): DecodingSpeedFit(0.74, 40e-6, 1.25, 0),
    ("vllm", "nvidia hbm"): DecodingSpeedFit(0.72, 20e-6, 1.25, 0),
    ("vllm", "nvidia hbm3"): DecodingSpeedFit(0.72, 20e-6, 1.25, 0),
    ("vllm", "amd"): DecodingSpeedFit(0.60, 60e-6, 1.4, 0),
}
PREFILL = {
    ("llama.cpp", "nvidia"): PrefillSpeedFit(1.99, "float32", 1.70, 17),
    ("llama.cpp", "nvidia blackwell"): PrefillSpeedFit(1.97, "float32", 1.75, 10),
    ("llama.cpp", "nvidia pascal"): PrefillSpeedFit(1.05, "float32", 1.8, 1),
    ("llama.cpp", "nvidia p100"): PrefillSpeedFit(1.05, "float32", 1.8, 0),
    ("llama.cpp", "nvidia hbm"): PrefillSpeedFit(0.25, "float16", 2.1, 4),
    ("llama.cpp", "nvidia hbm3"): PrefillSpeedFit(0.20, "float16", 1.9, 1),
    ("llama.cpp", "nvidia unified"): PrefillSpeedFit(1.33, "float32", 1.55, 5),
    ("llama.cpp", "amd"): PrefillSpeedFit(0.85, "float32", 1.65, 6),
    # Its units for matrices are twice as fast as those of RDNA 3.
    ("llama.cpp", "amd rdna4"): PrefillSpeedFit(1.10, "float32", 1.8, 3),
    ("llama.cpp", "amd hbm"): PrefillSpeedFit(0.82, "float32", 1.9, 1),
    ("llama.cpp", "amd unified"): PrefillSpeedFit(0.56, "float32", 1.50, 13),
    ("llama.cpp", "intel"): PrefillSpeedFit(1.20, "float32", 3.0, 12),
    ("llama.cpp", "intel unified"): PrefillSpeedFit(1.20, "float32", 3.0, 1),
    ("llama.cpp", "apple m1, m2"): PrefillSpeedFit(0.72, "float32", 1.50, 12),
    # The M5 has units for matrices, whose rate Apple does not say.
    ("llama.cpp", "apple m5"): PrefillSpeedFit(2.35, "float32", 1.90, 5),
    ("llama.cpp", "apple"): PrefillSpeedFit(0.86, "float32", 1.40, 6),
    ("mlx", "apple m1, m2"): PrefillSpeedFit(0.54, "float32", 1.60, 3),
    ("mlx", "apple m5"): PrefillSpeedFit(2.27, "float32", 1.75, 4),
    ("mlx", "apple"): PrefillSpeedFit(0.86, "float32", 1.50, 4),
    ("vllm", "nvidia"): PrefillSpeedFit(0.46, "float16", 1.5, 0),
    ("vllm", "nvidia hbm"): PrefillSpeedFit(0.46, "float16", 1.5, 0),
    ("vllm", "nvidia hbm3"): PrefillSpeedFit(0.46, "float16", 1.5, 0),
    ("vllm", "amd"): PrefillSpeedFit(0.30, "float16", 1.7, 0),
}
KIND_DECODING: dict[BaseKind, float] = {"dense": 1.0, "per-layer embeddings": 1.48, "mixtures": 1.35, "hybrids": 1.43}
"""Factor between measured speed and the formula by the kind of base, nine in ten runs of sources left out."""
KIND_PREFILL: dict[BaseKind, float] = {"dense": 1.0, "per-layer embeddings": 2.3, "mixtures": 1.8, "hybrids": 1.75}


def get_serving_fit_hardware_key(gpu: GpuSpec) -> str:
    """Return the kind of hardware that a fit is for: a vendor, and the kind of memory or the generation."""
    if gpu.vendor == "apple":
        return "apple m1, m2" if gpu.architecture in ("m1", "m2") else "apple"
    if gpu.vendor in ("nvidia", "amd", "intel") and gpu.unified:
        return f"{gpu.vendor} unified"
    if gpu.architecture == "pascal":
        return "nvidia p100" if gpu.name == "p100" else "nvidia pascal"
    if gpu.stacked_memory:
        # From Hopper on, clocks are higher and kernels start sooner.
        return f"{gpu.vendor} hbm3" if gpu.architecture in ("hopper", "blackwell") else f"{gpu.vendor} hbm"
    return gpu.vendor


FITTED_AS = {"m6": "m5"}
"""Architectures of which no run is published, and the one that they are taken for: an M6 has its units for matrices."""


def get_serving_fit_key(gpu: GpuSpec, engine: str, fits: Collection[tuple[str, str]] = DECODING) -> tuple[str, str]:
    """Return the key in a table of fits, `DECODING` or `PREFILL`, of an engine on a GPU, which may not be in it."""
    fitted = ENGINES[engine].fitted_speeds_engine
    architecture = FITTED_AS.get(gpu.architecture, gpu.architecture)
    hardware = (get_serving_fit_hardware_key(gpu), f"{gpu.vendor} {architecture}")
    if hardware[0] in ("amd", "apple", "nvidia"):  # a generation with a fit of its own, as the M5 and the RTX 50 have
        hardware = hardware[::-1]
    # vLLM on unified memory and on old GPUs is not known apart.
    return fitted, next((name for name in hardware if (fitted, name) in fits), gpu.vendor)


def describe_guessed_speeds(gpu: GpuSpec, engine: str) -> Iterator[str]:
    """Yield why the speeds of an engine on a GPU are guessed, in whole sentences; nothing if they are fitted."""
    writing, reading = (_find_reason_of_guess(gpu, engine, fits) for fits in (DECODING, PREFILL))
    if writing and writing == reading:
        yield f"The speeds are guessed: {writing}."
        return
    for work, reason in (("writing", writing), ("reading a prompt", reading)):
        if reason:
            yield f"The speed of {work} is guessed: {reason}."


def _find_reason_of_guess(gpu: GpuSpec, engine: str, fits: SpeedFits) -> str:
    name = ENGINES[engine].fitted_speeds_engine
    fit = fits.get(get_serving_fit_key(gpu, engine, fits))
    if fit is None:
        ends = f"the range is from the slowest to the fastest of all fits of {name} and of this vendor"
        return f"no published run of {name} on {gpu.name} or the like is in a fit; {ends}"
    if gpu.architecture in FITTED_AS:
        return f"no published run on {gpu.name} is in the fit, which is that of the generation before"
    if fit.fitted_source_count > 1:
        return ""
    runs = "only one source of runs is" if fit.fitted_source_count else f"no published run of {name} is"
    return f"{runs} in the fit of {gpu.name} and the like"


def estimate_decode_and_prefill_speed(
    gpu: GpuSpec, engine: str, *, weight_bytes_per_token: float, kv_bytes_per_request: float,
    matmul_weight_count: float, layers: int, vocab_size: int, concurrent_requests: int = 1, precision: str = "Q4_K_M",
    structure: LayerStructure = DENSE_LAYERS, batch_tokens: int | None = None,
) -> ServingSpeed | None:  # fmt: skip
    """Return the speed of one request; None if the GPU's rates or its bandwidth are unknown.

    Args:
        gpu: where it runs; the weights are on it.
        engine: ollama, llama.cpp, vllm or mlx.
        weight_bytes_per_token: of the weights that a decoded token reads.
        kv_bytes_per_request: of keys, values and states that it reads, of one request.
        matmul_weight_count: in matrices that a token is multiplied with.
        layers: of the model.
        vocab_size: entries of its vocabulary, which count where the machine was measured.
        concurrent_requests: requests decoded together.
        precision: of the weights, by which a measurement of this machine is chosen.
        structure: what of the model is not dense layers of attention.
        batch_tokens: of a prompt that are computed at once; None: the engine's own.
    """
    cached = concurrent_requests * kv_bytes_per_request
    if gpu.measured is not None and (found := gpu.measured.find_serving_fit(engine, precision)) is not None:
        fit, nearest, evidence = found
        prompt_seconds = 2 * matmul_weight_count / fit.prompt_flops[nearest]
        seconds = weight_bytes_per_token / fit.bytes_per_second[nearest] + cached * fit.cached_byte_s
        seconds += layers * fit.layer_s[nearest] + vocab_size * fit.logit_s + fit.token_s
        return ServingSpeed(
            Interval(*(end / seconds for end in fit.spread)),
            Interval(*(end / prompt_seconds for end in fit.spread)),
            evidence,
            evidence,
        )
    if not gpu.rates or not gpu.bandwidth:
        return None
    key, prompt_key = get_serving_fit_key(gpu, engine), get_serving_fit_key(gpu, engine, PREFILL)
    decodings, prefills = _list_fits(DECODING, key), _list_fits(PREFILL, prompt_key)
    kind = structure.kind
    is_mlx, is_ollama = engine == "mlx", engine == "ollama"
    batch_tokens = batch_tokens or (MLX_BATCH_TOKENS if is_mlx else BATCH_TOKENS)
    tokens = batch_tokens * structure.expert_share
    expert_tokens = MLX_EXPERT_TOKENS if is_mlx else EXPERT_TOKENS[gpu.vendor]
    macs = matmul_weight_count + structure.expert_macs * expert_tokens / tokens
    macs += LAYER_MACS * layers * structure.hidden_size
    expert_s = structure.all_expert_bytes / batch_tokens / (EXPERT_BANDWIDTH_SHARE * gpu.bandwidth)
    counted_layers = (
        layers * (1 + (EMBEDDING_LAYER if structure.per_layer_embeddings else 0))
        + (MLX_EXPERT_LAYER if is_mlx else EXPERT_LAYER) * structure.expert_layers
        + (MLX_RECURRENT_LAYER if is_mlx else RECURRENT_LAYER) * structure.recurrent_layers
        + CONVOLUTION_LAYER * structure.convolution_layers
    )
    slow = OLLAMA_DELTA_LAYER_S * structure.recurrent_layers if is_ollama and structure.is_slow_in_ollama else 0.0
    fastest = gpu.bandwidth / (weight_bytes_per_token + cached)
    decode_ends, prefill_ends = [], []
    for prefill in prefills:
        rate = prefill.rate_share * gpu.rates.get(prefill.rate_dtype, min(gpu.rates.values()))
        prompt_seconds = 2 * macs / rate + RECURRENT_TOKEN_S * structure.recurrent_layers + expert_s
        spread = max(prefill.spread, KIND_PREFILL[kind])
        prefill_ends += [1 / (spread * prompt_seconds), spread / prompt_seconds]
        for decoding in decodings:
            # Decoded together, requests share the reading of the weights, until their arithmetic takes longer.
            read_seconds = (weight_bytes_per_token + cached) / (decoding.bandwidth_share * gpu.bandwidth)
            seconds = max(read_seconds, concurrent_requests * 2 * matmul_weight_count / rate)
            seconds += decoding.layer_s * counted_layers
            if is_ollama:
                seconds *= OLLAMA_EXPERT_SLOWDOWN if kind == "mixtures" else OLLAMA_SLOWDOWN
            spread = max(decoding.spread, KIND_DECODING[kind])
            decode_ends += [1 / (spread * (seconds + slow)), min(spread / seconds, fastest)]
    is_known = gpu.architecture not in FITTED_AS
    decode_is_known = is_known and key in DECODING and DECODING[key].fitted_source_count > 1
    prefill_is_known = is_known and prompt_key in PREFILL and PREFILL[prompt_key].fitted_source_count > 1
    return ServingSpeed(
        Interval(min(decode_ends), max(decode_ends)),
        Interval(min(prefill_ends), max(prefill_ends)),
        "published" if decode_is_known else "guessed",
        "published" if prefill_is_known else "guessed",
    )


def _list_fits(fits: Mapping[tuple[str, str], Fit], key: tuple[str, str]) -> list[Fit]:
    """Return the fit of an engine and a kind of hardware; all of the engine and of the vendor if it has none."""
    if key in fits:
        return [fits[key]]
    engine, vendor = key
    return [fit for (name, hardware), fit in fits.items() if name == engine or hardware.startswith(vendor)]
