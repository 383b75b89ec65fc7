"""Products with frozen float32 weights on a CPU, by the library that is the faster one there.

torch multiplies float32 on x86 with MKL, which computes in vectors of 256 bits on processors by AMD. oneDNN, which
comes with torch as well and multiplies its 16 bits, uses the 512 bits of a Zen 5: up to 3 times as fast
(`benchmarks/frozen_product.py`). On all other hardware, and in any other dtype, these are torch's own products; so are
those of a model that was not loaded by slimtune, which keeps its own bits when an adapter is attached.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from ..foundation.cpu import read_amd_family

ZEN_5 = 26
"""AMD's number of the family; a Zen 4 computes 512 bits as twice 256."""


def multiply_by_weight(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + b`, `(..., out)`, for `x (..., in)`, `weight (out, in)` and `bias (out)`; without a gradient."""
    if _is_faster_in_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def multiply_by_transposed_weight(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `g W (n, in)`, the gradient of `x` above, for `grad (n, out)`; in `out` if that is given."""
    if not _is_faster_in_onednn(grad, weight):
        return torch.mm(grad, weight, out=out)
    found = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
    return found if out is None else out.copy_(found)


class FrozenLinear(nn.Linear):
    """A linear layer of a base: `y = x Wᵀ + b`, by these products while neither weight nor bias trains."""

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear has
        """Return `y (..., out)` of `input (..., in)`."""
        weight, bias = self.weight, self.bias
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        is_changed = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        if trains or is_changed or not _is_faster_in_onednn(input, weight):
            return F.linear(input, weight, bias)
        if not torch.is_grad_enabled():
            return multiply_by_weight(input, weight, bias)
        return _FrozenProduct.apply(input, weight, bias)

    def _get_name(self) -> str:
        return nn.Linear.__name__


def use_faster_frozen_products(model: nn.Module) -> None:
    """Let a base's linear layers be computed by `FrozenLinear`, where that is faster; their parameters stay theirs."""
    for module in model.modules() if _has_slow_mkl() else ():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = FrozenLinear
            module.weight.runs_in_onednn = True  # type: ignore[attr-defined]


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return multiply_by_weight(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        found = multiply_by_transposed_weight(grad.reshape(-1, grad.shape[-1]), weight)
        return found.view(*grad.shape[:-1], weight.shape[1]), None, None


def _is_faster_in_onednn(x: Tensor, weight: Tensor) -> bool:
    if not getattr(weight, "runs_in_onednn", False):  # first: it is all that other hardware pays for
        return False
    is_plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return is_plain and x.dim() > 1 and not isinstance(x, FakeTensor)


@cache
def _has_slow_mkl() -> bool:
    family = read_amd_family()
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and family >= ZEN_5 and torch.backends.cpu.get_cpu_capability() == "AVX512"
