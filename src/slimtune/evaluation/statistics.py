"""Is tuned better than base, and how sure is that? Pure numbers, no model.

Row i has t_i supervised tokens, on which the base spends b_i nats and the tuned model u_i. Both are scored on the same
rows, so their difference is taken row by row; how hard a row is falls out of it.

    gain = Σ (b_i - u_i) / Σ t_i          nats per token, positive is better: the difference of the two mean losses

Every figure here is such a ratio of sums, and its interval the percentile bootstrap of that ratio: rows (not tokens:
the tokens of one row belong together) are drawn with replacement, numerator and denominator from the same draw, and
every figure from the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Counts of one block of draws: 32 MB, whatever the number of rows.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Args:
        value: of all rows.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """`[low, high]`."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Paired:
    """Base against tuned over the same rows: means per token.

    Args:
        base: of the base.
        tuned: of the tuned model.
        difference: base - tuned.
        rows_better: rows on which the tuned model has less.
    """

    base: Estimate
    tuned: Estimate
    difference: Estimate
    rows_better: int


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    tokens: Sequence[int],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """Compare two models' sums per row (nats, or hits), each of length R.

    Args:
        base: of the base, per row.
        tuned: of the tuned model, per row.
        tokens: supervised tokens, per row (≥ 1).
        draws: bootstrap draws (≥ 1).
        seed: of the draws; the same seed gives the same interval.
        level: share of the draws inside the interval, 0 to 1.

    Raises:
        ValueError: no rows, lengths that differ, or a row without a token.
    """
    b, u, t = np.asarray(base, float), np.asarray(tuned, float), np.asarray(tokens, float)
    if not (b.shape == u.shape == t.shape and b.ndim == 1 and len(b) and (t > 0).all()):
        raise ValueError(f"wanted three rows of numbers of one length, tokens above 0; got {b.shape, u.shape, t.shape}")
    sums = np.stack([b, u, b - u], axis=1)
    found = sums.sum(0) / t.sum()
    low, high = np.quantile(_draws(sums, t, draws, seed), [(1 - level) / 2, (1 + level) / 2], axis=0)
    # Where every row says the same, rounding alone could leave the estimate a hair outside.
    low, high = np.minimum(low, found), np.maximum(high, found)
    of_base, of_tuned, difference = (Estimate(*map(float, three)) for three in zip(found, low, high, strict=True))
    return Paired(of_base, of_tuned, difference, rows_better=int((u < b).sum()))


def perplexity(loss: float) -> float:
    """Return e^loss, infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def _draws(sums: np.ndarray, tokens: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return the ratios of each draw, `[draws, m]`, from sums `[R, m]`: how often each row came is multinomial."""
    rows = len(tokens)
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for left in range(draws, 0, -(step := max(1, _BLOCK // rows))):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(step, left))
        found.append((counts @ sums) / (counts @ tokens)[:, None])
    return np.concatenate(found)
