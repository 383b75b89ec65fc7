"""Measures of preferences, by hand."""

from functools import partial

import pytest
from hand_results import make_sft_result

from slimtune.evaluation.eval_result import LengthSubsetAccuracy
from slimtune.evaluation.preference_comparison import PreferenceComparison, measure_preferences
from slimtune.evaluation.statistics import paired_bootstrap


def pair(chosen: int, rejected: int) -> dict:
    """A pair whose answers have so many tokens, after a prompt of one."""
    labels = [-100, *range(chosen), -100, *range(rejected)]
    return {"input_ids": labels, "labels": labels, "line": 1, "row_lengths": [1 + chosen, 1 + rejected]}


def test_measures_by_hand():
    pairs = [pair(2, 4), pair(3, 1), pair(2, 2)]
    base, tuned = [[-4, -6], [-9, -2], [-5, -4]], [[-3, -8], [-6, -3], [-4, -5]]
    compare = partial(paired_bootstrap, draws=200)
    found = measure_preferences(pairs, base, tuned, compare)
    assert (found.base_accuracy.value, found.tuned_accuracy.value) == pytest.approx((1 / 3, 2 / 3))
    assert (found.base_token_accuracy.value, found.tuned_token_accuracy.value) == (0, 1)
    assert (found.base_margin.value, found.tuned_margin.value) == pytest.approx((-2, 1))
    assert found.margin_gain.value == pytest.approx(3)
    assert found.pairs_better == 3
    assert found.by_length["chosen_longer"] == LengthSubsetAccuracy(pairs=1, base_accuracy=0, tuned_accuracy=0)
    assert found.by_length["chosen_shorter"] == LengthSubsetAccuracy(pairs=1, base_accuracy=1, tuned_accuracy=1)
    assert not PreferenceComparison.list_reasons_not_better(make_sft_result(preference=found).measures)
    same = measure_preferences(pairs, base, base, compare)
    assert len(PreferenceComparison.list_reasons_not_better(make_sft_result(preference=same).measures)) == 1


def test_pairs_that_keep_their_sides_are_no_improvement():
    pairs, compare = [pair(2, 2), pair(2, 2)], partial(paired_bootstrap, draws=200)
    grown = measure_preferences(pairs, [[-6, -4], [-4, -6]], [[-6, -5], [-4, -7]], compare)
    assert len(PreferenceComparison.list_reasons_not_better(make_sft_result(preference=grown).measures)) == 1
    right = measure_preferences(pairs, [[-4, -6], [-4, -6]], [[-4, -7], [-4, -7]], compare)
    assert not PreferenceComparison.list_reasons_not_better(make_sft_result(preference=right).measures)
