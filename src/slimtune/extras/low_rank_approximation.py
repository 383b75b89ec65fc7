"""The nearest low-rank matrices of a weight change, and weighted sums of weight changes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankApproximation(NamedTuple):
    """`A (r, in)` and `B (out, r)` near a change ΔW, with ‖ΔW − B A‖² and ‖ΔW‖²."""

    A: Tensor
    B: Tensor
    squared_error: float
    squared_norm: float


@torch.no_grad()
def make_low_rank_approximation(
    weight_change_or_factors: Tensor | tuple[Tensor, Tensor],
    rank_or_energy_fraction: float,
    clamp: float | None = None,
    driver: str | None = None,
) -> LowRankApproximation:
    """Return the nearest pair of a given rank to a weight change, by SVD.

    Args:
        weight_change_or_factors: ΔW `(out, in)`; or `A (k, in), B (out, k)` with ΔW = B A, which is not computed then.
        rank_or_energy_fraction: int: the rank, limited by the shape; or float in (0, 1]: the fraction of ‖ΔW‖² to keep.
        clamp: quantile of the pair's values above which they are clamped; None: no clamping.
        driver: cuSOLVER method on CUDA.
    """
    if isinstance(weight_change_or_factors, Tensor):
        U, S, V = torch.linalg.svd(weight_change_or_factors, full_matrices=False, driver=driver)
    else:
        (Qb, Rb), (Qa, Ra) = (
            torch.linalg.qr(weight_change_or_factors[1]),
            torch.linalg.qr(weight_change_or_factors[0].t()),
        )
        U, S, V = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False, driver=driver)
        U, V = Qb @ U, V @ Qa.t()
    energy = S.double().square().cumsum(0)
    total = float(energy[-1])
    wanted = (
        int(torch.searchsorted(energy, rank_or_energy_fraction * total)) + 1
        if isinstance(rank_or_energy_fraction, float)
        else rank_or_energy_fraction
    )
    r = min(int(wanted), U.shape[0], V.shape[1])
    A, B = V[:r], U[:, :r] * S[:r]
    if clamp is not None:
        limit = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    if A.shape[0] < r:  # the product had a lower rank than `rank`
        A, B = F.pad(A, (0, 0, 0, r - A.shape[0])), F.pad(B, (0, r - B.shape[1]))
    return LowRankApproximation(A, B, float(S[r:].double().square().sum()), total)


def combine_weighted_matrices(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    combination: str = "linear",
    density: float = 1,
    sign_by: str = "total",
) -> Tensor:
    """Return `Σ w_i p_i`, optionally of pruned matrices; see `extras/lora_conversion.py`.

    Args:
        matrices: matrices of one shape.
        weights: one coefficient per matrix.
        combination: "linear": no pruning. "magnitude_prune" keeps each matrix's largest values, "dare_linear" random
            ones, which it scales up. "ties" and "dare_ties" then average the values that have the elected sign.
        density: fraction in (0, 1] of the values to keep.
        sign_by: elected sign: the sign of the sum ("total") or the most frequent one ("frequency").
    """
    if combination.startswith("dare") and density < 1:
        matrices = [p * torch.bernoulli(torch.full_like(p, density)) / density for p in matrices]
    elif combination in ("ties", "magnitude_prune"):
        matrices = [_keep_largest(p, density) for p in matrices]
    stack = torch.stack(list(matrices))
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, 1, 1)
    if not combination.endswith("ties"):
        return weighted.sum(0)
    signs = stack.sign()
    elected = torch.where((stack if sign_by == "total" else signs).sum(0) >= 0, 1, -1)
    agree = signs == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _keep_largest(part: Tensor, density: float) -> Tensor:
    mask = torch.zeros_like(part).view(-1)
    mask[part.abs().reshape(-1).topk(int(density * part.numel())).indices] = 1
    return part * mask.view_as(part)
