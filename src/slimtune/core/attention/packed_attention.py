"""Attention over packed sequences: by segment on a CPU, with one flex attention kernel on a GPU.

**CPU.** Each segment's queries attend to the keys on the segment's path, `softmax(q Kᵀ · s + mask) V`, with the kernel
that torch's own attention uses, in one autograd step for all segments. It computes in fp32 whatever the dtype of the
inputs, which on a CPU is faster than bf16 and rounds less. Saved for the backward pass: inputs and output (which others
save too) and one number per query; no fp32 copy and no concatenated keys.

**GPU.** With the segments of the tree in depth-first order, a token attends to a key if

    place(key) ≤ place(token) < end(key)   and   position(key) > position(token) − window

where place is a token's index in that order and end the first index after all descendants of the key's segment. So five
int32 vectors replace a mask of tokens² entries, and blocks of 128 × 128 are skipped, or computed without a mask, from
the extremes of these vectors. Sequences are padded to a power of two, since each length is one compiled kernel (torch
caches them on disk); a padding token attends only to itself.

Before the GPU kernel is used for a head shape, a small tree is computed with it: the kernel needs a compiler, and some
head sizes need more shared memory than some GPUs have. If that fails or its values are wrong, a warning says so and
attention runs segment by segment.
"""

import functools
import importlib.util
import itertools
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..foundation.device import add_simulated_attention_flops, get_real_or_simulated_device_type, is_device_simulated
from .packed_layout import PackedLayout

PART, MAX_SPLIT_TOKENS = 128, 2048
"""On a CPU segments of up to 2,048 tokens are split into parts of 128: torch's kernel leaves out what is above the
diagonal in blocks of 512 keys, so it computes all pairs of a shorter row. Of a longer row it leaves out most."""
BLOCK = 128
MIN_FLEX_TOKENS = 256
"""Below this length attention by segment is as fast and compiles nothing."""
MAX_SEGMENT_TOKENS = 1 << 16
"""A single causal row above this length uses flash attention, which does not pad."""
MAX_KERNELS = 64
"""Largest number of kernels torch may compile: lengths × (training, scoring) × kinds of layers."""
_SMALL_BLOCKS = dict.fromkeys(
    ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32
)
_KERNEL_OPTIONS: tuple[dict[str, int], ...] = ({}, {"num_stages": 1}, {"num_stages": 1, **_SMALL_BLOCKS})
"""Kernel options, each with less shared memory than the one before. With 100 KiB, heads of size 96 need the second."""

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# --- CPU --------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """One segment of a packed sequence."""

    start: int  # index of its first query
    length: int  # number of queries
    key_ranges: tuple[tuple[int, int], ...]  # the keys it attends to, as (first, count), its own last
    mask: Tensor | None  # what is added to the scores (1, 1, queries, keys); None: causal, only with a single range


def attend_by_segment_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, window: int | None, scale: float | None
) -> Tensor:
    """Return attention on a CPU, `(1, tokens, heads, size)` in the query's dtype.

    Args:
        query: `(1, heads, tokens, size)`.
        key, value: `(1, key-value heads, keys, size)`; heads is a multiple of key-value heads.
        layout: the segments.
        window: number of positions a token attends to, its own included; None: all.
        scale: factor on the scores; None: 1 / √size.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    parts = layout.compute_once(("parts",), lambda: layout.split_segments(PART, MAX_SPLIT_TOKENS))
    segments = parts.compute_once(
        ("segments", window, dtype), lambda: list_segments(parts, window, dtype, query.device)
    )
    return _SegmentAttention.apply(query, key, value, segments, scale)


def list_segments(layout: PackedLayout, window: int | None, dtype: torch.dtype, device: torch.device) -> list[Segment]:
    """Return the segments of a layout in the order of the queries, with masks in `dtype`.

    Ranges of keys that follow one another are joined: a single range is a view, several are copied. Masks of parts are
    views of one mask, zeros and a triangle, however long rows are.
    """
    starts = [layout.num_prefix_keys + n for n in layout.starts()]
    most = max([MAX_SPLIT_TOKENS, *starts])
    firsts = list(itertools.accumulate(layout.lengths, initial=layout.num_prefix_keys))
    segments = []
    for i, n in enumerate(layout.lengths):
        key_ranges = [(0, layout.num_prefix_keys)]
        for a in layout.ancestors(i):
            first, count = key_ranges[-1]
            if first + count == firsts[a]:
                key_ranges[-1] = (first, count + layout.lengths[a])
            else:
                key_ranges.append((firsts[a], layout.lengths[a]))
        if n <= PART and starts[i] and (window is None or window >= starts[i] + n):
            mask = layout.compute_once(("part mask", dtype, device), lambda: _make_part_mask(most, dtype, device))
            mask = mask[..., :n, most - starts[i] : most + n]
        else:
            mask = layout.segment_bias(i, window, dtype, device)
        segments.append(Segment(firsts[i] - layout.num_prefix_keys, n, tuple(r for r in key_ranges if r[1]), mask))
    return segments


def _make_part_mask(above: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the mask of a part of a causal row `(1, 1, PART, above + PART)`, which has `above` keys before its own."""
    hidden = torch.ones(PART, PART, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(1, 1, PART, above + PART, dtype=dtype, device=device)
    mask[..., above:].masked_fill_(hidden, torch.finfo(dtype).min)
    return mask


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float | None
    ) -> Tensor:
        q, k, v = (_to_fp32(t) for t in (query, key, value))
        _, heads, tokens, size = query.shape
        out, logsumexp = query.new_empty(1, tokens, heads, size), q.new_empty(1, heads, tokens)
        for s in segments:
            span = slice(s.start, s.start + s.length)
            keys, values = _gather_ranges(k, s), _gather_ranges(v, s)
            o, logsumexp[:, :, span] = _flash_forward(
                q[:, :, span], keys, values, 0.0, s.mask is None, attn_mask=s.mask, scale=scale
            )
            out[:, span] = o.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        g, o = (_to_fp32(t).transpose(1, 2) for t in (grad, out))
        q, k, v = (_to_fp32(t) for t in (query, key, value))
        # Keys that several segments attend to get a sum of gradients, accumulated in fp32.
        shared_keys = sum(n for s in ctx.segments for _, n in s.key_ranges) != k.shape[2]
        grad_q = torch.empty_like(query)
        if shared_keys:
            grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        else:
            grad_k, grad_v = torch.empty_like(key), torch.empty_like(value)
        # The backward kernel gives each thread whole heads of the keys: with fewer heads than threads some would idle.
        repeats = q.shape[1] // k.shape[1] if k.shape[1] < torch.get_num_threads() else 1
        for s in ctx.segments:
            span = slice(s.start, s.start + s.length)
            keys, values = _gather_ranges(k, s), _gather_ranges(v, s)
            if repeats > 1:
                keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
            grad_q[:, :, span], *grads_kv = _flash_backward(
                g[:, :, span], q[:, :, span], keys, values, o[:, :, span],
                logsumexp[:, :, span], 0.0, s.mask is None, attn_mask=s.mask, scale=ctx.scale,
            )  # fmt: skip
            if repeats > 1:
                grads_kv = [t.unflatten(1, (-1, repeats)).sum(2) for t in grads_kv]
            for total, found in zip((grad_k, grad_v), grads_kv, strict=True):
                parts = found.split([n for _, n in s.key_ranges], dim=2)
                for (first, n), part in zip(s.key_ranges, parts, strict=True):
                    if shared_keys:
                        total[:, :, first : first + n] += part
                    else:
                        total[:, :, first : first + n] = part
        return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype), None, None


def _to_fp32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _gather_ranges(t: Tensor, segment: Segment) -> Tensor:
    parts = [t[:, :, first : first + n] for first, n in segment.key_ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# --- GPU --------------------------------------------------------------------------------------------------------


def should_use_flex_attention(query: Tensor, key: Tensor, dropout: float = 0.0) -> bool:
    """Return whether flex attention works, and is faster, for `query (1, heads, tokens, size)`."""
    if get_real_or_simulated_device_type(query.device) != "cuda" or dropout or query.shape[2] < MIN_FLEX_TOKENS:
        return False
    # A subclass is a fake or a distributed tensor.
    return is_device_simulated() or (
        type(query) is Tensor and _find_kernel_options(*_head_shape(query, key)) is not None
    )


def run_compiled_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float | None,
    kernel_options: dict[str, int] | None = None,
) -> Tensor:
    """Return flex attention `(1, heads, tokens, size)` under a mask.

    Args:
        query, key, value, scale: as in `attend_by_segment_on_cpu`.
        mask: from `get_flex_block_mask`.
        kernel_options: kernel options; None: those that `should_use_flex_attention` found.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if kernel_options is None and query.is_cuda:
        kernel_options = _find_kernel_options(*_head_shape(query, key))
    lengths = (*mask.seq_lengths, mask.seq_lengths[1])
    q, k, v = (_pad_to(t, n) for t, n in zip((query, key, value), lengths, strict=True))
    # Above torch's default limit flex attention would run uncompiled and materialise all scores.
    with torch._dynamo.config.patch(recompile_limit=MAX_KERNELS):
        out = _compile(flex_attention)(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=kernel_options or None
        )
    return out[:, :, : query.shape[2]]


def get_flex_block_mask(layout: PackedLayout, window: int | None, device: torch.device) -> Any:
    """Return the flex attention `BlockMask` of a layout; cached in it."""
    return layout.compute_once(("flex", window, device), lambda: _make_block_mask(layout, window, device))


def _make_block_mask(layout: PackedLayout, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    lengths, parents, prefix_keys = layout.lengths, layout.parents, layout.num_prefix_keys
    subtree = list(lengths)  # tokens of a segment and all its descendants
    for i in reversed(range(len(subtree))):
        if parents[i] >= 0:
            subtree[parents[i]] += subtree[i]
    next_free, first = {-1: 0}, []  # depth-first order: index of each segment's first token
    for i, parent in enumerate(parents):
        first.append(next_free[parent])
        next_free[parent] += subtree[i]
        next_free[i] = first[i] + lengths[i]
    counts = torch.tensor(lengths)
    offsets = counts.cumsum(0) - counts
    total, position = int(counts.sum()), torch.tensor(layout.positions())
    place = torch.arange(total) + (torch.tensor(first) - offsets).repeat_interleave(counts)
    end = (torch.tensor(first) + torch.tensor(subtree)).repeat_interleave(counts)

    # Append padding, which attends to itself only, and put the prefix keys in front, which all tokens attend to.
    pad_q, pad_k = (
        round_up_to_power_of_two_blocks(total) - total,
        round_up_to_power_of_two_blocks(prefix_keys + total) - total - prefix_keys,
    )
    padding = total + torch.arange(max(pad_q, pad_k))
    vectors = (
        torch.cat([place, padding[:pad_q]]),
        torch.cat([position - (window or total + prefix_keys), place.new_full((pad_q,), -total - prefix_keys - 1)]),
        torch.cat([place.new_full((prefix_keys,), -1), place, padding[:pad_k]]),
        torch.cat([end.new_full((prefix_keys,), total + pad_q), end, padding[:pad_k] + 1]),
        torch.cat([torch.arange(-prefix_keys, 0), position, place.new_zeros(pad_k)]),
    )
    joined = torch.cat(vectors).to(torch.int32)
    if device.type == "cuda":  # a copy from unpinned memory would wait for all kernels in the queue
        joined = joined.pin_memory().to(device, non_blocking=True)
    place_q, visible_after, place_k, end_k, position_k = joined.split([len(v) for v in vectors])

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (place_k[k] <= place_q[q]) & (place_q[q] < end_k[k]) & (position_k[k] > visible_after[q])

    def block_extremes(vector: Tensor) -> tuple[Tensor, Tensor]:
        return torch.aminmax(vector.view(-1, BLOCK), dim=1)

    def block_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:  # their number per row, and all columns, these first
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    (q0, q1), (v0, v1) = ([x[:, None] for x in block_extremes(v)] for v in (place_q, visible_after))
    (k0, k1), (e0, e1), (p0, p1) = block_extremes(place_k), block_extremes(end_k), block_extremes(position_k)
    any_visible = (k0 <= q1) & (q0 < e1) & (p1 > v0)
    all_visible = (k1 <= q0) & (q1 < e0) & (p0 > v1)
    partial, full = block_indices(any_visible & ~all_visible), block_indices(all_visible)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=attends)


def round_up_to_power_of_two_blocks(length: int) -> int:
    """Return the length to which a sequence is padded: a power of two, at least a block."""
    return max(BLOCK, 1 << (length - 1).bit_length())


def simulate_flex_attention_memory(query: Tensor, key: Tensor, value: Tensor, pair_count: int) -> Tensor:
    """Return a tensor of attention's shape and allocate what compiled attention does, for the planner's fake tensors.

    `pair_count` is the number of tokens and keys that attend to each other (`PackedLayout.count_pairs`).
    """
    q, k, v = (_pad_to(t, round_up_to_power_of_two_blocks(t.shape[2])) for t in (query, key, value))
    return _FakeAttention.apply(q, k, v, pair_count)[:, :, : query.shape[2]]


class _FakeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pairs: int) -> Tensor:
        ctx.operations = 2 * query.shape[1] * (query.shape[-1] + value.shape[-1]) * pairs
        add_simulated_attention_flops(query.dtype, ctx.operations)
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, logsumexp = ctx.saved_tensors
        add_simulated_attention_flops(
            query.dtype, 5 * ctx.operations // 2
        )  # five products where the forward pass has two
        workspace = torch.empty_like(logsumexp)
        grads = tuple(torch.empty_like(t) for t in (query, key, value))
        del workspace
        return (*grads, None)


def _head_shape(query: Tensor, key: Tensor) -> tuple[torch.device, torch.dtype, int, int, int]:
    return query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3]


@functools.cache
def _find_kernel_options(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> dict[str, int] | None:
    """Return the kernel options with which a small tree is computed correctly; None: none of them."""
    if device.type == "cuda":
        # Older torch does not compile every shape; older GPUs have no bf16 in Triton; Triton may be missing on Windows.
        installed = torch.__version__ >= "2.8" and importlib.util.find_spec("triton") is not None
        if not installed or torch.cuda.get_device_capability(device) < (8, 0) or dtype == torch.float64:
            return None
    error = ""
    for options in _KERNEL_OPTIONS:
        # In a thread of its own, since the caller may be inside checkpointing, no_grad or autocast.
        with ThreadPoolExecutor(1) as thread:
            error = thread.submit(_test_kernel, device, dtype, heads, kv_heads, size, options).result()
        if not error:
            return options
    warnings.warn(
        f"flex attention does not work here with {heads} heads of size {size} in {dtype}, so attention runs segment by "
        f"segment, which is slower: {error}",
        stacklevel=2,
    )
    return None


def _test_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, options: dict) -> str:
    """Return what is wrong with attention in a small tree and its gradients, "" if nothing is."""
    n = MIN_FLEX_TOKENS
    mask = get_flex_block_mask(PackedLayout((n - 90, 50, 40), (-1, 0, 0)), None, device)
    shapes = [(1, h, n, size) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, g = (torch.arange(1.0, 1 + n * s[1] * size, device=device).mul(5).sin().view(s).to(dtype) for s in shapes)
    visible = torch.tril(torch.ones(n, n, dtype=torch.bool, device=device))
    visible[n - 40 :, n - 90 : n - 40] = False
    wide = tuple(t.float().requires_grad_() for t in (q, k, v))
    expected = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], visible, enable_gqa=True)
    try:
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = run_compiled_flex_attention(q, k, v, mask, None, options)
        found = [out.detach(), *torch.autograd.grad(out, (q, k, v), g)]
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        return f"{type(e).__name__}: {e}".strip().splitlines()[0]
    correct = [expected.detach(), *torch.autograd.grad(expected, wide, g.float())]
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, correct, strict=True))
    return "" if error < 0.03 else f"its values are {100 * error:.2g} % off"


def _pad_to(t: Tensor, length: int) -> Tensor:
    return F.pad(t, (0, 0, 0, length - t.shape[2])) if t.shape[2] < length else t.contiguous()


@functools.cache
def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=False)
