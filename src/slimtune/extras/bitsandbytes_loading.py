"""Bases quantized by bitsandbytes.

    nf4    4 bits per value, a scale per 64 values, the scales in 8 bits (double quantization): 4.13 bits
    int8   8 bits per value, a scale per row

Linear layers are quantized, and in nf4 the stacked experts of a mixture (`nf4_experts.py`): the head, what is tied to
it, embeddings and norms keep the base's dtype, in which every layer computes.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from ..core.foundation.dtype_names import dtype_name
from ..core.models.quantization import LoadOptions, require_bitsandbytes_installed
from ..errors import UsageError, format_names

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANGED_IN_TRAINING = {"gemma3n": r".*\.altup", "gemma3n_text": r".*\.altup"}
"""Names of modules, as a pattern, whose weights a family's code clamps in place as it trains, by the config's type."""


def list_modules_not_quantized(config: PreTrainedConfig) -> list[str]:
    """Return patterns of names of modules that keep the base's dtype beside the head; usually none."""
    pattern = _CHANGED_IN_TRAINING.get(config.model_type)
    return [pattern] if pattern else []


def make_load_options(
    config: PreTrainedConfig, quantization: str, is_stored: bool, dtype: torch.dtype, device: torch.device
) -> LoadOptions:
    """Return the arguments of `from_pretrained` for a base in "nf4", "int8" or, stored, "fp4"."""
    if dtype not in _COMPUTE_DTYPES:
        names = format_names(dtype_name(d) for d in _COMPUTE_DTYPES)
        raise UsageError(f"a base in {quantization} cannot compute in {dtype_name(dtype)}", names)
    require_bitsandbytes_installed(f"a base in {quantization}")
    options: LoadOptions = {"device_map": {"": device}}
    others = list_modules_not_quantized(config)
    skipped = ["lm_head", *others] if others else None  # None: transformers finds the head, and what is tied to it
    if not is_stored and quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    elif not is_stored:
        from .nf4_quantizer import NF4_WITH_EXPERTS

        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
        options["quantization_config"] = settings
        settings.quant_method = NF4_WITH_EXPERTS  # type: ignore[assignment]
    elif quantization != "int8":
        stored_settings: Any = config.quantization_config
        stored_settings["bnb_4bit_compute_dtype"] = dtype_name(dtype)
    return options


def prevent_cpu_weight_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU in a way that would be wrong or fail.

    On CPUs with AVX-512 BF16, bitsandbytes repacks a layer's weight for a faster kernel when the layer first runs in
    evaluation mode. That rounds to bf16 whatever the layer computes in, and fails if a row is not a whole number of
    blocks or the number of rows is not a multiple of 32.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            whole = layer.in_features % layer.weight.quant_state.blocksize == 0 and layer.out_features % 32 == 0
            layer.support_avx512bf16_for_cpu = whole and layer.compute_dtype == torch.bfloat16
