"""NF4 and int8 weights without bitsandbytes: they allocate what its layers allocate, and compute nothing.

    nf4         n/2 bytes, a one-byte scale for every 64 values, an fp32 scale for every 256 of those scales
    nf4-single  n/2 bytes and an fp32 scale for every 64 values: no second quantization
    int8        n bytes and an fp32 scale for every row

The stacked experts of a mixture have their real class and products (`extras/quantized_weight.py`); only bitsandbytes'
functions are replaced, and tokens are spread evenly over the experts.

The layers of bitsandbytes quantize real weights, so they can be built neither on meta nor of fake tensors. What these
allocate follows bitsandbytes 0.50: autograd/_functions.py, backends/cuda/ops.py and, for a CPU, backends/cpu/ops.py.
They compute in the base's dtype, as with `bnb_4bit_compute_dtype` set to it (the default of transformers is fp32).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..core.foundation.device import get_real_or_simulated_device_type
from ..core.kernels.linear_layers import get_in_and_out_features
from ..core.models.quantization import KINDS as LOADED
from ..core.models.quantization import get_quantization_settings, get_stored_quantization
from ..errors import ModelError, UsageError, format_names, suggest
from ..extras.bitsandbytes_loading import list_modules_not_quantized
from ..extras.integer_checkpoints import METHODS, IntegerCheckpoint, read_integer_checkpoint
from ..extras.mxfp4_experts import Mxfp4Format
from ..extras.nf4_experts import BLOCK, SCALE_BLOCK, Nf4Format, is_expert_parameter
from ..extras.quantized_weight import QuantizedLinear, QuantizedWeight
from ..extras.stored_quantizations import DEQUANTIZED

STORED = (*LOADED, "fp4")
"""Quantizations in which bitsandbytes can store a checkpoint."""
OUTLIER = 6.0
"""Inputs of at least this size are multiplied separately by int8 (`llm_int8_threshold` of transformers)."""

flop_registry.setdefault(torch.ops.aten._int_mm, flop_registry[torch.ops.aten.mm])  # torch has no entry for it


class Params4bit(nn.Parameter):
    """Two values in a byte; `count_parameter_values` knows bitsandbytes' parameters by this name."""


class FakeLinear4bit(nn.Linear):
    """`y = x Wᵀ + b` for x `(..., in)`; W is dequantized for each product."""

    keeps_input = False
    dtype: torch.dtype
    nested: bool
    absmax: Tensor
    offset: Tensor

    def pack(self, *, nested: bool) -> None:
        """Replace the weight by what its quantized form takes; `nested`: its scales are quantized, too."""
        new = partial(torch.empty, dtype=torch.float32, device=self.weight.device)
        values = self.weight.numel()
        scales = -(-values // BLOCK)
        self.dtype, self.nested = self.weight.dtype, nested
        self.weight = Params4bit(new(-(-values // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.code = new(16)
        self.absmax = new(scales, dtype=torch.uint8 if nested else torch.float32)
        if nested:
            self.nested_absmax, self.nested_code = new(-(-scales // SCALE_BLOCK)), new(256)
            self.offset = new(())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _Matmul.apply(x.to(self.dtype), bias, self).to(x.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # On a GPU bitsandbytes multiplies a few tokens (some hundred, at most 1536) without dequantizing W; that is
        # not modelled. All tables of scales live until the product is made.
        scales = self._scales()
        shifted = scales + self.offset if self.nested else scales  # noqa: F841
        return F.linear(x, self._values(), bias)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W `(out, in)` as `dequantize_4bit` does, by default in the dtype it computes in."""
        scales = self._scales()
        if self.nested:
            scales += self.offset
        return self._values().to(dtype or self.dtype)

    def _scales(self) -> Tensor:
        return self.absmax.new_empty(self.absmax.shape, dtype=torch.float32) if self.nested else self.absmax

    def _values(self) -> Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)


class FakeLinear8bitLt(nn.Linear):
    """`y = x Wᵀ + b` for x `(..., in)`; on a GPU a product of integers, with x rounded as W is."""

    keeps_input = True
    row_scales: Tensor

    def pack(self) -> None:
        """Replace the weight by what its quantized form takes."""
        sizes, device = (self.out_features, self.in_features), self.weight.device
        self.weight = nn.Parameter(torch.empty(sizes, dtype=torch.int8, device=device), requires_grad=False)
        self.row_scales = torch.empty(sizes[0], dtype=torch.float32, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return _Matmul.apply(x, None if self.bias is None else self.bias.to(x.dtype), self)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # Columns of x with an outlier are kept once more, in x's dtype. How many depends on the values (about 0.1 %,
        # https://arxiv.org/abs/2208.07339), so they are not counted. On a CPU bitsandbytes dequantizes W in training.
        if get_real_or_simulated_device_type(x.device) == "cpu":
            return F.linear(x, self.dequantized(x.dtype), bias)
        half = x.reshape(-1, self.in_features).to(torch.float16)
        scales = half.new_empty(len(half), dtype=torch.float32)  # noqa: F841 (lives until the end of the product)
        rounded = half.new_empty(half.shape, dtype=torch.int8)
        (half.abs() >= OUTLIER).any()
        del half
        sums = torch._int_mm(rounded, self.weight.t())
        y = sums.to(torch.float16)
        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W `(out, in)` as in the forward pass; by default in fp32, as `get_dequantized_weight` does."""
        if dtype is None:
            return self.weight.float() * (self.row_scales.view(-1, 1) / 127)
        weight, steps = self.weight.to(dtype, copy=True), self.row_scales.unsqueeze(1).mul(1 / 127)
        if get_real_or_simulated_device_type(weight.device) == "cpu" and dtype != steps.dtype:
            # On a CPU `mul_` of two dtypes takes an fp32 copy and an fp32 product.
            return weight.copy_(weight.float() * steps)
        return weight.mul_(steps)


class FakeNf4Format(Nf4Format):
    """Experts in NF4, dequantized to new tensors without values."""

    def _dequantize_scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        return packed["absmax"].new_empty(packed["absmax"].numel(), dtype=torch.float32)

    def _dequantize_values(
        self, packed: Mapping[str, Tensor], scales: Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        return scales.new_empty(shape, dtype=dtype)


class FakeQuantizedWeight(QuantizedWeight):
    """A packed weight whose experts have the same number of tokens: which token goes where is not known to a plan."""

    def list_group_ends(self, offs: Tensor, rows: int) -> list[int]:
        return [rows * (expert + 1) // len(offs) for expert in range(len(offs))]


def fake_mxfp4_experts(weight: Tensor) -> FakeQuantizedWeight:
    """Return experts `(experts, in, out)` in MXFP4, without values."""
    experts, into, out = weight.shape
    new = partial(torch.empty, dtype=torch.uint8, device=weight.device)
    packed = {"blocks": new(experts, out, into // 32, 16), "scales": new(experts, out, into // 32)}
    return FakeQuantizedWeight(packed, Mxfp4Format(), (out, into), weight.dtype, is_transposed=True)


def fake_nf4_experts(weight: Tensor) -> FakeQuantizedWeight:
    """Return experts `(experts, m, n)` in double-quantized NF4, without values."""
    experts, values = len(weight), weight[0].numel()
    blocks = -(-values // BLOCK)
    scale_blocks = -(-blocks // SCALE_BLOCK)
    new = partial(torch.empty, dtype=torch.float32, device=weight.device)
    packed = {
        "codes": new(experts, blocks * BLOCK // 2, dtype=torch.uint8),
        "absmax": new(experts, scale_blocks * SCALE_BLOCK, dtype=torch.uint8),
        "nested": new(experts, scale_blocks),
        "offset": new(experts, 1),
    }
    return FakeQuantizedWeight(packed, FakeNf4Format(), tuple(weight.shape[1:]), weight.dtype)


def fake_integer_weight(weight: Tensor, stored: IntegerCheckpoint) -> FakeQuantizedWeight:
    """Return a weight `(out, in)`, or of experts `(experts, out, in)`, in GPTQ or AWQ, without values."""
    *experts, out, into = weight.shape
    count, groups = experts[0] if experts else 1, stored.count_groups(into)
    packed = {
        name: torch.empty(count, *shape, dtype=torch.float16 if name == "scales" else torch.int32, device=weight.device)
        for name, shape in stored.format.list_shapes(into, out, groups).items()
    }
    if groups > 1 and (stored.desc_act or into % groups):
        packed["g_idx"] = torch.empty(count, into, dtype=torch.int32, device=weight.device)
    how = {"is_single": not experts, "is_transposed": True}
    return FakeQuantizedWeight(packed, stored.format, (into, out), weight.dtype, **how)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FakeLinear4bit | FakeLinear8bitLt) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        # int8 keeps its input, as in bitsandbytes in an attribute and not by `save_for_backward`: gradient
        # checkpointing does not drop it, and it lives until the loss does.
        ctx.x = x if layer.keeps_input else None
        return layer.multiply(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad @ ctx.layer.dequantized(grad.dtype) if ctx.needs_input_grad[0] else None, grad_bias, None


KINDS: dict[str, tuple[Any, dict[str, bool]]] = {
    "nf4": (FakeLinear4bit, {"nested": True}),
    "nf4-single": (FakeLinear4bit, {"nested": False}),
    "int8": (FakeLinear8bitLt, {}),
}
EXPERTS_ONLY = ("mxfp4",)
"""Quantizations of checkpoints whose stacked experts alone are packed."""


def resolve_quantization_kind(config: PreTrainedConfig, requested: str | None = None) -> str | None:
    """Return the one of `KINDS`, `EXPERTS_ONLY` or `METHODS` that a base is loaded in: requested, or its checkpoint's.

    Raises:
        UsageError: the checkpoint contradicts the request.
        ModelError: the checkpoint is quantized by another library.
    """
    stored = get_stored_quantization(config)
    if stored is None:
        return requested
    if requested not in (None, stored):
        raise UsageError(f"the checkpoint is stored in {stored}, not in {requested}", f"{stored}, or nothing")
    if stored in EXPERTS_ONLY:
        return stored
    if stored in DEQUANTIZED:
        return None
    settings = get_quantization_settings(config)
    if stored in METHODS:
        read_integer_checkpoint(stored, settings)
        return stored
    if stored not in STORED:
        expected = f"16 or 32 bits, {format_names((*STORED, *EXPERTS_ONLY, *METHODS, *DEQUANTIZED))}"
        raise ModelError(
            f"the checkpoint is stored in {stored}, which cannot be planned", expected, code="quantized-base"
        )
    if stored != "int8" and not settings.get("bnb_4bit_use_double_quant"):
        return "nf4-single"
    return "nf4" if stored == "fp4" else stored  # fp4 takes what nf4 takes


def fake_quantize_model(model: Any, quantization: str) -> None:
    """Quantize the linear layers of a model in place, those that BitsAndBytesConfig would: no head, none tied.

    Stacked experts are quantized, too, in "nf4", but not those of a checkpoint that is stored in it. Call it before a
    method is attached, on a model on meta.

    Raises:
        UsageError: the kind is none of `KINDS`, or the model has no layer to quantize.
    """
    if quantization not in (*KINDS, *EXPERTS_ONLY, *METHODS):
        raise UsageError(
            f"{quantization!r} is no quantization{suggest(quantization, KINDS)}", f"one of {format_names(KINDS)}"
        )
    is_stored = get_stored_quantization(model.config) is not None
    if quantization in EXPERTS_ONLY or (quantization == "nf4" and not is_stored):
        _fake_quantize_experts(model, fake_nf4_experts if quantization == "nf4" else fake_mxfp4_experts)
    if quantization in KINDS:
        _fake_quantize_layers(model, quantization)
    if quantization in METHODS:
        _fake_pack_integers(model, read_integer_checkpoint(quantization, get_quantization_settings(model.config)))


def _fake_pack_integers(model: Any, stored: IntegerCheckpoint) -> None:
    """Pack stacked experts and linear layers but the head, which is dequantized as it is loaded."""
    _fake_quantize_experts(model, partial(fake_integer_weight, stored=stored))
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and stored.has_layer(name):
            module.__class__ = QuantizedLinear
            module._parameters["weight"] = nn.Parameter(fake_integer_weight(module.weight, stored), requires_grad=False)


def _fake_quantize_experts(model: Any, pack: Callable[[Tensor], FakeQuantizedWeight]) -> None:
    for name, weight in list(model.named_parameters()):
        if is_expert_parameter(model, name):
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = nn.Parameter(pack(weight), requires_grad=False)


def _fake_quantize_layers(model: Any, quantization: str) -> None:
    # Heavy: they import bitsandbytes if it is installed.
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    skipped += list_modules_not_quantized(model.config)
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}
    layers: list[Any] = [module for name, module in linear.items() if should_convert_module(name, skipped)]
    if not layers:
        raise UsageError(f"a {type(model).__name__} has no linear layer beside its head to quantize to {quantization}")
    cls, settings = KINDS[quantization]
    for layer in layers:
        sizes = get_in_and_out_features(layer)
        layer.__class__ = cls  # the layer keeps its name and its place in the model; only its weight changes
        layer.in_features, layer.out_features = sizes
        layer.pack(**settings)
