"""Read the layers of a base in one way: Linear, Conv1D, convolutions, Embedding, NF4 and int8."""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .frozen_product import FrozenLinear

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
ReadWeight = nn.MultiheadAttention | NonDynamicallyQuantizableLinear
"""Modules whose weight is read without a call of the module; the second class is that of the first one's `out_proj`."""


def get_base_layer_type(module: nn.Module) -> Literal["linear", "embedding", "conv", "weight", "norm"] | None:
    """Return what kind of layer `module` is, None for other modules."""
    if isinstance(module, ReadWeight):
        return "weight"
    if isinstance(module, nn.Linear | Conv1D):
        return None if hasattr(module, "n_groups") else "linear"  # DeepSeek V4 has one that computes by groups
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = module._parameters.get("weight")
    if isinstance(module, Convolution) and isinstance(weight, Tensor):  # a parametrized one has no such parameter
        return "conv"
    is_norm = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
    return "norm" if is_norm else None


def is_plain_linear_forward(forward_partial: Any) -> bool:
    """Return whether `forward_partial`, a partial, is the forward of an unquantized linear layer and nothing else."""
    return getattr(forward_partial, "func", None) in (nn.Linear.forward, FrozenLinear.forward, Conv1D.forward)


def is_weight_transposed(module: nn.Module) -> bool:
    """Return whether the module stores its weight as `(in, out)`, as Conv1D and Embedding do."""
    return isinstance(module, Conv1D | nn.Embedding)


def get_weight_and_bias_names(module: nn.Module) -> tuple[str, str]:
    """Return the names of a layer's weight and bias."""
    return ("in_proj_weight", "in_proj_bias") if isinstance(module, nn.MultiheadAttention) else ("weight", "bias")


def list_persistent_buffer_names(module: nn.Module) -> list[str]:
    """Return the names of a module's buffers that belong to its state dict, such as a BatchNorm's statistics."""
    hidden = module._non_persistent_buffers_set
    return [n for n, buffer in module._buffers.items() if buffer is not None and n not in hidden]


def get_in_and_out_features(module: nn.Module) -> tuple[int, int]:
    """Return `(in_features, out_features)` of a layer, the sizes of its matrix; both are the width for a norm."""
    if isinstance(module, nn.Linear):  # the shape of a quantized weight is another one
        return module.in_features, module.out_features
    weight: Any = getattr(module, get_weight_and_bias_names(module)[0])
    if isinstance(module, Convolution):
        return weight[0].numel(), weight.shape[0]
    return (
        (weight.shape[-1], weight.shape[0])
        if get_base_layer_type(module) == "weight"
        else (weight.shape[0], weight.shape[-1])
    )


def get_dequantized_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight as `(out, in)`, a norm's as `(width,)`: dequantized, or else a view of it, no copy.

    A convolution's matrix is `(out, in / groups · kernel size)`.
    """
    # An adapted module asks `compat` for a name that it lacks, which torch.compile would trace in every layer.
    if hasattr(type(module), "dequantized"):  # the planner's fake quantized layer
        return module.dequantized()  # type: ignore[operator]
    weight: Any = getattr(module, get_weight_and_bias_names(module)[0])
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*undo_cpu_4bit_repacking(weight.data, state))
    scales = getattr(weight, "SCB", None)
    if scales is None and weight.dtype == torch.int8:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is not None:
        # What bitsandbytes' `int8_vectorwise_dequant` does: rows times their largest magnitude / 127.
        return weight.data.to(torch.float32) * (scales.view(-1, 1) / 127)
    if isinstance(module, Convolution):
        return weight.flatten(1)
    return weight.t() if is_weight_transposed(module) else weight


def undo_cpu_4bit_repacking(data: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
    """Return 4-bit data and state in the layout that `dequantize_4bit` reads; on some CPUs they are repacked."""
    if not getattr(quant_state, "packing_format_for_cpu", False):
        return data, quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    quant_state = copy.copy(quant_state)  # the function below writes into it
    quant_state.absmax, quant_state.original_nested = quant_state.absmax.t().reshape(-1).float(), False
    return _convert_weight_packed_for_cpu_inverse(data, quant_state)


def dequantizes_itself(parameter: object) -> bool:
    """Return whether a parameter holds packed values behind the shape and dtype of plain ones, as stacked experts."""
    return hasattr(type(parameter), "dequantized")


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module's weight is stored in fewer bits than a floating-point number, or its experts are."""
    if any(map(dequantizes_itself, module._parameters.values())):
        return True
    weight = getattr(module, "weight", None)
    # For FSDP, 4-bit values may be stored in a tensor of dtype bf16.
    packed = getattr(weight, "quant_state", None) is not None
    return isinstance(weight, Tensor) and (packed or not weight.dtype.is_floating_point)


def list_quantization_scales(weight: Any) -> list[Tensor]:
    """Return the floating-point scales of a weight that is quantized; none for another weight."""
    state = getattr(weight, "quant_state", None)
    second = getattr(state, "state2", None)  # the scales of 8-bit scales
    tensors = (getattr(weight, "SCB", None), getattr(state, "absmax", None), getattr(state, "offset", None))
    scales = (*tensors, getattr(second, "absmax", None), *getattr(weight, "packed", {}).values())
    return [s for s in scales if isinstance(s, Tensor) and s.is_floating_point()]


def is_finite(tensor: Tensor) -> bool:
    """Return whether a floating-point tensor has no NaN and no Inf; one on the meta device has no values."""
    if tensor.is_meta or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch does not compute in fp8
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor.detach())  # NaN if any value is; 40 times faster than `isfinite` on a CPU
    return math.isfinite(low.item()) and math.isfinite(high.item())
