"""The formats in which engines hold weights and caches: one entry says all that planning knows of a format.

A GGUF file type has bits per weight for each kind of matrix, made without an importance matrix; averages are fitted to
the bases of models/known. It imports no torch.
"""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..core.foundation.formatting import GIB
from ..core.foundation.json_results import from_json_dict
from .interval import Interval


@dataclass(frozen=True)
class GgufType:
    """A file type of GGUF."""

    bits: float
    """Per weight of most matrices."""
    value_down_bits: float = 0.0
    """Of `attn_v` and `ffn_down`, which llama.cpp gives more bits in some layers; 0: as of the others."""
    fallback_bits: float = 0.0
    """Of matrices whose rows are no multiple of 256, for which it falls back to older types; 0: the same."""
    value_down_fallback_bits: float = 0.0
    """Of `attn_v` and `ffn_down` with such rows; 0: the same."""
    expert_bits: float = 0.0
    """Of the experts of a mixture; 0: as of its other matrices."""
    measured_like: str = ""
    """The type that `slimtune bench` measures whose kernels are most like this one's; "": this one is measured."""

    def bits_of(self, *, value_down: bool, whole_blocks: bool) -> float:
        """Return the bits per weight of a matrix; `whole_blocks`: its rows are a multiple of 256."""
        if value_down:
            return (self.value_down_bits if whole_blocks else self.value_down_fallback_bits) or self.bits
        return (self.bits if whole_blocks else self.fallback_bits) or self.bits


GGUF_TYPES = {
    "F32": GgufType(32.0, measured_like="F16"),
    "F16": GgufType(16.0),
    "BF16": GgufType(16.0, measured_like="F16"),
    "Q8_0": GgufType(8.5),
    "MXFP4": GgufType(8.5, expert_bits=4.25, measured_like="Q4_0"),
    "Q5_1": GgufType(6.0, measured_like="Q4_1"),
    "Q5_0": GgufType(5.5, measured_like="Q4_0"),
    "Q4_1": GgufType(5.0),
    "Q4_0": GgufType(4.5),
    "Q6_K": GgufType(6.5625, 6.5625, 8.5, 8.5, measured_like="Q4_K_M"),
    "Q5_K_M": GgufType(5.5, 6.01, 6.0, 7.25, measured_like="Q4_K_M"),
    "Q5_K_S": GgufType(5.5, 5.5, 6.0, 6.0, measured_like="Q4_K_M"),
    "Q4_K_M": GgufType(4.5, 5.50, 5.5, 7.01),
    "Q4_K_S": GgufType(4.5, 4.65, 5.5, 5.59, measured_like="Q4_K_M"),
    "IQ4_NL": GgufType(4.5, 4.70, 4.5, 4.71, measured_like="Q4_0"),
    "IQ4_XS": GgufType(4.25, 4.50, 4.5, 4.72, measured_like="Q4_K_M"),
    "Q3_K_L": GgufType(3.4375, 6.01, 4.5, 6.55, measured_like="Q4_K_M"),
    "Q3_K_M": GgufType(3.4375, 4.81, 4.5, 5.86, measured_like="Q4_K_M"),
    "Q3_K_S": GgufType(3.4375, 3.47, 4.5, 4.57, measured_like="Q4_K_M"),
    "IQ3_M": GgufType(3.4375, 4.03, 4.5, 4.97, measured_like="Q4_K_M"),
    "IQ3_S": GgufType(3.4375, 3.58, 4.5, 4.57, measured_like="Q4_K_M"),
    "Q2_K": GgufType(2.625, 3.73, 4.5, 4.77, measured_like="Q4_K_M"),
}
"""The file types by llama.cpp's names. MXFP4 is that of gpt-oss: experts in blocks of 32 numbers of 4 bits with a scale
of 8, all else in Q8_0."""
MEASURED_GGUF_TYPES = tuple(name for name, kind in GGUF_TYPES.items() if not kind.measured_like)
"""The file types that `slimtune bench` measures."""
VLLM_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4 + 20 / 128, "nf4": 4.5,
             "mxfp4": 16.0}  # fmt: skip
"""Bits per weight of vLLM's linear layers; embedding and head stay at 16, with mxfp4 all but the experts. int4
is AWQ or GPTQ in groups of 128 (scale and zero point), nf4 bitsandbytes without its second quantization (a 32-bit scale
for 64 weights)."""


MLX_BITS = {"bf16": 16.0, "8bit": 8.5, "6bit": 6.5, "5bit": 5.5, "4bit": 4.5, "mxfp4-q8": 8.5}
"""Bits per weight of MLX's matrices, embeddings and head included: groups of 64 have a scale and an offset of 16 bits.
mxfp4-q8 is that of gpt-oss: experts as published, all else in 8 bits."""
EXPERT_BITS = {"mxfp4": 4.25, "mxfp4-q8": 4.25}
"""Bits per weight of the experts of a mixture in vLLM and MLX, where they are not those of its linear layers."""


@dataclass(frozen=True)
class ServingEngineSpec:
    """What planning knows of an engine."""

    default_precision: str
    """Of the weights by default."""
    supported_precisions: Mapping[str, Any]
    """That it can hold the weights in."""
    bytes_by_cache_precision: dict[str, float]
    """Bytes of a number in the cache of keys and values, by precision; the first is the default."""
    runtime_bytes: Interval
    """Bytes that a CUDA context and libraries take; with vLLM's CUDA graphs, of which logs report 0.3 to 1 GiB."""
    fitted_speeds_engine: str
    """The engine whose fitted speeds it has."""
    unsupported_architectures: tuple[str, ...] = ()
    """Of GPUs that it does not run on."""


_LLAMA_CPP = ServingEngineSpec(
    "Q4_K_M",
    GGUF_TYPES,
    {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32},
    Interval(GIB // 5, 7 * GIB // 10),
    "llama.cpp",
)
_VLLM_RUNTIME = Interval(GIB // 2, 2 * GIB)
ENGINES = {
    "ollama": _LLAMA_CPP,
    "llama.cpp": _LLAMA_CPP,
    "vllm": ServingEngineSpec(
        "bf16",
        VLLM_BITS,
        {"bf16": 2.0, "f16": 2.0, "fp8": 1.0},
        _VLLM_RUNTIME,
        "vllm",
        # It needs compute capability 7.5, or gfx90a, gfx942, gfx950, gfx11 or gfx12 (its page on GPUs, of v0.31).
        unsupported_architectures=("pascal", "volta", "vega20", "rdna2"),
    ),
    "mlx": ServingEngineSpec("4bit", MLX_BITS, {"bf16": 2.0, "f16": 2.0}, Interval(0, 0), "mlx"),
}
"""The engines that serving is planned for."""


def find_published_precision(config: Any, engine: str) -> str | None:
    """Return the precision in which a base's own checkpoint is, if an engine serves it so; None: 16 bits, or not."""
    checkpoint = getattr(config, "quantization_config", None) or {}
    method = checkpoint.get("quant_method") if isinstance(checkpoint, dict) else checkpoint.quant_method
    if config.get_text_config().model_type == "gpt_oss" or method == "mxfp4":
        return {"vllm": "mxfp4", "mlx": "mxfp4-q8"}.get(engine, "MXFP4")
    return "fp8" if method == "fp8" and engine == "vllm" else None


def find_precision_with_similar_kernels(precision: str, measured: Container[str]) -> str | None:
    """Return the measured precision that is a precision itself or has the most similar kernels; None: none is."""
    alike = GGUF_TYPES[precision].measured_like if precision in GGUF_TYPES else ""
    return next((name for name in (precision, alike) if name in measured), None)


@dataclass(frozen=True)
class VllmLoraRules:
    """What vLLM's classes declare about LoRA."""

    version: str
    """Of vLLM."""
    ranks: tuple[int, ...]
    """Possible values of --max-lora-rank, ascending."""
    architectures: dict[str, tuple[str, ...] | None]
    """The embeddings and heads that each accepts adapters on; None if it serves no LoRA."""


@cache
def load_vllm_lora_rules() -> VllmLoraRules:
    """Return the rules of vLLM, as `benchmarks/vllm_ways/facts.py` writes them."""
    text = (files(__package__) / "vllm_rules.json").read_text(encoding="utf-8")
    return from_json_dict(VllmLoraRules, json.loads(text))
