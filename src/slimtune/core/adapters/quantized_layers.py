"""Bases in NF4 and int8: their memory layout on CPUs, and counting their parameters.

The adapted layer runs a quantized module as it is and adds to its output, so methods do not have to know. Code that
reads the weight gets it dequantized; merging into it raises an error.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..kernels.linear_layers import undo_cpu_4bit_repacking


def find_cpu_repacking_layers(model: nn.Module) -> list[Any]:
    """Return the 4-bit modules that change their weight's memory layout when they first run in evaluation mode.

    bitsandbytes does so on CPUs with AVX-512 BF16. From then on the module rounds to bf16 and no gradient passes
    through it, also in training: adapters below it would silently stay untrained.
    """
    return [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]


def keep_differentiable_4bit_layout(modules: Iterable[Any]) -> None:
    """Make 4-bit modules keep the layout that gradients pass through; undo the repacking if it has happened."""
    for module in modules:
        module.support_avx512bf16_for_cpu = False
        weight = module._parameters["weight"]
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = undo_cpu_4bit_repacking(weight.data, weight.quant_state)
            module.quant_state = weight.quant_state


def count_trainable_and_all_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (number of trainable parameters, number of all parameters)."""
    counts = [(count_parameter_values(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def count_parameter_values(parameter: nn.Parameter) -> int:
    """Return the number of values in a parameter; a byte of a 4-bit parameter contains two."""
    return parameter.numel() * (2 * parameter.element_size() if is_4_bit(parameter) else 1)


def is_4_bit(parameter: nn.Parameter) -> bool:
    """Return whether a parameter stores 4-bit values of bitsandbytes."""
    return type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True)
