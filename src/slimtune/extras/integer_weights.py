"""Weights in 2, 4 or 8 bits with a scale and a zero point for each group of inputs, as GPTQ and AWQ store them.

    W[i, o] = scale[g, o] · (q[i, o] − zero[g, o])        i: input, o: output, g: the group that i is in

    gptq   qweight  (in · bits / 32, out)    int32: the inputs of one output, from the lowest bits up
           qzeros   (groups, out · bits / 32): outputs; files of the first version store zero − 1
    awq    qweight  (in, out / 8)            int32: eight outputs, in the order 0 2 4 6 1 3 5 7
           qzeros   (groups, out / 8): the same
    both   scales   (groups, out)
           g_idx    (in), GPTQ alone: the group of each input, if inputs were sorted (`desc_act`); else every
                    in / groups inputs that follow one another are a group

Papers: https://arxiv.org/abs/2210.17323, https://arxiv.org/abs/2306.00978.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantized_weight import QuantizedWeight, WeightFormat

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in an int32 of AWQ the outputs 0 to 7 are, in units of 4 bits from the lowest."""


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """How GPTQ or AWQ packs integers; see the top of this file.

    Args:
        method: "gptq" or "awq".
        bits: of one integer, 2, 4 or 8; 4 for AWQ.
    """

    method: str
    bits: int

    def dequantize(self, packed: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the weights `(experts, in, out)` in a dtype; they are computed in fp32 if that is bf16."""
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        scales, zeros = packed["scales"].to(wide), self._unpack(packed["qzeros"]).flatten(-2).to(wide)
        values = self._unpack(packed["qweight"])
        if self.method == "gptq":
            values = values.mT
        values = values.to(wide, memory_format=torch.contiguous_format).view(shape)
        if (g_idx := packed.get("g_idx")) is not None:
            group = g_idx.long().unsqueeze(-1).expand(shape)
            return values.sub_(zeros.gather(1, group)).mul_(scales.gather(1, group)).to(dtype)
        grouped = values.unflatten(1, (scales.shape[1], -1))
        grouped.sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2))
        return values.to(dtype)

    def concatenate(self, packed: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """Return weights with all their outputs, packed as one; None if their inputs are in other groups."""
        first = packed[0]
        joined = {n: torch.cat([p[n] for p in packed], -1) for n in first if n != "g_idx"}
        if "g_idx" not in first:
            return joined
        same = all(torch.equal(p["g_idx"], first["g_idx"]) for p in packed)
        return {**joined, "g_idx": first["g_idx"]} if same else None

    def list_shapes(self, in_features: int, out_features: int, groups: int) -> dict[str, tuple[int, int]]:
        """Return the shapes of the packed tensors of a layer, by name, without `g_idx`."""
        per_int32 = 32 // self.bits
        if self.method == "awq":
            qweight = in_features, out_features // per_int32
        else:
            qweight = in_features // per_int32, out_features
        return {"qweight": qweight, "qzeros": (groups, out_features // per_int32), "scales": (groups, out_features)}

    def _unpack(self, integers: Tensor) -> Tensor:
        """Return `(…, 32 / bits)` integers in bytes for each int32 `(…)`."""
        pieces = integers.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
        if self.bits < 8:
            shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=pieces.device)
            pieces = (pieces.unsqueeze(-1) >> shifts).bitwise_and_(2**self.bits - 1).flatten(-2)
        return pieces[..., AWQ_ORDER] if self.method == "awq" else pieces


def pack_integer_weight(
    tensors: Mapping[str, Tensor], format: IntegerFormat, *, stores_zero_minus_one: bool, dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight `(out, in)` of one layer from the tensors that a checkpoint has for it."""
    packed = dict(tensors)
    if stores_zero_minus_one:  # added to an int32 as it is, as gptqmodel does: what overflows there came from there
        packed["qzeros"] = packed["qzeros"] + sum(1 << shift for shift in range(0, 32, format.bits))
    per_int32 = 1 if format.method == "awq" else 32 // format.bits
    groups, out_features = packed["scales"].shape
    in_features = len(packed["qweight"]) * per_int32
    if (g_idx := packed.pop("g_idx", None)) is not None and not _is_in_order(g_idx, groups):
        packed["g_idx"] = g_idx
    packed = {name: tensor.unsqueeze(0) for name, tensor in packed.items()}
    sizes = in_features, out_features
    return QuantizedWeight(packed, format, sizes, dtype, is_single=True, is_transposed=True)


def _is_in_order(g_idx: Tensor, groups: int) -> bool:
    """Return whether every `in / groups` inputs that follow one another are a group."""
    size, rest = divmod(len(g_idx), groups)
    return not rest and torch.equal(g_idx.long(), torch.arange(groups, device=g_idx.device).repeat_interleave(size))
