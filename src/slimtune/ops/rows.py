"""Rows of one batch through different low-rank maps, as batched products.

    y[b] += s_b · B_b A_b x[b]          A_b (r_b, in), B_b (out, r_b): those of row b's adapter; ranks may differ

The factors are stacked, zero rows filling the smaller ranks, and gathered once for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank_rows(y: Tensor, x: Tensor, factors: Sequence, masks: Sequence[Tensor]) -> Tensor:
    """Return `y` with each row's own low-rank update added; rows in no mask stay as they are.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        factors: for each adapter `(A (r, in), B (out, r), scale)`.
        masks: for each adapter its rows, bool `(batch,)`; no row is in two.
    """
    rank = max(A.shape[0] for A, _, _ in factors)
    A = torch.stack([F.pad(A.to(x.dtype), (0, 0, 0, rank - A.shape[0])) for A, _, _ in factors])
    B = torch.stack([F.pad(B.to(x.dtype), (0, rank - B.shape[1])) * scale for _, B, scale in factors])
    which = torch.stack(list(masks)).to(torch.uint8)
    # One spare place at the end: rows of no adapter take it, and it is zero.
    at = torch.where(which.any(0).bool(), which.argmax(0), len(factors))
    A, B = (F.pad(t, (0, 0, 0, 0, 0, 1)).index_select(0, at) for t in (A, B))
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.baddbmm(y.reshape(y.shape[0], -1, y.shape[-1]), flat @ A.transpose(1, 2), B.transpose(1, 2))
    return out.view_as(y)
