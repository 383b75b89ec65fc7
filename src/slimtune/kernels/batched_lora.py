"""Rows of one batch through different low-rank maps, as batched products.

    y[b] += s_b · B_b A_b x[b]          A_b (r_b, in), B_b (out, r_b): those of row b's adapter; ranks may differ

Neighbouring rows of one adapter go through its factors together: the batch lies in n groups of equal size, and the
factors are stacked once for each group, zeros filling the smaller ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def group_names(names: Sequence[str]) -> list[str]:
    """Return the names of the groups: the longest ones of equal size whose rows all have one name."""
    size = math.gcd(*(len(list(run)) for _, run in itertools.groupby(names)))
    return list(names[::size])


def stack_factors(factors: Sequence[tuple[Tensor, Tensor, float] | None], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `A (n, r, in)` and `B (n, out, r)`, scales included, in the dtype of `like`.

    Args:
        factors: for each group `(A (r, in), B (out, r), scale)`, None where its rows stay as they are.
        like: the input they are for.
    """
    there = [f for f in factors if f is not None]
    rank, (A0, B0, _) = max(A.shape[0] for A, _, _ in there), there[0]
    if torch.is_grad_enabled():
        none = A0.new_zeros(rank, A0.shape[1]), B0.new_zeros(B0.shape[0], rank), 1.0
        full = [none if f is None else f for f in factors]
        A = torch.stack([F.pad(A.to(like.dtype), (0, 0, 0, rank - A.shape[0])) for A, _, _ in full])
        return A, torch.stack([F.pad(B.to(like.dtype), (0, rank - B.shape[1])) * scale for _, B, scale in full])
    # Each value is written once, in its place.
    A, B = like.new_zeros(len(factors), rank, A0.shape[1]), like.new_zeros(len(factors), B0.shape[0], rank)
    for at, found in enumerate(factors):
        if found is not None:
            r = found[0].shape[0]
            A[at, :r].copy_(found[0])
            B[at, :, :r].copy_(found[1])
    return A, B.mul_(B.new_tensor([1.0 if f is None else f[2] for f in factors]).view(-1, 1, 1))


def add_low_rank_rows(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return `y` with each row's own low-rank update added.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        A: `(n, r, in)` for n groups of rows.
        B: `(n, out, r)`.
    """
    n = A.shape[0]
    z = torch.bmm(x.reshape(n, -1, x.shape[-1]), A.transpose(1, 2))
    return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), z, B.transpose(1, 2)).view_as(y)
