"""Bases in NF4 and int8: getting one ready to train an adapter on, and counting what it holds.

The adapted layer runs the quantized module as it is and adds to its output, so that methods need not know. What reads
the weight gets it dequantized; merging into it is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..utils.linear_layers import dequantize_layout
from .state_dict import AdapterFiles

_LEFT_AS_THEY_ARE = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base, keep what is not quantized in fp32 and checkpoint its activations; return the same model.

    Call it before an adapter is attached.

    Args:
        model: a transformers model loaded in 4 or 8 bits; any other is frozen and put into fp32.
        use_gradient_checkpointing: checkpoint activations; on a quantized base only.
        gradient_checkpointing_kwargs: passed to `torch.utils.checkpoint`; not reentrant, unless they say so.
        auto_clear_cache: give the memory that the 16-bit copies had back to the GPU.

    Raises:
        UsageError: the model has adapters already, which this would freeze.
    """
    if isinstance(model, AdapterFiles):
        raise UsageError(
            "the model has adapters already, which would be frozen with the base",
            "a base without adapters",
            "prepare_model_for_kbit_training(base) first, then get_peft_model(base, config)",
        )
    model.requires_grad_(False)
    disable_cpu_repacking(find_repacking_layers(model))
    kind = str(getattr(getattr(model, "quantization_method", None), "value", getattr(model, "quantization_method", "")))
    if kind not in _LEFT_AS_THEY_ARE:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and not _is_4_bit(parameter):
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    is_small = kind in _LEFT_AS_THEY_ARE or any(getattr(model, f"is_loaded_in_{n}bit", False) for n in (4, 8))
    if use_gradient_checkpointing and is_small:
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            model.enable_input_require_grads()
        # The name from transformers 5.24 on, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(settings)
    return model


def find_repacking_layers(model: nn.Module) -> list[Any]:
    """Return the 4-bit modules that lay their weight out anew when they first run in evaluation mode.

    bitsandbytes does so on CPUs with AVX-512 BF16. From then on it rounds to bf16, and no gradient passes through the
    module, in training neither: adapters below it would stay as they are, silently.
    """
    return [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]


def disable_cpu_repacking(modules: Iterable[Any]) -> None:
    """Let 4-bit modules keep the layout that gradients pass through; put it back where it was left."""
    for module in modules:
        module.support_avx512bf16_for_cpu = False
        weight = module._parameters["weight"]
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = dequantize_layout(weight.data, weight.quant_state)
            module.quant_state = weight.quant_state


def count_values(parameter: nn.Parameter) -> int:
    """Return how many values a parameter holds: one in 4 bits holds two a byte."""
    return parameter.numel() * (2 * parameter.element_size() if _is_4_bit(parameter) else 1)


def _is_4_bit(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True)
