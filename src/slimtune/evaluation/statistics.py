"""Intervals and tests for differences of losses: over rows (`slimtune eval`), over seeds and rows (`slimtune compare`).

Row i has t_i supervised tokens, on which a model spends so many nats; two models are scored on the same rows, so their
difference is taken row by row and the difficulty of a row cancels. Every figure is a ratio of sums, in nats per token:

    difference = Σ_i d_i / Σ_i t_i

One run: the interval is the percentile bootstrap of that ratio. Rows (not tokens, because the tokens of one row belong
together) are drawn with replacement, numerator and denominator from the same draw.

Several seeds s with g_s = Σ_i d_si / Σ_i t_i and g = mean of the g_s:

    interval: g ± √(t²(R-1) v_rows + t²(S-1) v_seeds)      v_seeds = var(g_s) / S,  t: Student's at 0.975

v_rows is the variance of g over draws of rows, all seeds on the same draw (the linearised ratio, to which a bootstrap
of rows converges). Each part has its own degrees of freedom, and the half widths add in quadrature. One common number
of degrees of freedom (Satterthwaite), estimated from three seeds, covers the truth too rarely if seeds vary more than
rows (87 of 100 times with two seeds, 93 with three, in simulation; this: 95 to 99). With one seed v_seeds is unknown,
and the interval covers rows only.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .estimate import Estimate

MAX_COUNTS = 4_000_000
"""Counts held at once by the bootstrap: 32 MB, whatever the number of rows."""
MIN_P = 1e-12
"""Smallest p-value that is reported."""


class PairedEstimate(NamedTuple):
    """Two models over the same rows, per token."""

    first: Estimate
    second: Estimate
    difference: Estimate  # first - second


def format_interval(low: float, high: float) -> str:
    """Return an interval as `0.0120 to 0.0310`; one number if too few different rows leave no interval."""
    first, last = f"{low:.4f}", f"{high:.4f}"
    return first if first == last else f"{first} to {last}"


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], tokens_by_row: Sequence[int], *, draws: int = 2000, seed: int = 0
) -> PairedEstimate:
    """Compare the sums (nats, or hits) by row of two models, with 95 % intervals from `draws` draws of rows.

    Raises:
        ValueError: there are no rows, the lengths differ, or a row has no token.
    """
    a, b, t = np.asarray(first, float), np.asarray(second, float), np.asarray(tokens_by_row, float)
    if not (a.shape == b.shape == t.shape and a.ndim == 1 and len(a) and (t > 0).all()):
        raise ValueError(f"expected three lists of one length, tokens above 0; got {a.shape, b.shape, t.shape}")
    sums = np.stack([a, b, a - b], axis=1)
    drawn = [(counts @ sums) / (counts @ t)[:, None] for counts in _draw_counts(len(t), draws, seed)]
    return PairedEstimate(*_make_estimates(sums.sum(0) / t.sum(), np.concatenate(drawn)))


def bootstrap_share(parts: Sequence[float], wholes: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Estimate:
    """Return Σ parts / Σ wholes over rows with its 95 % interval from `draws` draws of rows.

    The wholes of single rows may be negative; their sum must be safely above 0.

    Raises:
        ValueError: there are no rows, the lengths differ, or the sum of the wholes is not above 0.
    """
    sums = np.stack([np.asarray(parts, float), np.asarray(wholes, float)], axis=1)
    if not len(sums) or not sums[:, 1].sum() > 0:
        raise ValueError(f"expected rows whose wholes sum to more than 0; got {len(sums)} rows")
    drawn = np.concatenate([counts @ sums for counts in _draw_counts(len(sums), draws, seed)])
    drawn = drawn[drawn[:, 1] > 0]
    total = sums.sum(0)
    return _make_estimates(total[:1] / total[1:], drawn[:, :1] / drawn[:, 1:])[0]


def _draw_counts(rows: int, draws: int, seed: int, width: int | None = None) -> Iterator[np.ndarray]:
    """Yield in blocks how often each row is drawn, int64 [block, rows]; a draw takes `width` numbers of memory."""
    rng, block = np.random.default_rng(seed), max(1, MAX_COUNTS // (width or rows))
    for done in range(0, draws, block):
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=min(block, draws - done))


def _make_estimates(values: np.ndarray, drawn: np.ndarray) -> list[Estimate]:
    """Return figures [M] with the 95 % intervals of their draws [draws, M]."""
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    # If every row gives the same value, rounding alone could leave the estimate just outside.
    low, high = np.minimum(low, values), np.maximum(high, values)
    return [Estimate(float(v), (float(a), float(b))) for v, a, b in zip(values, low, high, strict=True)]


def compute_f1(hits: Any, actual: Any, predicted: Any) -> np.ndarray:
    """Return F1 = 2 · hits / (actual + predicted), elementwise; 0 for a class that is neither there nor predicted."""
    total = np.asarray(actual) + np.asarray(predicted)
    return np.where(total > 0, 2 * np.asarray(hits) / np.maximum(total, 1), 0.0)


def estimate_macro_f1_with_interval(
    hit_counts: np.ndarray, label_counts: np.ndarray, predicted_counts: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Return macro-F1 with its 95 % interval from `draws` draws of rows.

    As in scikit-learn a class counts if it is the label or the prediction of a row.

    Args:
        hit_counts, label_counts, predicted_counts: for each row (or group of rows) and class, how often it is both, a
            label, a prediction; int [N, C].
    """

    def macro_f1(counts: np.ndarray) -> np.ndarray:
        """Return macro-F1 [draws, 1] of the rows as often as they are drawn [draws, N]."""
        labels, predictions = counts @ label_counts, counts @ predicted_counts
        present = (labels + predictions > 0).sum(-1)
        return (compute_f1(counts @ hit_counts, labels, predictions).sum(-1) / np.maximum(present, 1))[:, None]

    drawn = [macro_f1(counts) for counts in _draw_counts(len(hit_counts), draws, seed)]
    return _make_estimates(macro_f1(np.ones((1, len(hit_counts)), np.int64))[0], np.concatenate(drawn))[0]


def estimate_aucs_with_intervals(
    scores: np.ndarray, is_good: np.ndarray, groups: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Return how well each kind of score separates good rows from bad ones, with 95 % intervals.

    The area under the ROC curve is the probability that a good row scores higher than a bad one; a tie counts half.

    Args:
        scores: fp64 [M, N], M kinds of scores of N rows; all kinds meet the same draws. The last estimate returned is
            of the difference, first kind - second one, if there are two or more.
        is_good: bool [N], of both kinds.
        groups: int [N]; the rows of a group are drawn together.
        draws, seed: of the bootstrap; a draw without a good or without a bad row is left out.
    """

    def areas(weights: np.ndarray) -> np.ndarray:
        """Return the area of each kind for each draw [draws, M], from the weights of rows [draws, N]."""
        found = []
        for kind in scores:
            values, place = np.unique(kind, return_inverse=True)
            order = np.argsort(place, kind="stable")
            starts = np.searchsorted(place[order], np.arange(len(values)))
            good, bad = (np.add.reduceat((weights * part)[:, order], starts, axis=1) for part in (is_good, ~is_good))
            below = np.cumsum(bad, axis=1) - bad / 2
            found.append((good * below).sum(1) / np.maximum(good.sum(1) * bad.sum(1), 1e-300))
        both = (weights[:, is_good].sum(1) > 0) & (weights[:, ~is_good].sum(1) > 0)
        return np.stack(found, axis=1)[both]

    counts = _draw_counts(int(groups.max()) + 1, draws, seed, width=len(groups))
    drawn = np.concatenate([areas(block[:, groups].astype(float)) for block in counts])
    value = areas(np.ones((1, len(groups))))
    if len(scores) > 1:
        value, drawn = (np.column_stack([a, a[:, 0] - a[:, 1]]) for a in (value, drawn))
    return _make_estimates(value[0], drawn if len(drawn) else value)


def compute_perplexity_interval(loss: Estimate) -> Estimate | None:
    """Return e^loss with its interval; None if a float cannot hold it."""
    if loss.high >= 709:
        return None
    return Estimate(math.exp(loss.value), (math.exp(loss.low), math.exp(loss.high)))


def estimate_mean_difference_and_p_value(
    differences_by_seed_and_row: Sequence[Sequence[float]], tokens_by_row: Sequence[int]
) -> tuple[Estimate, float]:
    """Return the mean difference over seeds and rows with its 95 % interval, and the p-value of it being 0.

    Args:
        differences_by_seed_and_row: `[seeds][rows]`, nats, of the same rows.
        tokens_by_row: supervised tokens of each row, 1 or more.

    Raises:
        ValueError: there is no seed, there are fewer than two rows, or the lengths differ.
    """
    from scipy import optimize, special

    d, t = np.asarray(differences_by_seed_and_row, float), np.asarray(tokens_by_row, float)
    if d.ndim != 2 or d.shape[1:] != t.shape or len(d) < 1 or len(t) < 2 or not (t > 0).all():
        raise ValueError(f"expected [seeds][rows], as many tokens, and two rows or more; got {d.shape} and {t.shape}")
    seeds, rows = d.shape
    by_seed = d.sum(1) / t.sum()
    mean = float(by_seed.mean())
    residuals = d.mean(0) - mean * t
    v_rows = float(rows / (rows - 1) * (residuals**2).sum() / t.sum() ** 2)
    v_seeds = float(by_seed.var(ddof=1) / seeds) if seeds > 1 else 0.0
    if v_rows + v_seeds <= 1e-24:  # only rounding differs
        return Estimate(mean, (mean, mean)), 1.0 if abs(mean) < 1e-12 else 0.0

    def half_width(alpha: float) -> float:
        from_rows = special.stdtrit(rows - 1, alpha / 2) ** 2 * v_rows
        from_seeds = special.stdtrit(seeds - 1, alpha / 2) ** 2 * v_seeds if seeds > 1 else 0.0
        return math.sqrt(from_rows + from_seeds)

    # The p-value is the alpha of the interval that just reaches 0.
    distance = abs(mean)
    if half_width(MIN_P) <= distance:
        p = MIN_P
    elif half_width(1.0) >= distance:
        p = 1.0
    else:
        p = float(optimize.brentq(lambda alpha: half_width(alpha) - distance, MIN_P, 1.0, xtol=MIN_P))
    return Estimate(mean, (mean - half_width(0.05), mean + half_width(0.05))), p


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Return the p-values with Holm's correction for their number, in the given order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for position, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[i]))
        corrected[i] = largest
    return corrected


def mark_pareto_optimal(costs_and_qualities: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each `(cost, quality)` whether no other point costs at most as much and is at least as good."""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in costs_and_qualities)
        for cost, quality in costs_and_qualities
    ]
