"""The losses of tokens and answers that a policy has sampled, with the ratios clipped as in PPO (1707.06347).

    ρ     p(token) / p_old(token)                                    of an answer: the product over its tokens
    loss  −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A)                    A: the answer's advantage
    KL    p_ref / p − log(p_ref / p) − 1                             an estimate for each token that is never negative
    w     p_old(token) / p_sampler(token)                            where another program sampled, within bounds

Tokens of all answers are one after another, [T]; `counts` are those of each answer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ClippedLosses(NamedTuple):
    """The loss of each token or answer, its ratio, and whether that was clipped, so that the loss has no gradient."""

    losses: Tensor
    ratios: Tensor
    clipped: Tensor


def compute_clipped_losses(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float
) -> ClippedLosses:
    """Return the losses of tokens or answers [N] from log p, log p when they were sampled, and advantages, all [N]."""
    ratios = torch.exp(logps - old_logps)
    losses = -torch.min(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    too_low, too_high = ratios < 1 - epsilon, ratios > 1 + epsilon_high
    return ClippedLosses(losses, ratios, (too_low & (advantages < 0)) | (too_high & (advantages > 0)))


def compute_importance_weights(
    differences: Tensor, counts: Sequence[int], mode: str, clip_min: float | None, clip_max: float | None
) -> Tensor:
    """Return TRL's weights of tokens [T], or of answers [N], for answers that another program sampled.

    Args:
        differences: log p of each token where it is learned, minus that where it was sampled [T].
        counts: tokens of each answer.
        mode: "token_…": the ratio of each token; "sequence_…": that of the whole answer; "…_truncate": a ratio is
            clipped to the bounds; "…_mask": one outside of them becomes 0.
        clip_min, clip_max: the bounds; None: none.
    """
    level, _, limit = mode.partition("_")
    ratios = (sum_by_answer(differences, counts) if level == "sequence" else differences).exp()
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    if limit == "truncate":
        return ratios.clamp(low, high)
    return ratios.masked_fill((ratios < low) | (ratios > high), 0.0)


def estimate_token_kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return an estimate of the KL divergence from the reference at each sampled token [T]; its mean is unbiased."""
    differences = reference_logps - logps
    return differences.exp() - differences - 1


def sum_by_answer(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sum of the values of each answer's tokens [N]."""
    # index_add_ would add in another order each time on a GPU.
    return torch.stack([part.sum() for part in values.split(list(counts))])


def repeat_for_tokens(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the value of each answer [N] for each of its tokens [T]."""
    return values.repeat_interleave(torch.tensor(list(counts), device=values.device))


def remove_padding(padded: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the values of tokens [T] from rows that are padded on the right [N, L]."""
    return torch.cat([row[:count] for row, count in zip(padded, counts, strict=True)])
