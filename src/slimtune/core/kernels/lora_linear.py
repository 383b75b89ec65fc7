"""A frozen linear layer with a low-rank update, as one autograd step.

    y = x Wᵀ + b + s · d(x) Aᵀ Bᵀ          x (..., in), W (out, in), A (r, in), B (out, r), d: dropout

Saved for the backward pass: x, or the norm that x comes from, and the thin product `z = d(x) Aᵀ (..., r)`. Scale and
sum are part of the matrix products. The dropout mask is not saved but drawn again from the same random state. A and B
may be fp32 above a 16-bit x, of which no fp32 copy is made. Gradients equal those of the separate operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import fork_rng, get_rng_state
from .frozen_product import multiply_by_transposed_weight, multiply_by_weight
from .rms_norm import find_rms_norm_node, recompute_rms_norm_output


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return `x Wᵀ + b + s · d(x) Aᵀ Bᵀ`, `(..., out)` in x's dtype.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, frozen.
        bias: `(out)` or None.
        A, B: `(r, in)` and `(out, r)`, in any floating-point dtype.
        scale: s.
        dropout: probability in [0, 1) of dropping an input of A; the others are scaled up.
    """
    if needs_unfused_operations(x):
        return add_low_rank_update(F.linear(x, weight, bias), x, A, B, scale, dropout)
    if not (dropout or torch.is_grad_enabled()):  # the same products, without what autograd costs for each token
        out = multiply_by_weight(x, weight, bias)
        _flatten(out).addmm_(_flatten(x) @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=scale)
        return out
    return _LowRankLinear.apply(x, None, weight, bias, A, B, scale, dropout)


def add_low_rank_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return `y + s · d(x) Aᵀ Bᵀ` for any `y (..., out)`; other arguments as in `low_rank_linear`."""
    if not needs_unfused_operations(x):
        return _LowRankLinear.apply(x, y, None, None, A, B, scale, dropout)
    # x is flattened before A, which may have no rows.
    z = F.linear(F.dropout(x, dropout).reshape(-1, x.shape[-1]), A.to(x.dtype))
    return torch.addmm(y.reshape(-1, y.shape[-1]), z, B.to(x.dtype).t(), alpha=scale).view_as(y)


def add_low_rank_to_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `W (out, in) + s · B (out, r) A (r, in)` in W's dtype."""
    return weight + (B.to(weight.dtype) @ A.to(weight.dtype)) * scale


def needs_unfused_operations(x: Tensor) -> bool:
    """Return whether separate operations have to run in place of one autograd step."""
    # torch.compile fuses on its own and cannot replay random states; autocast chooses a dtype per operation.
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


class _LowRankLinear(torch.autograd.Function):
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
        dropout: float,
    ) -> Tensor:
        ctx.scale, ctx.dropout = scale, dropout
        ctx.rng_state = get_rng_state(x.device) if dropout else None
        z = _flatten(_drop(x, dropout) if dropout else x) @ A.to(x.dtype).t()
        if y is None:
            assert weight is not None
            out = multiply_by_weight(x, weight, bias)
            _flatten(out).addmm_(z, B.to(x.dtype).t(), alpha=scale)
        else:
            out = torch.addmm(_flatten(y), z, B.to(y.dtype).t(), alpha=scale).view_as(y)
        # Autograd does not let the caller change a view in place (Falcon does), and F.linear may return one.
        out = out.detach()
        need_A, need_B = ctx.needs_input_grad[4:6]
        ctx.shape = x.shape
        # x is needed for A's gradient only, and the output of a norm is quickly computed again.
        ctx.norm = find_rms_norm_node(x) if need_A else None
        ctx.save_for_backward(x if need_A and ctx.norm is None else None, z if need_B else None, weight, A, B)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, A, B = ctx.saved_tensors
        need_x, need_y, _, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        g = _flatten(grad)
        grad_x = grad_A = grad_B = None
        if need_x or need_A:
            grad_z = (g @ B.to(g.dtype)).mul_(ctx.scale)
        if need_x:
            grad_x = multiply_by_transposed_weight(g, weight) if weight is not None else None
            if ctx.dropout:
                with fork_rng(ctx.rng_state, g.device):
                    update = _drop((grad_z @ A.to(g.dtype)).view(ctx.shape), ctx.dropout).view(-1, A.shape[1])
                grad_x = update if grad_x is None else grad_x.add_(update)
            elif grad_x is None:
                grad_x = grad_z @ A.to(g.dtype)
            else:
                grad_x = grad_x.addmm_(grad_z, A.to(g.dtype))
            grad_x = grad_x.view(ctx.shape)
        if need_A:
            if ctx.norm is not None:
                x = recompute_rms_norm_output(ctx.norm)
            if ctx.dropout:
                with fork_rng(ctx.rng_state, g.device):
                    x = _drop(x, ctx.dropout)
            grad_A = (grad_z.t() @ _flatten(x)).to(A.dtype)
        if need_B:
            # zᵀ g takes half the time of gᵀ z.
            grad_B = (z.t() @ g).mul_(ctx.scale).to(B.dtype).t()
        return grad_x, grad if need_y else None, None, g.sum(0) if need_bias else None, grad_A, grad_B, None, None


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _drop(x: Tensor, probability: float) -> Tensor:
    # On a GPU the mask depends on the memory layout: x and its gradient must both be contiguous.
    return F.dropout(x.contiguous(), probability)
