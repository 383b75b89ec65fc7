"""Rows whose question and answer are perhaps swapped."""

import json
from pathlib import Path

import pytest
from row_files import write_jsonl

from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.evaluation.data_report.swapped_texts import find_lines_with_swapped_sides, hash_prompt_and_answer_features
from slimtune.extras.row_files import read_rows

EXAMPLE = Path(__file__).parents[2] / "examples/devils-dictionary"
SHOP = [
    {"instruction": f"{start} order {i}?", "output": f"Thank you for writing. Order {i} {end}. Kind regards, the shop."}
    for i in range(8)
    for start, end in (
        ("Where is my", "left our house yesterday"),
        ("Can I return", "can be sent back within 30 days"),
        ("How do I pay for", "can be paid by card or by invoice"),
    )
]
TALK = [{"instruction": f"{a} {i}", "output": f"{b} {i}"} for i in range(12)
        for a, b in (("Hello there", "How are you"), ("How are you", "Hello there"))]  # fmt: skip


def swap(row):
    return {"instruction": row["output"], "output": row["instruction"]}


def find_lines(tmp_path, rows):
    report = make_data_report(write_jsonl(tmp_path / "a.jsonl", rows), None, model=None)
    return [line for issue in report.issues if issue.code == "swapped-texts" for line in issue.lines]


def test_a_swapped_row_of_a_shop_is_named_by_its_line(tmp_path):
    assert find_lines(tmp_path, [*SHOP[:9], swap(SHOP[9]), *SHOP[10:]]) == [10]


@pytest.mark.parametrize("rows", [SHOP, TALK, [*SHOP[:6], swap(SHOP[6])], [swap(r) for r in SHOP[:12]] + SHOP[12:]])
def test_rows_as_they_should_be_small_talk_few_rows_and_halves_are_not_judged(tmp_path, rows):
    assert find_lines(tmp_path, rows) == []


def test_pairs_are_judged_by_their_better_answer(tmp_path):
    pairs = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "No."} for r in SHOP]
    pairs[4] |= {"prompt": pairs[4]["chosen"], "chosen": pairs[4]["prompt"]}
    assert find_lines(tmp_path, pairs) == [5]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_real_rows_raise_no_false_alarm_and_at_least_half_of_the_swapped_ones_are_found(tmp_path, name):
    records = [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert (
        find_lines_with_swapped_sides(
            [s for r in read_rows(EXAMPLE / f"{name}.jsonl") if (s := hash_prompt_and_answer_features(r))]
        )
        == []
    )
    swapped = set(range(3, len(records), 40))
    for i in swapped:
        question, answer = records[i]["messages"][-2:]
        question["content"], answer["content"] = answer["content"], question["content"]
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", records))
    sides = [s for r in rows if (s := hash_prompt_and_answer_features(r))]
    found = {line - 1 for line in find_lines_with_swapped_sides(sides)}
    assert found <= swapped
    assert 2 * len(found) >= len(swapped)
