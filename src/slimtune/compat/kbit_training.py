"""PEFT's preparation of a base in NF4 or int8 for training."""

from typing import Any

import torch

from ..core.adapters.peft_model import PeftModel
from ..core.adapters.quantized_layers import find_cpu_repacking_layers, is_4_bit, keep_differentiable_4bit_layout
from ..core.kernels.linear_layers import dequantizes_itself
from ..errors import UsageError

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
    if isinstance(model, PeftModel):
        hint = "prepare_model_for_kbit_training(base) first, then get_peft_model(base, config)"
        raise UsageError("the model already has adapters, which would be frozen with the base", hint=hint)
    model.requires_grad_(False)
    keep_differentiable_4bit_layout(find_cpu_repacking_layers(model))
    quantization = getattr(model, "quantization_method", None)
    keep_dtypes = str(getattr(quantization, "value", quantization)) in _KEEP_DTYPES
    if not keep_dtypes:
        for parameter in model.parameters():
            is_packed = is_4_bit(parameter) or dequantizes_itself(parameter)
            if parameter.dtype in (torch.float16, torch.bfloat16) and not is_packed:
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
