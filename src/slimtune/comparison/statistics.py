"""What a mean over seeds and rows is worth, and whether two methods differ beyond noise. Pure numbers, no model.

Row i has t_i supervised tokens; a cell of seed s differs on it by d_si nats (base - tuned, or one method - another).

    g_s = Σ_i d_si / Σ_i t_i              of one seed, nats per token
    g   = mean of the g_s
    interval: g ± √(t²(R-1) v_rows + t²(S-1) v_seeds)      v_seeds = var(g_s) / S,  t: Student's at 0.975

v_rows is the variance of g over draws of rows, all seeds on the same draw (the linearised ratio: what a bootstrap of
rows converges to). Each part has its own degrees of freedom, and half widths add as lengths at a right angle do: one
number of degrees of freedom by Satterthwaite, estimated from three seeds, holds the truth too seldom where seeds vary
more than rows do (87 of 100 times with two seeds, 93 with three, in simulation; this: 95 to 99). What rows and seeds
do together is counted in both parts. With one seed v_seeds is not known: the interval then speaks of rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

ALPHA = 0.05
LEAST = 1e-12
"""No p-value is said to be below this."""


class Estimate(NamedTuple):
    """A difference in nats per token, its 95 % interval, and the p-value of it being 0."""

    value: float
    low: float
    high: float
    p: float


def estimate(nats: Sequence[Sequence[float]], tokens: Sequence[int]) -> Estimate:
    """Return the mean difference over seeds and rows, and how sure it is.

    Args:
        nats: `[seeds][rows]` differences of the same rows.
        tokens: supervised tokens of each row (≥ 1).

    Raises:
        ValueError: no seed, under two rows, or lengths that differ.
    """
    d, t = np.asarray(nats, float), np.asarray(tokens, float)
    if d.ndim != 2 or d.shape[1:] != t.shape or len(d) < 1 or len(t) < 2 or not (t > 0).all():
        raise ValueError(f"wanted [seeds][rows] and as many tokens, two rows or more; got {d.shape} and {t.shape}")
    seeds, rows = d.shape
    by_seed = d.sum(1) / t.sum()
    g = float(by_seed.mean())
    residual = d.mean(0) - g * t
    v_rows = float(rows / (rows - 1) * (residual**2).sum() / t.sum() ** 2)
    v_seeds = float(by_seed.var(ddof=1) / seeds) if seeds > 1 else 0.0
    # Below what sums of doubles round to, all say the same.
    if v_rows + v_seeds <= 1e-24:
        return Estimate(g, g, g, 1.0 if abs(g) < 1e-12 else 0.0)

    def half(alpha: float) -> float:
        """Return half the width of the interval that leaves the truth out `alpha` of the time."""
        of_rows = special.stdtrit(rows - 1, alpha / 2) ** 2 * v_rows
        of_seeds = special.stdtrit(seeds - 1, alpha / 2) ** 2 * v_seeds if seeds > 1 else 0.0
        return math.sqrt(of_rows + of_seeds)

    width = half(ALPHA)
    return Estimate(g, g - width, g + width, _p(abs(g), half))


def _p(distance: float, half: Callable[[float], float]) -> float:
    """Return the alpha of the interval that reaches just to 0."""
    if half(LEAST) <= distance:
        return LEAST
    return (
        1.0 if half(1.0) >= distance else float(optimize.brentq(lambda a: half(a) - distance, LEAST, 1.0, xtol=LEAST))
    )


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values as Holm corrects them for how many there are, in the order given."""
    adjusted, most = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = max(most, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = most
    return adjusted


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which of `(cost, quality)` no other point beats: none costs as little or less and is as good or better."""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]
