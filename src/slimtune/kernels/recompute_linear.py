"""A linear layer whose weight is computed from small tensors, and recomputed in the backward pass instead of saved.

    y = x M(p)ᵀ        x (..., in), M(p) (out, in)

Saved for the backward pass: x and the small tensors p. The full weight exists only while the layer runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def recompute_linear(make_weight: Callable[..., Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
    """Return `x make_weight(*tensors)ᵀ` in x's dtype.

    Args:
        make_weight: returns the weight `(out, in)` from `tensors` by differentiable, deterministic operations.
        x: `(..., in)`.
        tensors: what the weight is computed from; other tensors that `make_weight` uses get no gradient.
    """
    return _RecomputeLinear.apply(make_weight, x, *tensors)


class _RecomputeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make_weight: Callable[..., Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.make_weight = make_weight
        ctx.save_for_backward(x, *tensors)
        return F.linear(x, make_weight(*tensors).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            weight = ctx.make_weight(*tensors)
        grad_x = (grad @ weight.detach().to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        grads: list[Tensor] = []
        if any(needed):
            grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)
            inputs = [t for t in tensors if t.requires_grad]
            grads += torch.autograd.grad(weight, inputs, grad_weight.to(weight.dtype))
        return None, grad_x, *(grads.pop(0) if need else None for need in needed)
