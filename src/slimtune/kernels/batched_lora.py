"""Low-rank updates that differ by row of a batch, as batched matrix products.

    y[b] += s_b · B_b A_b x[b]          A_b (r_b, in), B_b (out, r_b): the factors of row b's adapter; ranks may differ

The batch is divided into n groups of equal size whose rows use one adapter. The factors are stacked once per group,
with zeros in place of missing ranks.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def list_group_adapters(row_adapters: Sequence[str]) -> list[str]:
    """Return one adapter name per group, after the rows are split, in order, into the largest groups of equal size with
    one adapter each: `["a", "a", "b", "b", "b", "b"]` gives `["a", "b", "b"]`."""
    size = math.gcd(*(len(list(run)) for _, run in itertools.groupby(row_adapters)))
    return list(row_adapters[::size])


def stack_factors(factors: Sequence[tuple[Tensor, Tensor, float] | None], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `A (n, r, in)` and `B (n, out, r)`, scales included, in the dtype of `like`.

    Args:
        factors: `(A (r, in), B (out, r), scale)` per group, None for a group without an update.
        like: the layer's input.
    """
    given = [f for f in factors if f is not None]
    rank, (A0, B0, _) = max(A.shape[0] for A, _, _ in given), given[0]
    if torch.is_grad_enabled():
        zero = A0.new_zeros(rank, A0.shape[1]), B0.new_zeros(B0.shape[0], rank), 1.0
        filled = [zero if f is None else f for f in factors]
        A = torch.stack([F.pad(A.to(like.dtype), (0, 0, 0, rank - A.shape[0])) for A, _, _ in filled])
        return A, torch.stack([F.pad(B.to(like.dtype), (0, rank - B.shape[1])) * scale for _, B, scale in filled])
    # Without gradients each value is written once, in place.
    A, B = like.new_zeros(len(factors), rank, A0.shape[1]), like.new_zeros(len(factors), B0.shape[0], rank)
    for i, factor in enumerate(factors):
        if factor is not None:
            r = factor[0].shape[0]
            A[i, :r].copy_(factor[0])
            B[i, :, :r].copy_(factor[1])
    return A, B.mul_(B.new_tensor([1.0 if f is None else f[2] for f in factors]).view(-1, 1, 1))


def add_low_rank_rows(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return `y` plus each row's own low-rank update.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        A: `(n, r, in)` for n groups of rows.
        B: `(n, out, r)`, scale included.
    """
    n = A.shape[0]
    z = torch.bmm(x.reshape(n, -1, x.shape[-1]), A.transpose(1, 2))
    return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), z, B.transpose(1, 2)).view_as(y)
