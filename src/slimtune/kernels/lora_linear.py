"""A frozen linear map with a low-rank update, as one step of autograd.

    y = x Wᵀ + b + s · d(x) Aᵀ Bᵀ          x (..., in), W (out, in), A (r, in), B (out, r), d: dropout

Kept for the backward pass: x itself, which its other readers keep too, and the thin `z = d(x) Aᵀ (..., r)`. Scale and
sum are part of the products; what d left out is drawn again from the random state it was drawn with; A and B may be
kept in fp32 above a 16-bit x, of which no fp32 copy is made. Gradients are those of the plain way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import fork_rng, get_rng_state


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, drop: float = 0.0
) -> Tensor:
    """Return `x Wᵀ + b + s · d(x) Aᵀ Bᵀ`, `(..., out)` in x's dtype.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, frozen.
        bias: `(out)` or None.
        A: `(r, in)`, in any float dtype.
        B: `(out, r)`, likewise.
        scale: s.
        drop: probability of leaving out an input of A; the others are scaled up.
    """
    if _traced_or_autocast(x):
        return plus_low_rank(F.linear(x, weight, bias), x, A, B, scale, drop)
    return _LowRank.apply(x, None, weight, bias, A, B, scale, drop)


def plus_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, drop: float = 0.0) -> Tensor:
    """Return `y + s · d(x) Aᵀ Bᵀ` for `y (..., out)` of whatever map; the rest as in `low_rank_linear`."""
    if not _traced_or_autocast(x):
        return _LowRank.apply(x, y, None, None, A, B, scale, drop)
    # Laid flat before A: it may have no row.
    z = F.linear(F.dropout(x, drop).reshape(-1, x.shape[-1]), A.to(x.dtype))
    return torch.addmm(y.reshape(-1, y.shape[-1]), z, B.to(x.dtype).t(), alpha=scale).view_as(y)


def _traced_or_autocast(x: Tensor) -> bool:
    # A compiler fuses by itself and cannot draw again; autocast chooses dtypes operator by operator.
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        drop: float,
    ) -> Tensor:
        ctx.scale, ctx.drop = scale, drop
        ctx.random = get_rng_state(x.device) if drop else None
        z = _flat(_dropped(x, drop) if drop else x) @ A.to(x.dtype).t()
        if y is None:
            assert weight is not None
            out = F.linear(x, weight, bias)
            _flat(out).addmm_(z, B.to(x.dtype).t(), alpha=scale)
        else:
            out = torch.addmm(_flat(y), z, B.to(y.dtype).t(), alpha=scale).view_as(y)
        for_A, for_B = ctx.needs_input_grad[4:6]
        ctx.shape = x.shape
        # Where A is fixed, x is not needed any more.
        ctx.save_for_backward(x if for_A else None, z if for_B else None, weight, A, B)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, A, B = ctx.saved_tensors
        for_x, for_y, _, for_bias, for_A, for_B, _, _ = ctx.needs_input_grad
        g = _flat(grad)
        gx = gA = gB = None
        if for_x or for_A:
            gz = (g @ B.to(g.dtype)).mul_(ctx.scale)
        if for_x:
            gx = g @ weight if weight is not None else None
            if ctx.drop:
                with fork_rng(ctx.random, g.device):
                    through = _dropped((gz @ A.to(g.dtype)).view(ctx.shape), ctx.drop).view(-1, A.shape[1])
                gx = through if gx is None else gx.add_(through)
            else:
                gx = gz @ A.to(g.dtype) if gx is None else gx.addmm_(gz, A.to(g.dtype))
            gx = gx.view(ctx.shape)
        if for_A:
            if ctx.drop:
                with fork_rng(ctx.random, g.device):
                    x = _dropped(x, ctx.drop)
            gA = (gz.t() @ _flat(x)).to(A.dtype)
        if for_B:
            # The thin one first: half the time of gᵀ z.
            gB = (z.t() @ g).mul_(ctx.scale).to(B.dtype).t()
        return gx, grad if for_y else None, None, g.sum(0) if for_bias else None, gA, gB, None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _dropped(x: Tensor, probability: float) -> Tensor:
    # Which random number falls on which value hangs on how they lie, on a GPU: x and its gradient must lie alike.
    return F.dropout(x.contiguous(), probability)
