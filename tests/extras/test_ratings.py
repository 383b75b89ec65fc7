"""Labels of answers that are rated good or bad."""

import pytest

from slimtune.extras.ratings import RATING_HINT, RATINGS, parse_rating_or_none, suggest_rating
from slimtune.extras.row_columns import parse_row_or_error


@pytest.mark.parametrize("label", ["up", " Good", "1", "YES", "true", "👍", "👍🏽", "👍\ufe0f", "thumbs_up", 1, 1.0])
def test_words_for_a_good_answer(label):
    assert parse_rating_or_none(label) is True


@pytest.mark.parametrize("label", ["Down ", "bad", "0", "no", "False", "👎", "👎🏿", "Thumbs down", 0, 0.0, False])
def test_words_for_a_bad_answer(label):
    assert parse_rating_or_none(label) is False


@pytest.mark.parametrize("label", ["", "meh", 2, -1, None, [], "updown", float("nan")])
def test_anything_else_is_no_rating(label):
    assert parse_rating_or_none(label) is None


def test_a_wrong_label_is_answered_with_the_nearest_and_the_list():
    row = parse_row_or_error({"prompt": "q", "completion": "a", "label": "dwn"}, "unpaired-preference", 7)
    assert suggest_rating("dwn") in row.cause
    assert (row.code, row.hint) == ("bad-label", RATING_HINT)


def test_the_hint_has_every_word_but_the_long_ones():
    assert all(word in RATING_HINT for word in RATINGS if " " not in word)
