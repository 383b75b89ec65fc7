"""Rows of KTO: how they are read, and what the data report says about them."""

import json

import pytest
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data.dataset import open_rows, read_rows
from slimtune.data.labels import encode_goodness
from slimtune.data.tokenize import tokenize_dataset
from slimtune.data.validation.report import validate_file
from slimtune.errors import DataError
from slimtune.objectives.kto import KTO

TOK = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
FORMAT = {"format": "unpaired-preference"}


def write(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rate(i, label, answer=" so"):
    return {"prompt": f"question {i}", "completion": f"{answer} {i}", "label": label}


def find_issues(path):
    return {issue["code"]: issue for issue in validate_file(path, TOK, model="tiny", processes=1, **FORMAT)["issues"]}


@pytest.mark.parametrize("label", [True, False, "true", "False"])
def test_label_is_read(tmp_path, label):
    path = write(tmp_path, rate(0, label))
    assert read_rows(path, **FORMAT)[0].is_good is (label in (True, "true"))
    rows, _ = tokenize_dataset(open_rows(path, **FORMAT), TOK, max_seq_len=99, path=path)
    assert encode_goodness(rows)[0]["label"] is (label in (True, "true"))


@pytest.mark.parametrize("label", [1, 0, "good", None, "", [True], 0.0])
def test_label_that_is_no_boolean_is_named_with_its_line(tmp_path, label):
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'label' is .*: wanted true for a good answer"):
        read_rows(write(tmp_path, rate(0, True), rate(1, label)), **FORMAT)


def test_label_is_an_error_without_the_task(tmp_path):
    with pytest.raises(DataError, match="rows that it rates low would be learned like the others") as error:
        read_rows(write(tmp_path, rate(0, True), rate(1, False)))
    assert "--format unpaired-preference (--task kto in training)" in error.value.hint
    assert KTO.formats == ("unpaired-preference",)


def test_one_label_is_a_warning(tmp_path):
    issue = find_issues(write(tmp_path, *(rate(i, True) for i in range(6))))["one-label"]
    assert (issue["severity"], issue["count"]) == ("warning", 6)
    assert "one-label" not in find_issues(write(tmp_path, rate(0, True), rate(1, False)))


def test_answer_with_two_labels_is_a_contradiction(tmp_path):
    rows = [rate(0, True), rate(0, False, " other"), rate(1, True), rate(1, False)]
    issues = find_issues(write(tmp_path, *rows))
    assert issues["contradictory-label"]["lines"] == [4]
    assert "duplicate" not in issues


def test_report_counts_labels_and_says_what_balances_them(tmp_path):
    path = write(tmp_path, *(rate(i, i % 5 == 0) for i in range(20)))
    for tokenizer in (TOK, None):
        report = validate_file(path, tokenizer, model=None, processes=1, **FORMAT)
        assert report["classes"] == {"False": 16, "True": 4}
        assert "4 good and 16 bad answers: a task.desirable_weight of 4.00 to 5.33 balances them" in report["notes"]
