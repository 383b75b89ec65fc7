"""The stacked experts of a mixture in NF4, quantized as they are loaded.

bitsandbytes and transformers quantize linear layers alone, so the experts of a mixture, its largest part, would stay in
16 bits. Here each expert is quantized by bitsandbytes' own functions as its `Linear4bit` would be:

    codes    4 bits for each value, in NF4
    absmax   the scale of every 64 values, minus their mean, in 8 bits
    nested   the fp32 scale of every 256 of those
    offset   the fp32 mean

Values are padded to whole blocks of 64, scales to whole blocks of 256, so that experts can be taken apart.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantized_weight import QuantizedWeight, WeightFormat

BLOCK, SCALE_BLOCK = 64, 256


class Nf4Format(WeightFormat):
    """Double-quantized NF4; see the top of this file."""

    def dequantize(self, packed: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weights `(experts, m, n)` in a dtype."""
        experts, values = shape[0], shape[1] * shape[2]
        blocks = -(-values // BLOCK)
        scales = self._dequantize_scales(packed).view(experts, -1)[:, :blocks]
        scales = (scales + packed["offset"]).flatten()
        known = dtype if dtype.itemsize < 8 else torch.float32  # bitsandbytes does not know float64
        weight = self._dequantize_values(packed, scales, torch.Size((experts, blocks * BLOCK)), known)
        return weight[:, :values].reshape(shape).to(dtype)

    def _dequantize_scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        from bitsandbytes import functional as bnb

        if "dynamic" not in bnb.name2qmap:
            bnb.name2qmap["dynamic"] = bnb.create_dynamic_map()
        code = bnb.name2qmap["dynamic"].to(packed["absmax"].device)
        state = bnb.QuantState(packed["nested"].flatten(), code=code, blocksize=SCALE_BLOCK, dtype=torch.float32)
        return bnb.dequantize_blockwise(packed["absmax"].flatten(), state)

    def _dequantize_values(
        self, packed: Mapping[str, Tensor], scales: Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        from bitsandbytes import functional as bnb

        # A row of its own for each expert: on a CPU, rows that are no multiple of 64 values are dequantized wrongly.
        state = bnb.QuantState(scales, shape, None, BLOCK, quant_type="nf4", dtype=dtype)
        return bnb.dequantize_4bit(packed["codes"].reshape(-1, 1), state)


NF4 = Nf4Format()


def quantize_experts_to_nf4(weight: Tensor) -> QuantizedWeight:
    """Quantize experts `(experts, m, n)` in float32, bfloat16 or float16, each as a matrix of its own."""
    from bitsandbytes import functional as bnb

    each: dict[str, list[Tensor]] = {"codes": [], "absmax": [], "nested": [], "offset": []}
    for expert in weight.detach().flatten(1):
        values, state = bnb.quantize_4bit(F.pad(expert, (0, -len(expert) % BLOCK)), blocksize=BLOCK, quant_type="nf4")
        offset = state.absmax.mean(0, keepdim=True)
        scales = F.pad(state.absmax - offset, (0, -len(state.absmax) % SCALE_BLOCK))
        absmax, nested = bnb.quantize_blockwise(scales, blocksize=SCALE_BLOCK)
        for name, tensor in zip(each, (values.flatten(), absmax, nested.absmax, offset), strict=True):
            each[name].append(tensor)
    packed = {name: torch.stack(tensors) for name, tensors in each.items()}
    return QuantizedWeight(packed, NF4, tuple(weight.shape[1:]), weight.dtype)


def is_expert_parameter(model: nn.Module, name: str) -> bool:
    """Return whether a parameter contains the stacked weights of several experts."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = owner._parameters.get(leaf)
    return parameter is not None and parameter.dim() == 3 and "expert" in f"{module} {type(owner).__name__}".lower()
