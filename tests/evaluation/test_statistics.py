"""The statistics of paired comparisons: properties, coverage, and corrections by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.evaluation import statistics
from slimtune.evaluation.estimate import Estimate
from slimtune.evaluation.statistics import (
    compute_perplexity_interval,
    estimate_aucs_with_intervals,
    estimate_mean_difference_and_p_value,
    holm_correction,
    mark_pareto_optimal,
    paired_bootstrap,
)

ROWS = st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500), st.integers(1, 400)), min_size=1, max_size=30)
QUICK = settings(max_examples=60, deadline=None)


def exact(value: float) -> Estimate:
    """An estimate without spread."""
    return Estimate(value, (value, value))


def compare(rows):
    return paired_bootstrap(*zip(*rows, strict=True), draws=200)


@QUICK
@given(ROWS)
def test_estimate_is_inside_its_interval(rows):
    found = compare(rows)
    assert found.difference.value == pytest.approx(found.first.value - found.second.value, abs=1e-9)
    assert all(one.low <= one.value <= one.high for one in found)
    assert found.first.value == pytest.approx(sum(b for b, _, _ in rows) / sum(t for _, _, t in rows))


@QUICK
@given(ROWS, st.floats(0.01, 100))
def test_estimates_scale_with_the_unit(rows, unit):
    one, other = compare(rows), compare([(b * unit, u * unit, t) for b, u, t in rows])
    for a, b in zip(one, other, strict=True):
        assert (b.value, *b.ci95) == pytest.approx([x * unit for x in (a.value, *a.ci95)], rel=1e-9, abs=1e-9)


@QUICK
@given(ROWS)
def test_swapped_models_swap_the_interval(rows):
    one, other = compare(rows), compare([(u, b, t) for b, u, t in rows])
    gain, loss = one.difference, other.difference
    assert (loss.value, *loss.ci95) == pytest.approx((-gain.value, -gain.high, -gain.low), abs=1e-9)
    assert other.first.ci95 == pytest.approx(one.second.ci95, abs=1e-9)


@QUICK
@given(ROWS)
def test_same_model_twice_differs_by_zero(rows):
    assert compare([(b, b, t) for b, _, t in rows]).difference == exact(0.0)


def test_constant_difference_has_no_spread():
    tokens = np.arange(1, 50)
    assert paired_bootstrap(tokens * 4.0, tokens * 3.5, tokens).difference.ci95 == pytest.approx((0.5, 0.5))
    assert paired_bootstrap([12.0], [9.0], [3]).difference == exact(1.0)


def test_seed_decides_the_interval():
    rng = np.random.default_rng(3)
    rows = rng.random(40) * 9, rng.random(40) * 9, rng.integers(1, 9, 40)
    one, again, other = (paired_bootstrap(*rows, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_coverage_of_the_bootstrap():
    rng, hits = np.random.default_rng(0), 0
    for i in range(300):
        tokens = rng.integers(5, 80, 60)
        base = tokens * 4.0
        tuned = base - tokens * (0.3 + rng.normal(0, 0.5, 60))
        found = paired_bootstrap(base, tuned, tokens, draws=400, seed=i).difference
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 300 <= 0.98


def test_draws_in_blocks_equal_draws_at_once(monkeypatch):
    rows = np.arange(1.0, 21.0)
    at_once = paired_bootstrap(rows, rows**0.5, np.ones(20), draws=100)
    monkeypatch.setattr(statistics, "MAX_COUNTS", 140)
    assert paired_bootstrap(rows, rows**0.5, np.ones(20), draws=100).difference.low == pytest.approx(
        at_once.difference.low
    )


@pytest.mark.parametrize("rows", [([], [], []), ([1.0], [1.0], [0]), ([1.0, 2.0], [1.0], [1])])
def test_bad_rows(rows):
    with pytest.raises(ValueError, match="tokens"):
        paired_bootstrap(*rows)


def test_perplexity():
    found = compute_perplexity_interval(Estimate(1.0, (0.0, 2.0)))
    assert (found.value, *found.ci95) == pytest.approx((np.e, 1, np.e**2))
    assert compute_perplexity_interval(Estimate(1.0, (0.0, 1e4))) is None, "no float holds it"


# --- several seeds ----------------------------------------------------------------------------------------------------


def test_one_seed_equals_the_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 400)
    base = rng.gamma(2.0, 2.0, 400) * tokens
    tuned = base - tokens * rng.normal(0.3, 0.5, 400)
    (found, _), boot = (
        estimate_mean_difference_and_p_value([base - tuned], tokens),
        paired_bootstrap(base, tuned, tokens).difference,
    )
    assert found.value == pytest.approx(boot.value)
    assert found.ci95 == pytest.approx(boot.ci95, abs=0.1 * (boot.high - boot.low))


@pytest.mark.parametrize(("seed_sd", "row_sd"), [(0.1, 0.1), (0.1, 1.0), (0.02, 1.0)])
@pytest.mark.parametrize("seeds", [2, 3])
def test_coverage_over_seeds(seeds, seed_sd, row_sd):
    rng = np.random.default_rng(1)
    tokens, hits = rng.integers(5, 60, 80), 0
    for _ in range(400):
        # The rows are a sample, the seeds are a sample, and each row answers each seed in its own way.
        each = 0.5 + rng.normal(0, row_sd, 80) + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 0.2, (seeds, 80))
        found, _ = estimate_mean_difference_and_p_value(each * tokens, tokens)
        hits += found.low <= 0.5 <= found.high
    assert hits / 400 >= 0.93


def test_p_value_is_where_the_interval_reaches_zero():
    rng = np.random.default_rng(3)
    nats = rng.normal(0.1, 0.5, (3, 40)) + rng.normal(0, 0.05, (3, 1))
    found, p = estimate_mean_difference_and_p_value(nats, [1] * 40)
    assert (p < 0.05) == (found.low > 0)
    assert estimate_mean_difference_and_p_value(nats - found.low, [1] * 40)[1] == pytest.approx(0.05, abs=1e-6)


def test_seed_noise_widens_the_interval():
    rows = np.random.default_rng(2).normal(0.5, 0.3, 60)
    (steady, steady_p), (noisy, noisy_p) = (
        estimate_mean_difference_and_p_value([(rows + s) * 10 for s in shifts], [10] * 60)
        for shifts in ((0, 0, 0), (-0.2, 0.0, 0.2))
    )
    assert noisy.value == pytest.approx(steady.value)
    assert noisy.high - noisy.low > 3 * (steady.high - steady.low)
    assert noisy_p > steady_p


def test_no_difference():
    assert estimate_mean_difference_and_p_value([[0.0] * 5] * 3, [3] * 5) == (exact(0.0), 1.0)


@pytest.mark.parametrize(
    ("nats", "tokens"), [([], [1, 1]), ([[1.0]], [1]), ([[1.0, 2.0]], [1, 0]), ([[1.0, 2.0]], [1, 1, 1])]
)
def test_bad_differences(nats, tokens):
    with pytest.raises(ValueError, match=r"\[seeds\]\[rows\]"):
        estimate_mean_difference_and_p_value(nats, tokens)


def test_holm_correction():
    # 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.5 × 1, none below the one before it.
    assert holm_correction([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm_correction([0.9, 0.8]) == [1.0, 1.0]
    assert holm_correction([]) == []


def test_pareto_front():
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (2.0, 2.9), (4.0, 3.5), (1.0, 1.0)]
    assert mark_pareto_optimal(points) == [True, True, False, False, True, True]


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    good, scores = rng.random(40) < 0.4, rng.integers(0, 9, (2, 40)).astype(float)  # with ties
    found = estimate_aucs_with_intervals(scores, good, np.arange(40), draws=500)
    above = [kind[good][:, None] - kind[~good] for kind in scores]
    expected = [((difference > 0) + 0.5 * (difference == 0)).mean() for difference in above]
    assert [e.value for e in found] == pytest.approx([*expected, expected[0] - expected[1]])
    assert all(e.low < e.value < e.high for e in found)


def test_equal_scores_have_an_auc_of_chance():
    (found,) = estimate_aucs_with_intervals(np.zeros((1, 12)), np.arange(12) % 2 == 0, np.arange(12), draws=50)
    assert found == exact(0.5)
