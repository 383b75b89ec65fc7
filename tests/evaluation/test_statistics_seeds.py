"""Intervals that hold what they promise, corrections and fronts by hand."""

import numpy as np
import pytest

from slimtune.evaluation.statistics import estimate_over_seeds, holm_correction, paired_bootstrap, pareto_front


def test_one_seed_is_what_a_bootstrap_of_rows_says():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 400)
    base = rng.gamma(2.0, 2.0, 400) * tokens
    tuned = base - tokens * rng.normal(0.3, 0.5, 400)
    found, boot = estimate_over_seeds([base - tuned], tokens), paired_bootstrap(base, tuned, tokens)
    width = boot.difference.high - boot.difference.low
    assert found.value == pytest.approx(boot.difference.value)
    assert found.low == pytest.approx(boot.difference.low, abs=0.1 * width)
    assert found.high == pytest.approx(boot.difference.high, abs=0.1 * width)


@pytest.mark.parametrize(("seed_sd", "row_sd"), [(0.1, 0.1), (0.1, 1.0), (0.02, 1.0)])
@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, seed_sd, row_sd):
    rng = np.random.default_rng(1)
    tokens, held = rng.integers(5, 60, 80), 0
    for _ in range(400):
        # The rows are a sample, the seeds are a sample, and each row answers each seed in its own way.
        each = 0.5 + rng.normal(0, row_sd, 80) + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 0.2, (seeds, 80))
        found = estimate_over_seeds(each * tokens, tokens)
        held += found.low <= 0.5 <= found.high
    assert held / 400 >= 0.93


def test_the_p_value_is_where_the_interval_reaches_zero():
    rng = np.random.default_rng(3)
    nats = rng.normal(0.1, 0.5, (3, 40)) + rng.normal(0, 0.05, (3, 1))
    found = estimate_over_seeds(nats, [1] * 40)
    assert (found.p < 0.05) == (found.low > 0)
    shifted = estimate_over_seeds(nats - found.low, [1] * 40)  # its interval begins at 0
    assert shifted.p == pytest.approx(0.05, abs=1e-6)


def test_seed_noise_widens_the_interval():
    rows = np.random.default_rng(2).normal(0.5, 0.3, 60)
    tokens = [10] * 60
    steady = estimate_over_seeds([rows * 10] * 3, tokens)
    shaken = estimate_over_seeds([(rows + s) * 10 for s in (-0.2, 0.0, 0.2)], tokens)
    assert shaken.value == pytest.approx(steady.value)
    assert shaken.high - shaken.low > 3 * (steady.high - steady.low)
    assert shaken.p > steady.p


def test_the_same_twice_differs_by_nothing():
    assert estimate_over_seeds([[0.0] * 5] * 3, [3] * 5) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("nats", "tokens"), [([], [1, 1]), ([[1.0]], [1]), ([[1.0, 2.0]], [1, 0]), ([[1.0, 2.0]], [1, 1, 1])]
)
def test_what_no_interval_can_be_made_of(nats, tokens):
    with pytest.raises(ValueError, match="two rows or more"):
        estimate_over_seeds(nats, tokens)


def test_holm_by_hand():
    # 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.5 × 1, none below the one before it.
    assert holm_correction([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm_correction([0.9, 0.8]) == [1.0, 1.0]
    assert holm_correction([]) == []


def test_a_front_by_hand():
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (2.0, 2.9), (4.0, 3.5), (1.0, 1.0)]
    assert pareto_front(points) == [True, True, False, False, True, True]
