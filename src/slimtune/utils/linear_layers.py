"""The frozen maps of a base, read the same way whatever keeps them: Linear, Conv1D, Embedding, NF4, int8."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def layer_kind(module: nn.Module) -> Literal["linear", "embedding", "norm"] | None:
    """Return what kind of map `module` is, None where it is none of them."""
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = module._parameters.get("weight")
    is_norm = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
    return "norm" if is_norm else None


def is_plain_forward(run: Any) -> bool:
    """Return whether `run`, a partial, is nothing but the product with an unquantized weight and the bias."""
    return getattr(run, "func", None) in (nn.Linear.forward, Conv1D.forward)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module keeps its weight as `(in, out)`, as Conv1D and Embedding do."""
    return isinstance(module, Conv1D | nn.Embedding)


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """Return `(in_features, out_features)` of a map; a norm's are both its width."""
    if isinstance(module, nn.Linear):  # a quantized weight's shape says nothing
        return module.in_features, module.out_features
    weight: Any = module.weight
    return (weight.shape[0], weight.shape[-1])


def get_weight(module: nn.Module) -> Tensor:
    """Return a map's weight as `(out, in)`, dequantized where it is quantized; a norm's as `(width,)`.

    A plain weight is returned as a view, not a copy.
    """
    unpacked = getattr(module, "dequantized", None)
    if unpacked is not None:  # a plan's stand-in for a quantized layer
        return unpacked()
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*dequantize_layout(weight.data, state))
    scales = getattr(weight, "SCB", None)
    if scales is None and getattr(module, "state", None) is not None:
        scales = getattr(module.state, "SCB", None)
    if scales is not None:
        # int8 rows times their largest magnitude over 127: what `int8_vectorwise_dequant` does.
        return weight.data.to(torch.float32) * (scales.view(-1, 1) / 127)
    return weight.t() if is_transposed(module) else weight


def dequantize_layout(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return NF4 data and state as `dequantize_4bit` reads them; on some CPUs bitsandbytes lays them out anew."""
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)  # the inverse writes into it
    state.absmax, state.original_nested = state.absmax.t().reshape(-1).float(), False
    return _convert_weight_packed_for_cpu_inverse(data, state)


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module's weight is kept in fewer bits than a float has."""
    weight = getattr(module, "weight", None)
    # 4-bit values may lie in a tensor that calls itself bf16, for FSDP.
    packed = getattr(weight, "quant_state", None) is not None
    return isinstance(weight, Tensor) and (packed or not weight.dtype.is_floating_point)
