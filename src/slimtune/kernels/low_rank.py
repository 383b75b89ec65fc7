"""Products of two thin matrices: added to a weight, nearest to a change; and sums of changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(NamedTuple):
    """`A (r, in)` and `B (out, r)` near a change ΔW, with ‖ΔW − B A‖² and ‖ΔW‖²."""

    A: Tensor
    B: Tensor
    lost: float
    norm: float


@torch.no_grad()
def nearest_low_rank(
    change: Tensor | tuple[Tensor, Tensor], rank: float, clamp: float | None = None, driver: str | None = None
) -> LowRank:
    """Return the pair of `rank` nearest to a change.

    Args:
        change: ΔW `(out, in)`; or `A (k, in), B (out, k)` with ΔW = B A, which is then not formed.
        rank: the rank (int), cut to what the shape allows; or the share in (0, 1] of ‖ΔW‖² to keep (float).
        clamp: quantile of the pair's values beyond which they are cut off; None: they are not.
        driver: cuSOLVER's method, on CUDA.
    """
    if isinstance(change, Tensor):
        U, S, V = torch.linalg.svd(change, full_matrices=False, driver=driver)
    else:
        (Qb, Rb), (Qa, Ra) = torch.linalg.qr(change[1]), torch.linalg.qr(change[0].t())
        U, S, V = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False, driver=driver)
        U, V = Qb @ U, V @ Qa.t()
    energy = S.double().square().cumsum(0)
    norm = float(energy[-1])
    wanted = int(torch.searchsorted(energy, rank * norm)) + 1 if isinstance(rank, float) else rank
    r = min(int(wanted), U.shape[0], V.shape[1])
    A, B = V[:r], U[:, :r] * S[:r]
    if clamp is not None:
        limit = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    if A.shape[0] < r:  # a product of fewer terms than the rank asked for
        A, B = F.pad(A, (0, 0, 0, r - A.shape[0])), F.pad(B, (0, r - B.shape[1]))
    return LowRank(A, B, float(S[r:].double().square().sum()), norm)


def add_low_rank(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `W (out, in) + s · B (out, r) A (r, in)` in W's dtype."""
    return weight + (B.to(weight.dtype) @ A.to(weight.dtype)) * scale


def weighted_sum(
    parts: Sequence[Tensor], weights: Sequence[float], kind: str = "linear", density: float = 1, sign_by: str = "total"
) -> Tensor:
    """Return `Σ w_i p_i`; see `adapters/conversion.py` for the other kinds.

    Args:
        parts: matrices of one shape.
        weights: a factor for each.
        kind: "linear"; "magnitude_prune" keeps the largest values of each first, "dare_linear" keeps some by chance and
            scales them up; "ties" and "dare_ties" then take the mean of those whose sign is the elected one.
        density: share in (0, 1] of the values that are kept.
        sign_by: the sign is that of the sum ("total") or the most frequent one ("frequency").
    """
    if kind != "linear":
        parts = [_by_chance(p, density) if kind.startswith("dare") else _largest(p, density) for p in parts]
    stack = torch.stack(list(parts))
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, 1, 1)
    if not kind.endswith("ties"):
        return weighted.sum(0)
    votes = stack.sign()
    elected = torch.where((stack if sign_by == "total" else votes).sum(0) >= 0, 1, -1)
    agree = votes == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(part: Tensor, density: float) -> Tensor:
    mask = torch.zeros_like(part).view(-1)
    mask[part.abs().reshape(-1).topk(int(density * part.numel())).indices] = 1
    return part * mask.view_as(part)


def _by_chance(part: Tensor, density: float) -> Tensor:
    return part * torch.bernoulli(torch.full_like(part, density)) / density if density < 1 else part


class IncrementalPca:
    """The main directions of all rows so far.

    Args:
        most: how many directions are kept.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.directions: Tensor | None = None
        self.sizes = self.shares = self.mean = self.variance = torch.empty(0)

    def add(self, rows: Tensor) -> Tensor:
        """Take in `rows (n, in)`; return how far each direction stayed, as a cosine; 0 at first."""
        n = rows.shape[0]
        if n < self.most:
            return torch.zeros(self.most)
        before, centre = self.directions, rows.double().mean(0)
        variance = rows.double().var(0, correction=0)
        total = self.count + n
        # As PEFT: the first batch in fp32, later ones in float64; the random vectors of the SVD depend on it.
        X = (rows - centre).float()
        if before is not None:
            X = rows - rows.mean(0)
            apart = self.mean - centre
            X = torch.vstack([self.sizes[:, None] * before, X, (self.count / total * n) ** 0.5 * apart[None]])
            variance = (self.variance * self.count + variance * n + apart**2 * self.count * n / total) / total
            centre = (self.mean * self.count + centre * n) / total
        with torch.random.fork_rng():
            torch.manual_seed(42)
            _, S, V = torch.svd_lowrank(X, q=2 * self.most, niter=4)
        V = V.t()
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        self.directions, self.sizes = V[: self.most], S[: self.most]
        self.shares = S[: self.most] ** 2 / (variance * total).sum()
        self.mean, self.variance, self.count = centre, variance, total
        return torch.zeros(self.most) if before is None else torch.cosine_similarity(self.directions, before)
