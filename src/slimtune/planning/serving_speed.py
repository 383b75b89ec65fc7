"""Serving speed: tokens a second of decoding from bandwidth, of prefill from arithmetic.

A decoded token reads every active weight and the cached keys and values once, and starts the kernels of each layer:

    seconds = bytes / (share of bandwidth · bandwidth) + layers · seconds of a layer

A token of a prompt takes `2 · weights` operations at a share of a rate. Shares and ranges are fitted to published runs
(benchmarks/data/serving_points.json, `python benchmarks/published_serving.py`) by engine and kind of hardware. It
imports no torch, so that machines are compared at once.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.foundation.json_results import make_json_key_metadata
from .gpu_specs import GpuSpec
from .interval import Interval
from .weight_formats import ENGINES

HBM = 1.4e12
"""Bandwidth in bytes a second from which a datacentre GPU has stacked memory, which batch 1 does not saturate."""


class DecodingSpeedFit(NamedTuple):
    """How fast an engine decodes on a kind of hardware."""

    bandwidth_share: float  # of the bandwidth
    layer_s: float  # seconds that each layer takes beside its traffic
    spread: Interval  # measured speed divided by that of the formula, nine in ten runs
    fitted_run_count: int  # published runs it is fitted to; 0: guessed


class PrefillSpeedFit(NamedTuple):
    """How fast an engine reads a prompt on a kind of hardware."""

    rate_share: float  # of the rate
    rate_dtype: (
        str  # dtype of the rate: float32 where the engine computes on integers, whose rate is proportional to it
    )
    spread: Interval
    fitted_run_count: int


@dataclass(frozen=True)
class ServingSpeed:
    """Tokens a second of one request."""

    decode: Interval = field(metadata=make_json_key_metadata("decode_tokens_per_second"))
    """Written after a prompt."""
    prefill: Interval = field(metadata=make_json_key_metadata("prefill_tokens_per_second"))
    """Of a prompt that is read."""
    evidence: str
    """Kind of evidence of both."""


DECODING = {
    ("llama.cpp", "nvidia"): DecodingSpeedFit(0.85, 55e-6, Interval(0.84, 1.22), 74),
    ("llama.cpp", "nvidia hbm"): DecodingSpeedFit(0.60, 100e-6, Interval(0.82, 1.15), 9),
    ("llama.cpp", "amd"): DecodingSpeedFit(0.87, 70e-6, Interval(0.84, 1.10), 23),
    ("llama.cpp", "apple m1, m2"): DecodingSpeedFit(0.72, 155e-6, Interval(0.65, 1.20), 14),
    ("llama.cpp", "apple"): DecodingSpeedFit(0.90, 90e-6, Interval(0.80, 1.08), 22),
    # Two runs of vLLM were found (A100: 0.78 of the bandwidth, RTX 4090: 0.66), too few to fit.
    ("vllm", "nvidia"): DecodingSpeedFit(0.80, 40e-6, Interval(0.75, 1.15), 0),
    ("vllm", "nvidia hbm"): DecodingSpeedFit(0.78, 20e-6, Interval(0.75, 1.15), 0),
    ("vllm", "amd"): DecodingSpeedFit(0.70, 60e-6, Interval(0.6, 1.2), 0),
}
PREFILL = {
    ("llama.cpp", "nvidia"): PrefillSpeedFit(1.4, "float32", Interval(0.6, 1.65), 37),
    ("llama.cpp", "nvidia hbm"): PrefillSpeedFit(0.25, "float16", Interval(0.55, 1.45), 9),
    ("llama.cpp", "amd"): PrefillSpeedFit(0.66, "float32", Interval(0.8, 1.2), 3),
    ("llama.cpp", "apple m1, m2"): PrefillSpeedFit(0.58, "float32", Interval(0.74, 1.28), 12),
    ("llama.cpp", "apple"): PrefillSpeedFit(0.72, "float32", Interval(0.82, 1.15), 5),
    ("vllm", "nvidia"): PrefillSpeedFit(0.5, "float16", Interval(0.6, 1.4), 0),
    ("vllm", "nvidia hbm"): PrefillSpeedFit(0.5, "float16", Interval(0.6, 1.4), 0),
    ("vllm", "amd"): PrefillSpeedFit(0.35, "float16", Interval(0.5, 1.5), 0),
}


def get_serving_fit_hardware_key(gpu: GpuSpec) -> str:
    """Return the kind of hardware that a fit is for: a vendor, and the kind of memory or the generation."""
    if gpu.vendor == "nvidia" and gpu.kind == "datacentre" and (gpu.bandwidth or 0) > HBM:
        return "nvidia hbm"
    return "apple m1, m2" if gpu.architecture in ("m1", "m2") else gpu.vendor


def estimate_decode_and_prefill_speed(
    gpu: GpuSpec, engine: str, *, weight_bytes_per_token: float, kv_bytes_per_request: float,
    matmul_weight_count: float, layers: int, vocab_size: int, concurrent_requests: int = 1, precision: str = "Q4_K_M",
) -> ServingSpeed | None:  # fmt: skip
    """Return the speed of one request; None if the GPU's rates are unknown, or no runs of its kind are.

    Args:
        gpu: where it runs; the weights are on it.
        engine: ollama, llama.cpp or vllm.
        weight_bytes_per_token: of the weights that a decoded token reads.
        kv_bytes_per_request: of keys and values that it reads, of one request.
        matmul_weight_count: in matrices that a token is multiplied with.
        layers: of the model.
        vocab_size: entries of its vocabulary, which count where the machine was measured.
        concurrent_requests: requests decoded together.
        precision: of the weights, by which a measurement of this machine is chosen.
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
        )
    key = (ENGINES[engine].fitted_speeds_engine, get_serving_fit_hardware_key(gpu))
    if key not in DECODING or not gpu.rates or not gpu.bandwidth:
        return None
    decoding, prefill = DECODING[key], PREFILL[key]
    prompt_seconds = 2 * matmul_weight_count / (prefill.rate_share * gpu.rates[prefill.rate_dtype])
    # Decoded together, requests share the reading of the weights, until their arithmetic takes longer.
    read_seconds = (weight_bytes_per_token + cached) / (decoding.bandwidth_share * gpu.bandwidth)
    seconds = max(read_seconds, concurrent_requests * prompt_seconds) + layers * decoding.layer_s
    return ServingSpeed(
        Interval(*(end / seconds for end in decoding.spread)),
        Interval(*(end / prompt_seconds for end in prefill.spread)),
        "published" if decoding.fitted_run_count and prefill.fitted_run_count else "guessed",
    )
