"""Stacked experts in MXFP4, as gpt-oss is published: packed as they are stored, dequantized by transformers' function.

blocks   (experts, out, in / 32, 16): two values of 4 bits in a byte
scales   (experts, out, in / 32): a power of two for every 32 values
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .quantized_weight import QuantizedWeight, WeightFormat


class Mxfp4Format(WeightFormat):
    """MXFP4; see the top of this file."""

    def dequantize(self, packed: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weights `(experts, out, in)` in a dtype."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(packed["blocks"], packed["scales"], dtype=dtype).mT


def pack_mxfp4_experts(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """Return experts `(experts, in, out)`, as gpt-oss multiplies by them, from the tensors of a checkpoint."""
    sizes = (blocks.shape[1], blocks.shape[2] * blocks.shape[3] * 2)
    return QuantizedWeight({"blocks": blocks, "scales": scales}, Mxfp4Format(), sizes, dtype, is_transposed=True)
