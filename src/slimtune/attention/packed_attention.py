"""Attention of rows laid as a tree of segments, on a GPU: one flex attention kernel, whatever the tree.

A token sees a key where, with every segment followed by those below it,

    place(key) ≤ place(token) < end(key)   and   position(key) > position(token) − window

place: where a token then lies; end: the first place behind the segments below the key's own. So five short int32 rows
say what a mask of tokens² would, and whole blocks of 128 × 128 are skipped or taken from the rows' extremes.

Sequences are filled up to a power of two: each length is one compiled kernel (kept on disk by torch), so a run needs a
few, however its packs' lengths change. What is filled in sees itself alone.

Before heads of a kind are computed so, a small tree is: kernels need a compiler, and for some heads more shared memory
than some cards have. Where that fails or its numbers are wrong, attention goes segment by segment, and that is said.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils.simulated_device import device_type, is_simulated

BLOCK = 128
SHORTEST = 256
"""Tokens below which attention by segment is as fast, and no kernel has to be compiled."""
MAX_SEGMENT_TOKENS = 1 << 16
"""Tokens above which a row alone, which is plainly causal, goes to flash attention: it fills nothing up."""
KERNELS = 64
"""Most kernels torch may compile: lengths × (training, scoring) × kinds of layers."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BACKWARDS = ("M1", "N1", "M2", "N2")
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_stages": 1},
    {"num_stages": 1, "fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, **{f"bwd_BLOCK_{n}": 32 for n in _BACKWARDS}},
)
"""Options of a kernel, each with less shared memory than the one before. At 100 KiB heads of 96 need the second."""


def flex_attention_supported(query: Tensor, key: Tensor, dropout: float = 0.0) -> bool:
    """Return whether flex attention can train with `query (1, heads, tokens, size)`; it has no dropout."""
    if device_type(query.device) != "cuda" or dropout or query.shape[2] < SHORTEST:
        return False
    if is_simulated():
        return True
    # A subclass is a fake or a distributed tensor.
    if type(query) is not Tensor or not query.is_cuda:
        return False
    if query.dtype not in _DTYPES or not _has_kernels(query.device):
        return False
    return _options(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3]) is not None


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    # Older torch does not compile every shape; older cards have no bf16 in Triton; Windows has no Triton of its own.
    there = torch.__version__ >= "2.8" and importlib.util.find_spec("triton") is not None
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _options(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> dict[str, Any] | None:
    """Return the kernel options with which a small tree comes out right; None: with none."""
    fault = ""
    for options in _OPTIONS:
        # In a thread of its own: the caller may be within checkpointing, no_grad or autocast.
        with ThreadPoolExecutor(1) as thread:
            fault = thread.submit(_fault, device, dtype, heads, kv_heads, size, options).result()
        if not fault:
            return options
    warnings.warn(
        f"flex attention does not work here with {heads} heads of {size} in {dtype}, so attention is computed segment "
        f"by segment, which is slower: {fault}",
        stacklevel=2,
    )
    return None


def _fault(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, options: dict) -> str:
    """Return what is wrong with attention in a small tree, and with its gradients; "": nothing."""
    n = SHORTEST
    mask = tree_mask((n - 90, 50, 40), (-1, 0, 0), [*range(n - 40), *range(n - 90, n - 50)], 0, None, device)
    shapes = [(1, h, n, size) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, g = (torch.arange(1.0, 1 + n * s[1] * size, device=device).mul(5).sin().view(s).to(dtype) for s in shapes)
    seen = torch.tril(torch.ones(n, n, dtype=torch.bool, device=device))
    seen[n - 40 :, n - 90 : n - 40] = False
    wide = tuple(t.float().requires_grad_() for t in (q, k, v))
    want = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], seen, enable_gqa=True)
    try:
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        got = tree_attention(q, k, v, mask, None, options)
        found = [got.detach(), *torch.autograd.grad(got, (q, k, v), g)]
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        return f"{type(e).__name__}: {e}".strip().splitlines()[0]
    right = [want.detach(), *torch.autograd.grad(want, wide, g.float())]
    apart = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True))
    return "" if apart < 0.03 else f"its numbers are {100 * apart:.2g} % off"


def tree_mask(
    lengths: Sequence[int],
    parents: Sequence[int],
    positions: Sequence[int],
    keys_before: int,
    window: int | None,
    device: torch.device,
) -> Any:
    """Return the `BlockMask` of a tree of segments.

    Args:
        lengths: tokens of each segment, in the order they lie.
        parents: for each segment the one above it, which lies earlier; -1: none.
        positions: each token's position in its row.
        keys_before: keys that stand before every row and are no tokens.
        window: how many positions a token sees, its own included; None: all.
        device: where to.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = list(lengths)
    for i in reversed(range(len(size))):
        if parents[i] >= 0:
            size[parents[i]] += size[i]
    free, first = {-1: 0}, []
    for i, parent in enumerate(parents):
        first.append(free[parent])
        free[parent] += size[i]
        free[i] = first[i] + lengths[i]
    each = torch.tensor(lengths)
    laid = each.cumsum(0) - each
    total, at = int(each.sum()), torch.tensor(positions)
    place = torch.arange(total) + (torch.tensor(first) - laid).repeat_interleave(each)
    end = (torch.tensor(first) + torch.tensor(size)).repeat_interleave(each)

    more_q, more_k = padded_length(total) - total, padded_length(keys_before + total) - total - keys_before
    own = total + torch.arange(max(more_q, more_k))
    all_see = place.new_full((keys_before,), -1), end.new_full((keys_before,), total + more_q)
    rows = (
        torch.cat([place, own[:more_q]]),
        torch.cat([at - (window or total + keys_before), place.new_full((more_q,), -total - keys_before - 1)]),
        torch.cat([all_see[0], place, own[:more_k]]),
        torch.cat([all_see[1], end, own[:more_k] + 1]),
        torch.cat([torch.arange(-keys_before, 0), at, place.new_zeros(more_k)]),
    )
    together = torch.cat(rows).to(torch.int32)
    if device.type == "cuda":  # from other memory the copy would wait for all that was asked of the card before
        together = together.pin_memory().to(device, non_blocking=True)
    place_q, seen_from, place_k, end_k, at_k = together.split([len(r) for r in rows])

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (place_k[k] <= place_q[q]) & (place_q[q] < end_k[k]) & (at_k[k] > seen_from[q])

    def extremes(row: Tensor) -> tuple[Tensor, Tensor]:
        return torch.aminmax(row.view(-1, BLOCK), dim=1)

    (q0, q1), (f0, f1) = ([x[:, None] for x in extremes(r)] for r in (place_q, seen_from))
    (k0, k1), (e0, e1), (a0, a1) = extremes(place_k), extremes(end_k), extremes(at_k)
    some = (k0 <= q1) & (q0 < e1) & (a1 > f0)
    whole = (k1 <= q0) & (q1 < e0) & (a0 > f1)
    return BlockMask.from_kv_blocks(*_ordered(some & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=sees)


def padded_length(tokens: int) -> int:
    """Return the length a sequence is filled up to."""
    return max(BLOCK, 1 << (tokens - 1).bit_length())


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row takes, and all columns, those first: `(1, 1, rows)`, `(1, 1, rows, columns)`."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None, options: dict[str, Any] | None = None
) -> Tensor:
    """Return attention `(1, heads, tokens, size)` under a `tree_mask`.

    Args:
        query: `(1, heads, tokens, size)`.
        key: `(1, kv heads, keys, size)`.
        value: likewise.
        mask: what sees what.
        scale: of the scores; None: 1 / √size.
        options: of the kernel; None: those that `runs_here` found.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if options is None and query.is_cuda:
        options = _options(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])
    q, k, v = (_fill(t, n) for t, n in zip((query, key, value), (*mask.seq_lengths, mask.seq_lengths[1]), strict=True))
    # Past torch's own limit it would go on uncompiled, with all scores in memory.
    with torch._dynamo.config.patch(recompile_limit=KERNELS):
        out = _compiled(flex_attention)(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options or None
        )
    return out[:, :, : query.shape[2]]


def fake_tree_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return a tensor of attention's shape, having taken what the kernel takes: for a plan, which computes nothing.

    The shapes are `tree_attention`'s.
    """
    tokens, keys = padded_length(query.shape[2]), padded_length(key.shape[2])
    return _Outline.apply(_fill(query, tokens), _fill(key, keys), _fill(value, keys))[:, :, : query.shape[2]]


class _Outline(torch.autograd.Function):
    """Kept: inputs, output and, in fp32, a number a query; backwards another, and the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        delta = torch.empty_like(sums)
        found = tuple(torch.empty_like(t) for t in (query, key, value))
        del delta
        return found


def _fill(t: Tensor, length: int) -> Tensor:
    return F.pad(t, (0, 0, 0, length - t.shape[2])) if t.shape[2] < length else t.contiguous()


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


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
