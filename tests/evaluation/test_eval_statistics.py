"""The statistics of a paired comparison, by their properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.evaluation.statistics import paired_bootstrap, perplexity

ROWS = st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500), st.integers(1, 400)), min_size=1, max_size=30)
QUICK = settings(max_examples=60, deadline=None)


def of(rows, **options):
    base, tuned, tokens = zip(*rows, strict=True)
    return paired_bootstrap(base, tuned, tokens, draws=200, **options)


def figures(one):
    return one.value, one.low, one.high


@QUICK
@given(ROWS)
def test_difference_of_means_is_inside_its_interval(rows):
    found = of(rows)
    base, tuned, gain = found.base, found.tuned, found.difference
    assert gain.value == pytest.approx(base.value - tuned.value, abs=1e-9)
    for one in (base, tuned, gain):
        assert one.low <= one.value <= one.high
    assert base.value == pytest.approx(sum(b for b, _, _ in rows) / sum(t for _, _, t in rows))
    assert found.rows_better == sum(u < b for b, u, _ in rows)


@QUICK
@given(ROWS, st.floats(0.01, 100))
def test_nats_in_another_unit_give_everything_in_that_unit(rows, unit):
    one, other = of(rows), of([(b * unit, u * unit, t) for b, u, t in rows])
    for name in ("base", "tuned", "difference"):
        wanted = [x * unit for x in figures(getattr(one, name))]
        assert figures(getattr(other, name)) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@QUICK
@given(ROWS)
def test_swapping_the_models_turns_the_interval_round(rows):
    one, other = of(rows), of([(u, b, t) for b, u, t in rows])
    gain = one.difference
    assert figures(other.difference) == pytest.approx((-gain.value, -gain.high, -gain.low), abs=1e-9)
    assert figures(other.base) == pytest.approx(figures(one.tuned), abs=1e-9)


@QUICK
@given(ROWS)
def test_the_same_model_twice_gains_exactly_nothing(rows):
    found = of([(b, b, t) for b, _, t in rows])
    assert (*figures(found.difference), found.rows_better) == (0.0, 0.0, 0.0, 0)


def test_one_row_leaves_no_spread():
    found = paired_bootstrap([12.0], [9.0], [3])
    assert figures(found.difference) == (1.0, 1.0, 1.0)


def test_constant_difference_has_no_spread():
    tokens = np.arange(1, 50)
    found = paired_bootstrap(tokens * 4.0, tokens * 3.5, tokens).difference
    assert found.low == pytest.approx(0.5) == found.high


def test_the_seed_decides_the_interval():
    rng = np.random.default_rng(3)
    base, tuned, tokens = rng.random(40) * 9, rng.random(40) * 9, rng.integers(1, 9, 40)
    assert paired_bootstrap(base, tuned, tokens, seed=1) == paired_bootstrap(base, tuned, tokens, seed=1)
    assert paired_bootstrap(base, tuned, tokens, seed=1) != paired_bootstrap(base, tuned, tokens, seed=2)


def test_coverage_of_the_interval():
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
    monkeypatch.setattr("slimtune.evaluation.statistics.MAX_COUNTS", 140)
    in_blocks = paired_bootstrap(rows, rows**0.5, np.ones(20), draws=100)
    assert in_blocks.difference.low == pytest.approx(at_once.difference.low)


@pytest.mark.parametrize("rows", [([], [], []), ([1.0], [1.0], [0]), ([1.0, 2.0], [1.0], [1])])
def test_no_rows_or_rows_without_tokens_are_refused(rows):
    with pytest.raises(ValueError, match="tokens above 0"):
        paired_bootstrap(*rows)


def test_a_perplexity_that_no_float_holds_is_infinite():
    assert perplexity(1.0) == pytest.approx(np.e)
    assert perplexity(1e4) == float("inf")
