"""Bases in NF4 and int8 without bitsandbytes: layers that hold and take what its layers do, and compute nothing.

    nf4         n/2 bytes, a scale for every 64 values, and for every 256 of those scales, one byte each, an fp32 scale
    nf4-single  n/2 bytes and an fp32 scale for every 64 values: without the second quantization
    int8        n bytes and an fp32 scale for every row

bitsandbytes' own layers quantize real weights, so they build neither on meta nor of fake tensors. What these allocate
was read from bitsandbytes 0.50: autograd/_functions.py and backends/cuda/ops.py, backends/cpu/ops.py for a CPU. They
compute in the base's dtype, as with `bnb_4bit_compute_dtype` set to it (transformers' default is fp32).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, UsageError, format_names, nearest
from ..models.quantization import STORED, stored_quantization, stored_twice
from ..utils.linear_layers import layer_sizes
from ..utils.simulated_device import device_type

BLOCK, BLOCK_OF_SCALES = 64, 256
OUTLIER = 6.0
"""Inputs from which on int8 goes aside (transformers' `llm_int8_threshold`)."""

# PyTorch counts no operations of an integer product.
flop_registry.setdefault(torch.ops.aten._int_mm, flop_registry[torch.ops.aten.mm])


class Params4bit(nn.Parameter):
    """Two values a byte. Of bitsandbytes' name, by which `adapt.quantized.values_in` counts values, not bytes."""


class Linear4bit(nn.Linear):
    """`y = x Wᵀ + b`, W unpacked for each product: `(..., in)` to `(..., out)`."""

    dtype: torch.dtype
    twice: bool
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    def pack(self, *, twice: bool) -> None:
        """Hold what the weight that is there takes when it is quantized; `twice`: its scales, too."""
        new, values = partial(torch.empty, dtype=torch.float32, device=self.weight.device), self.weight.numel()
        scales = _ceil(values, BLOCK)
        self.dtype, self.twice = self.weight.dtype, twice
        self.weight = Params4bit(new(_ceil(values, 2), 1, dtype=torch.uint8), requires_grad=False)
        self.code = new(16)
        self.absmax = new(scales, dtype=torch.uint8 if twice else torch.float32)
        if twice:
            self.nested_absmax, self.nested_code = new(_ceil(scales, BLOCK_OF_SCALES)), new(256)
            self.offset = new(())

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _By4bit.apply(x.to(self.dtype), bias, self).to(x.dtype)

    def dequantized(self) -> Tensor:
        """Return W `(out, in)` as `dequantize_4bit` does."""
        scales = self.scales()
        if self.twice:
            scales += self.offset
        return self.values(scales)

    def scales(self) -> Tensor:
        """Return the scales in fp32, `(n/64)`; before their mean is added, where they were quantized too."""
        return self.absmax.new_empty(self.absmax.shape, dtype=torch.float32) if self.twice else self.absmax

    def values(self, scales: Tensor) -> Tensor:
        """Return W `(out, in)`."""
        del scales  # the caller's lie beside it meanwhile
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)


class _By4bit(torch.autograd.Function):
    # Small products run in one kernel on a GPU, without W: for how many tokens hangs on the card and the shape (some
    # hundred, never more than 1536). The backward pass always unpacks W.

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype  # x is not kept
        scales = layer.scales()
        # Both lie there until the product is made (on a CPU, the sum alone).
        shifted = scales + layer.offset if layer.twice else scales
        return F.linear(x, layer.values(shifted), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_bias, _ = ctx.needs_input_grad
        gb = grad.sum(0, dtype=ctx.bias_dtype) if for_bias else None
        return grad @ ctx.layer.dequantized().to(grad.dtype) if for_x else None, gb, None


class Linear8bit(nn.Linear):
    """`y = x Wᵀ + b`, on a GPU a product of integers, x rounded as W is: `(..., in)` to `(..., out)`."""

    row_scales: Tensor

    def pack(self) -> None:
        """Hold what the weight that is there takes when it is quantized."""
        sizes, device = (self.out_features, self.in_features), self.weight.device
        self.weight = nn.Parameter(torch.empty(sizes, dtype=torch.int8, device=device), requires_grad=False)
        self.row_scales = torch.empty(sizes[0], dtype=torch.float32, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _By8bit.apply(x, bias, self)

    def dequantized(self) -> Tensor:
        """Return W `(out, in)` in fp32, as `ops.maps.weight_of` makes it of bitsandbytes' layer."""
        return self.weight.float() * (self.row_scales.view(-1, 1) / 127)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Return W `(out, in)` as the passes make it."""
        weight, steps = self.weight.to(dtype, copy=True), self.row_scales.unsqueeze(1).mul(1 / 127)
        if device_type(weight.device) == "cpu" and dtype != steps.dtype:
            # What `mul_` of two dtypes takes there: an fp32 copy and an fp32 product.
            return weight.copy_(weight.float() * steps)
        return weight.mul_(steps)


class _By8bit(torch.autograd.Function):
    # Columns of x with an outlier are kept once more, in x's dtype. How many hangs on the values (about 0.1 %, says
    # https://arxiv.org/abs/2208.07339), so they are not counted. Without gradients bitsandbytes rounds x on a CPU, too;
    # here W is unpacked there, as in training.

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear8bit) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        # An attribute, as in bitsandbytes, and not `save_for_backward`: so checkpointing does not give x up, and it
        # stays until the loss is gone.
        ctx.x = x
        if device_type(x.device) == "cpu":
            return F.linear(x, layer.rounded(x.dtype), bias)
        rounded = _rounded_rows(x.reshape(-1, layer.in_features))
        sums = torch._int_mm(rounded[0], layer.weight.t())
        y = sums.to(torch.float16)
        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_bias, _ = ctx.needs_input_grad
        gb = grad.sum(0, dtype=ctx.bias_dtype) if for_bias else None
        if not for_x:
            return None, gb, None
        g, weight = grad.reshape(-1, grad.shape[-1]).contiguous(), ctx.layer.rounded(ctx.x.dtype)
        return (g.to(ctx.x.dtype) @ weight).view(ctx.x.shape), gb, None


KINDS: dict[str, tuple[Any, dict[str, bool]]] = {
    "nf4": (Linear4bit, {"twice": True}),
    "nf4-single": (Linear4bit, {"twice": False}),
    "int8": (Linear8bit, {}),
}


def quantization_kind(config: PreTrainedConfig, asked: str | None = None) -> str | None:
    """Return the one of `KINDS` that a base will be held in: what is asked for, else what its checkpoint is stored in.

    Raises:
        UsageError: the checkpoint contradicts what is asked for.
        ModelError: it is stored in another library's way, of which nothing is known here.
    """
    stored = stored_quantization(config)
    if stored is None:
        return asked
    if asked not in (None, stored):
        raise UsageError(f"the checkpoint is stored in {stored}, and {asked} was asked for", f"{stored}, or nothing")
    if stored not in STORED:
        raise ModelError(
            f"the checkpoint is stored in {stored}, which is not planned", f"16 or 32 bits, {format_names(STORED)}"
        )
    once = stored != "int8" and not stored_twice(config)
    return "nf4-single" if once else "nf4" if stored == "fp4" else stored  # fp4 takes what nf4 does


def quantize(model: Any, kind: str) -> None:
    """Quantize a model's linear layers in place, those that transformers' BitsAndBytesConfig would: no head, none tied.

    Do it before a method is attached. The model computes nothing afterwards: its outputs have their shapes alone.
    Experts that a model keeps as one 3-D parameter stay as they are, as they do there.

    Args:
        model: a transformers model on meta, in the dtype it computes in.
        kind: one of `KINDS`.

    Raises:
        UsageError: the kind is unknown, or the model has no layer to quantize.
    """
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no quantization{nearest(kind, KINDS)}", f"one of {format_names(KINDS)}")
    # With them comes bitsandbytes, where it is installed.
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    found = 0
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, left):
            found += 1
            layer: Any = module
            sizes = layer_sizes(layer)
            layer.__class__, settings = KINDS[kind]
            layer.in_features, layer.out_features = sizes
            layer.pack(**settings)
    if not found:
        raise UsageError(
            f"a {type(model).__name__} has no linear layer that could be kept in {kind}",
            "linear layers beside the head",
            "leave out the quantization",
        )


def _rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x `(m, in)` in int8 and its rows' scales `(m)`, taking what looking for outliers takes."""
    half = x.to(torch.float16)
    scales, rows = half.new_empty(len(half), dtype=torch.float32), half.new_empty(half.shape, dtype=torch.int8)
    (half.abs() >= OUTLIER).any()
    return rows, scales


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
