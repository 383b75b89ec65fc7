"""Columns that a hint guesses from names and values, and errors with the file's own names."""

import json

import pytest

from slimtune.errors import DataError
from slimtune.extras.column_guesses import guess_columns_and_whether_by_order, make_column_flags_and_doubt
from slimtune.extras.row_files import open_rows

PAIRS = [{"Question": f"Describe a map {i}.", "good": f"A door {i}.", "bad": f"Bad {i}"} for i in range(6)]
SHOP = [{"Customer asks": f"Is it {i}?", "We reply": f"Yes, it is {i}.", "id": str(i)} for i in range(6)]


def write(tmp_path, records, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize(
    ("roles", "records", "expected"),
    [
        (("prompt", "chosen", "rejected"), PAIRS, {"prompt": "Question", "chosen": "good", "rejected": "bad"}),
        (  # one text is the worse answer to all
            ("prompt", "chosen", "rejected"),
            [{**pair, "bad": "No idea."} for pair in PAIRS],
            {"prompt": "Question", "chosen": "good", "rejected": "bad"},
        ),
        (("instruction", "output"), SHOP, {"instruction": "Customer asks", "output": "We reply"}),
        (
            ("text", "label"),
            [{"nr": i, "c1": f"A long mail about {i}", "c2": "ab"[i % 2]} for i in range(8)],
            {"text": "c1", "label": "c2"},
        ),
        (  # the answers come first, and one column is the same everywhere
            ("instruction", "output"),
            [{"source": "old shop", "b": f"Yes, {i}, of course", "a": f"And {i}?"} for i in range(8)],
            {"instruction": "a", "output": "b"},
        ),
        (("messages",), [{"talk": [{"role": "user", "content": "x"}]}], {"messages": "talk"}),
    ],
)
def test_columns_are_guessed_by_names_then_by_values(roles, records, expected):
    assert guess_columns_and_whether_by_order(roles, records)[0] == expected


def test_a_column_good_with_ratings_is_the_label_of_kto_rows():
    records = [{"asked": f"q {i}", "answer": f"a {i}", "good": "yn"[i % 2] == "y"} for i in range(6)]
    found, _ = guess_columns_and_whether_by_order(("prompt", "completion", "label"), records, ratings=True)
    assert found == {"prompt": "asked", "completion": "answer", "label": "good"}


def test_flags_are_quoted_and_columns_that_nobody_can_guess_are_left_open():
    assert make_column_flags_and_doubt("instruction", ("instruction", "output"), SHOP)[0] == (
        "--column 'instruction=Customer asks' --column 'output=We reply'"
    )
    assert "label=COLUMN" in make_column_flags_and_doubt("classification", ("text", "label"), [{"t": "abc"}])[0]


def test_a_hint_says_when_only_the_order_tells_the_better_answer():
    records = [{"q": f"x {i}?", "A": f"one {i}", "B": f"two {i}"} for i in range(4)]
    flags, unsure = make_column_flags_and_doubt("preference", ("prompt", "chosen", "rejected"), records)
    assert ("chosen=A" in flags, bool(unsure)) == (True, True)


def test_a_given_format_without_its_columns_is_answered_once_with_flags_to_paste(tmp_path):
    with pytest.raises(DataError) as caught:
        open_rows(write(tmp_path, PAIRS), format="preference")
    assert caught.value.hint.endswith("--column prompt=Question --column chosen=good --column rejected=bad")


def test_pasted_flags_read_the_file(tmp_path):
    columns = {"prompt": "Question", "chosen": "good", "rejected": "bad"}
    assert len(list(open_rows(write(tmp_path, PAIRS), columns=columns).require_valid_rows())) == 6


def test_the_hint_of_a_task_names_the_columns_of_its_rows(tmp_path):
    formats = ("preference", "ranked-preference")
    with pytest.raises(DataError) as caught:
        open_rows(write(tmp_path, PAIRS), expected_formats=formats)
    assert caught.value.hint.endswith(" --column prompt=Question --column chosen=good --column rejected=bad")


def test_flags_that_are_given_stay_in_the_hint(tmp_path):
    with pytest.raises(DataError) as caught:
        open_rows(write(tmp_path, PAIRS), format="preference", columns={"chosen": "bad"})
    assert caught.value.hint.endswith("--column chosen=bad --column prompt=Question --column rejected=good")


def test_errors_of_a_cell_speak_of_the_files_own_column(tmp_path):
    path = write(tmp_path, [{**SHOP[0], "We reply": ""}, {"Customer asks": "x"}, SHOP[2]])
    rows = list(open_rows(path, columns={"instruction": "Customer asks", "output": "We reply"}))
    assert [("'We reply'" in row.cause, "'output'" in row.cause) for row in rows[:2]] == [(True, False)] * 2


def test_prompts_alone_are_told_the_format_that_must_be_named(tmp_path):
    with pytest.raises(DataError) as caught:
        open_rows(write(tmp_path, [{"prompt": f"Is sky {i} blue?", "colour": "blue"} for i in range(4)]))
    assert caught.value.hint.endswith("or --format prompt, whose columns they have")
