"""A linear map whose weight is made from small tensors, and made again for the backward pass instead of kept.

    y = x M(p)^T        x (..., in), M(p) (out, in)

Kept for the backward pass: x and the small tensors p. The weight, of the base's own size, lives for one layer's moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def recompute_linear(make: Callable[..., Tensor], x: Tensor, *given: Tensor) -> Tensor:
    """Return `x make(*given)^T` in x's dtype.

    Args:
        make: makes the weight `(out, in)` from `given` by differentiable steps, the same each time it is called.
        x: `(..., in)`.
        given: what the weight is made from; other tensors that `make` knows get no gradient.
    """
    return _Remade.apply(make, x, *given)


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], x: Tensor, *given: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(x, *given)
        return F.linear(x, make(*given).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *given = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        given = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
        with torch.enable_grad():
            weight = ctx.make(*given)
        to_x = (grad @ weight.detach().to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        found: list[Tensor] = []
        if any(wanted):
            to_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)
            found += torch.autograd.grad(weight, [t for t in given if t.requires_grad], to_weight.to(weight.dtype))
        return None, to_x, *(found.pop(0) if want else None for want in wanted)
