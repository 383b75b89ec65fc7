"""Bases in NF4 and int8: preparing one for training, and counting its parameters.

The adapted layer runs a quantized module as it is and adds to its output, so methods do not have to know. Code that
reads the weight gets it dequantized; merging into it raises an error.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from ..kernels.linear_layers import repack_for_dequantize
from .state_dict import SaveLoadMixin

_KEEP_DTYPES = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base, convert what is not quantized to fp32, enable activation checkpointing; return the same model.

    Call it before an adapter is attached. A base that is not quantized is only frozen and converted.
    `gradient_checkpointing_kwargs` go to `torch.utils.checkpoint`; `use_reentrant` defaults to False.
    `auto_clear_cache` releases the GPU memory of the 16-bit copies.
    """
    if isinstance(model, SaveLoadMixin):
        hint = "prepare_model_for_kbit_training(base) first, then get_peft_model(base, config)"
        raise UsageError("the model already has adapters, which would be frozen with the base", hint=hint)
    model.requires_grad_(False)
    disable_cpu_repacking(find_repacking_layers(model))
    quantization = getattr(model, "quantization_method", None)
    keep_dtypes = str(getattr(quantization, "value", quantization)) in _KEEP_DTYPES
    if not keep_dtypes:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and not _is_4_bit(parameter):
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    quantized = keep_dtypes or any(getattr(model, f"is_loaded_in_{n}bit", False) for n in (4, 8))
    if use_gradient_checkpointing and quantized:
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            model.enable_input_require_grads()
        # transformers 5.24 renamed the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(settings)
    return model


def find_repacking_layers(model: nn.Module) -> list[Any]:
    """Return the 4-bit modules that change their weight's memory layout when they first run in evaluation mode.

    bitsandbytes does so on CPUs with AVX-512 BF16. From then on the module rounds to bf16 and no gradient passes
    through it, also in training: adapters below it would silently stay untrained.
    """
    return [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]


def disable_cpu_repacking(modules: Iterable[Any]) -> None:
    """Make 4-bit modules keep the layout that gradients pass through; undo the repacking if it has happened."""
    for module in modules:
        module.support_avx512bf16_for_cpu = False
        weight = module._parameters["weight"]
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = repack_for_dequantize(weight.data, weight.quant_state)
            module.quant_state = weight.quant_state


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (number of trainable parameters, number of all parameters)."""
    counts = [(count_values(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def count_values(parameter: nn.Parameter) -> int:
    """Return the number of values in a parameter; a byte of a 4-bit parameter contains two."""
    return parameter.numel() * (2 * parameter.element_size() if _is_4_bit(parameter) else 1)


def _is_4_bit(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True)
