"""Several low-rank linear maps of one input, as one step of autograd: q, k and v; gate and up.

    y_i = x W_iᵀ + b_i + s_i · x A_iᵀ B_iᵀ         all A_i are multiplied with x at once, and backwards likewise

Kept for the backward pass: x, once, and the thin products side by side, `z (..., Σ r_i)`. The gradient of x is summed
within the products. The values are those of each map alone, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Map(NamedTuple):
    """One map: `weight (out, in)` frozen, `bias (out)` or None, `A (r, in)`, `B (out, r)`, the update's scale."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def low_rank_linears(x: Tensor, maps: list[Map]) -> tuple[Tensor, ...]:
    """Return each map's output `(..., out_i)` for one input `x (..., in)`."""
    flat = [t for m in maps for t in (m.weight, m.bias, m.A, m.B)]
    return _Group.apply(x, [m.scale for m in maps], *flat)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[float], *flat: Tensor | None) -> tuple[Tensor, ...]:
        maps = _maps(flat, scales)
        rows = x.reshape(-1, x.shape[-1])
        A = torch.cat([m.A.to(x.dtype) for m in maps])
        z = rows @ A.t()
        outs = []
        for m, part in zip(maps, z.split([len(m.A) for m in maps], dim=1), strict=True):
            y = F.linear(x, m.weight, m.bias)
            y.view(-1, y.shape[-1]).addmm_(part, m.B.to(x.dtype).t(), alpha=m.scale)
            outs.append(y)
        ctx.scales, ctx.shape = scales, x.shape
        trained = ctx.needs_input_grad[2:]
        ctx.save_for_backward(rows if any(trained[2::4]) else None, z if any(trained[3::4]) else None, *flat)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, z, *flat = ctx.saved_tensors
        maps = _maps(flat, ctx.scales)
        given = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        like = next(g for g in given if g is not None)
        ranks = [len(m.A) for m in maps]
        gz = like.new_zeros(len(like), sum(ranks))
        gx = None
        found: list[list[Tensor | None]] = [[None, None, None, None] for _ in maps]
        needs = ctx.needs_input_grad
        for i, (m, g, part) in enumerate(zip(maps, given, gz.split(ranks, dim=1), strict=True)):
            if g is None:
                continue
            part.copy_(g @ m.B.to(g.dtype)).mul_(m.scale)
            if needs[0]:
                gx = g @ m.weight if gx is None else gx.addmm_(g, m.weight)
            if needs[2 + 4 * i + 1]:
                found[i][1] = g.sum(0)
            if needs[2 + 4 * i + 3]:
                found[i][3] = (g.t() @ z.split(ranks, dim=1)[i]).mul_(m.scale).to(m.B.dtype)
        if gx is not None:
            gx = gx.addmm_(gz, torch.cat([m.A.to(gz.dtype) for m in maps])).view(ctx.shape)
        if rows is not None:
            for i, gA in enumerate((gz.t() @ rows).split(ranks)):
                if needs[2 + 4 * i + 2]:
                    found[i][2] = gA.to(maps[i].A.dtype)
        return gx, None, *(t for four in found for t in four)


def _maps(flat: Sequence[Any], scales: list[float]) -> list[Map]:
    return [Map._make((*flat[4 * i : 4 * i + 4], scale)) for i, scale in enumerate(scales)]
