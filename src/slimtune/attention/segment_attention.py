"""Attention segment by segment on a CPU, as one step of autograd.

Each segment's queries see the keys of the segments on its way and its own, `softmax(q Kᵀ · s + mask) V` by the kernel
that torch's own attention uses there. It runs in fp32 whatever the inputs are kept in: on a CPU that is faster than
bf16, and rounds less. Kept for the backward pass: the inputs and the output as they are, which others keep too, and one
number a query; no fp32 copy, and no keys laid together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Segment(NamedTuple):
    """One segment: its first query, how many, the pieces of keys it sees as `(first, how many)`, and what is added.

    `mask (1, 1, queries, keys)`; None: a query sees all pieces but the last, which is its own segment, up to itself.
    That is only told without pieces before the last.
    """

    start: int
    length: int
    way: tuple[tuple[int, int], ...]
    mask: Tensor | None


def attention_by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float | None
) -> Tensor:
    """Return `(1, tokens, heads, size)` in the query's dtype.

    Args:
        query: `(1, heads, tokens, size)`.
        key: `(1, kv heads, keys, size)`, kv heads dividing heads.
        value: likewise.
        segments: of the queries, in order, all of them.
        scale: of the scores; None: 1 / √size.
    """
    return _Attention.apply(query, key, value, segments, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float | None
    ) -> Tensor:
        q, k, v = (_wide(t) for t in (query, key, value))
        _, heads, tokens, size = query.shape
        out, sums = query.new_empty(1, tokens, heads, size), q.new_empty(1, heads, tokens)
        for s in segments:
            at = slice(s.start, s.start + s.length)
            o, sums[:, :, at] = _forward(
                q[:, :, at], _laid(k, s), _laid(v, s), 0.0, s.mask is None, attn_mask=s.mask, scale=scale
            )
            out[:, at] = o.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        g, o = (_wide(t).transpose(1, 2) for t in (grad, out))
        q, k, v = (_wide(t) for t in (query, key, value))
        # Keys that several segments see get a sum of gradients, which is not rounded between.
        alone = all(len(s.way) == 1 for s in ctx.segments) and k.shape[2] == q.shape[2]
        gq = torch.empty_like(query)
        gk, gv = (
            (torch.empty_like(key), torch.empty_like(value)) if alone else (torch.zeros_like(k), torch.zeros_like(v))
        )
        for s in ctx.segments:
            at = slice(s.start, s.start + s.length)
            gq[:, :, at], *more = _backward(
                g[:, :, at], q[:, :, at], _laid(k, s), _laid(v, s), o[:, :, at], sums[:, :, at], 0.0, s.mask is None,
                attn_mask=s.mask, scale=ctx.scale,
            )  # fmt: skip
            for total, found in zip((gk, gv), more, strict=True):
                for (start, n), part in zip(s.way, found.split([n for _, n in s.way], dim=2), strict=True):
                    if alone:
                        total[:, :, start : start + n] = part
                    else:
                        total[:, :, start : start + n] += part
        return gq, gk.to(key.dtype), gv.to(value.dtype), None, None


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _laid(t: Tensor, segment: Segment) -> Tensor:
    parts = [t[:, :, start : start + n] for start, n in segment.way]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
