"""Labels of answers that are rated good or bad."""

import pytest

from slimtune.extras.ratings import parse_rating
from slimtune.extras.row_columns import parse_row_or_error


@pytest.mark.parametrize("label", ["up", " Good", "1", "YES", "true", "👍", "👍🏽", "👍\ufe0f", "thumbs_up", 1, 1.0])
def test_words_for_a_good_answer(label):
    assert parse_rating(label) is True


@pytest.mark.parametrize("label", ["Down ", "bad", "0", "no", "False", "👎", "👎🏿", "Thumbs down", 0, 0.0, False])
def test_words_for_a_bad_answer(label):
    assert parse_rating(label) is False


@pytest.mark.parametrize("label", ["", "meh", 2, -1, None, [], "updown", float("nan")])
def test_anything_else_is_no_rating(label):
    assert parse_rating(label) is None


def test_a_wrong_label_is_answered_with_the_nearest_and_the_list():
    row = parse_row_or_error({"prompt": "q", "completion": "a", "label": "dwn"}, "unpaired-preference", 7)
    assert row.cause == "'label' is a string: dwn; did you mean 'down'?"
    assert all(part in row.hint for part in ("true, yes, good, up, 1 or 👍", "false, no, bad, down, 0 or 👎"))
