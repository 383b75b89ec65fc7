"""What a form learns of a file's columns: names, first rows, the format, and a guess of the roles."""

import json

import pytest

from slimtune.extras import column_preview
from slimtune.extras.column_preview import read_column_preview


@pytest.fixture
def preview(tmp_path):
    def read(text, name="rows.csv"):
        (tmp_path / name).write_text(text)
        return read_column_preview(tmp_path / name)

    return read


def test_a_column_of_names_is_no_answer(preview):
    rows = "".join(f"where is {i}?,it is at {i},{'ann' if i % 2 else 'ben'}\n" for i in range(8))
    found = preview("Customer asks,We reply,Agent\n" + rows)
    assert (found.columns, found.rows, found.format) == (["Customer asks", "We reply", "Agent"], 8, None)
    assert found.suggested_format == "instruction"
    assert found.guesses["instruction"] == {"instruction": "Customer asks", "output": "We reply"}


def test_roles_that_stand_in_the_file_are_found(preview):
    line = json.dumps({"instruction": "Do it", "Input": "this", "output": "done", "system": "be brief"})
    found = preview(line + "\n", "rows.jsonl")
    assert found.format == "instruction"
    assert found.guesses["instruction"] == {
        "instruction": "instruction", "input": "Input", "output": "output", "system": "system",
    }  # fmt: skip


def test_only_the_order_tells_which_answer_is_better(preview):
    found = preview("q,a1,a2\n" + "".join(f"what {i}?,one {i},two {i}\n" for i in range(4)))
    assert "preference" in found.unsure


def test_rows_are_shown_shortened_and_counted_up_to_a_limit(preview, monkeypatch):
    monkeypatch.setattr(column_preview, "COUNTED_ROWS", 50)
    found = preview("a,b\n" + f"{'x' * 5000},1\n" * 200)
    assert (found.rows, found.has_more_rows) == (50, True)
    assert len(found.records) == 3
    assert len(found.records[0]["a"]) < 300


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", ""), ("a.jsonl", "{"), ("a.json", "[1, 2"), ("a.exe", "x"), ("a.csv", "a,a\n1,2\n")]
)
def test_what_cannot_be_read_says_why(preview, name, text):
    assert preview(text, name).error
