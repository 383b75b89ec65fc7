"""What a mean over seeds and rows is worth, and whether two methods differ beyond noise. Pure numbers, no model.

Row i has t_i supervised tokens; a cell of seed s differs on it by d_si nats (base - tuned, or one method - another).

    g_s = Σ_i d_si / Σ_i t_i              of one seed, nats per token
    g   = mean of the g_s
    v   = v_rows + v_seeds                v_seeds = var(g_s) / S
    interval: g ± t(0.975, ν) √v          ν by Welch and Satterthwaite from S - 1 and R - 1 degrees of freedom

v_rows is the variance of g over draws of rows, all seeds on the same draw (the linearised ratio: what a bootstrap of
rows converges to). What rows and seeds do together is counted in both, so the interval is a little too wide rather than
too narrow. With one seed v_seeds is not known: the interval then speaks of rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


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
    v = v_rows + v_seeds
    # Below what sums of doubles round to, two cells are the same.
    if v <= 1e-24:
        return Estimate(g, g, g, 1.0 if abs(g) < 1e-12 else 0.0)
    parts = v_rows**2 / (rows - 1) + (v_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    freedom, error = v**2 / parts, math.sqrt(v)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Estimate(g, g - half, g + half, float(2 * stats.t.sf(abs(g) / error, freedom)))


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
