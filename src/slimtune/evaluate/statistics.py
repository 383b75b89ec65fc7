"""Is tuned better than base, and how sure is that? Pure numbers, no model.

Row i has t_i supervised tokens, on which the base spends b_i nats and the tuned model u_i. Both are scored on the same
rows, so their difference is taken row by row; how hard a row is falls out of it.

    gain = Σ (b_i - u_i) / Σ t_i          nats per token, positive is better: the difference of the two mean losses

The interval is the percentile bootstrap of that ratio: rows (not tokens: the tokens of one row belong together) are
drawn with replacement, numerator and denominator from the same draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Counts of one block of draws: 32 MB, whatever the number of rows.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Paired:
    """Base against tuned over the same rows.

    Args:
        base_loss: mean nats per supervised token of the base.
        tuned_loss: the same of the tuned model.
        gain: base_loss - tuned_loss.
        low: lower end of the interval of the gain.
        high: upper end.
        rows_better: rows on which the tuned model spends fewer nats.
    """

    base_loss: float
    tuned_loss: float
    gain: float
    low: float
    high: float
    rows_better: int


def paired(
    base: Sequence[float],
    tuned: Sequence[float],
    tokens: Sequence[int],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """Compare two models' summed nats per row, each of length R.

    Args:
        base: nats of the base, per row.
        tuned: nats of the tuned model, per row.
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
    difference, total = b - u, t.sum()
    gain = float(difference.sum() / total)
    low, high = np.quantile(_draws(difference, t, draws, seed), [(1 - level) / 2, (1 + level) / 2])
    return Paired(
        base_loss=float(b.sum() / total),
        tuned_loss=float(u.sum() / total),
        gain=gain,
        # Where every row says the same, rounding alone could leave the estimate a hair outside.
        low=min(float(low), gain),
        high=max(float(high), gain),
        rows_better=int((difference > 0).sum()),
    )


def perplexity(loss: float) -> float:
    """Return e^loss, infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def _draws(difference: np.ndarray, tokens: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return the gain of each draw, `[draws]`: how often each row came is multinomial."""
    rows = len(tokens)
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for left in range(draws, 0, -(step := max(1, _BLOCK // rows))):
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(step, left))
        found.append(counts @ difference / (counts @ tokens))
    return np.concatenate(found)
