"""Rows with a label: how they are read, their tokens, and what the report finds wrong with the labels."""

import json

import pytest
from tiny_tokenizer import make_tokenizer, template_text
from tokenizers.processors import TemplateProcessing

from slimtune.data.dataset import read_rows
from slimtune.data.formats import sort_labels
from slimtune.data.tokenize import tokenize_dataset
from slimtune.data.validation.report import validate_file
from slimtune.errors import DataError

TOK = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
HAM, SPAM = {"text": "See you at noon.", "label": "ham"}, {"text": "You won a prize!", "label": "spam"}
USER = {"role": "user", "content": "You won!"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows):
    return read_rows(write(tmp_path / "a.jsonl", rows), format="classification")


def find_issues(tmp_path, rows, tokenizer=TOK, **options):
    file = write(tmp_path / "a.jsonl", rows)
    report = validate_file(file, tokenizer, model="tiny", format="classification", processes=1, **options)
    return {issue["code"]: issue for issue in report["issues"]}


@pytest.mark.parametrize(
    ("label", "names"),
    [("a b", ("a b",)), (" a", ("a",)), (3, ("3",)), (1.0, ("1",)), (True, ("True",)), ([], ()),
     (["b", 2], ("b", "2")), ('["b", "c"]', ("b", "c"))],
)  # fmt: skip
def test_label_becomes_names_of_classes(tmp_path, label, names):
    assert read(tmp_path, {"text": "x", "label": label})[0].labels == names


@pytest.mark.parametrize("label", [None, "", " ", 1.5, float("nan"), {"a": 1}, ["a", "a"], [None]])
def test_label_that_is_no_label_is_named_with_its_line(tmp_path, label):
    with pytest.raises(DataError, match=r"a.jsonl:2: .*label"):
        read(tmp_path, HAM, {"text": "x", "label": label})


@pytest.mark.parametrize("row", [{"label": "a"}, {"label": "a", "text": "x", "messages": [USER]}])
def test_row_needs_a_text_or_messages(tmp_path, row):
    with pytest.raises(DataError, match=r"'text'.*'messages'"):
        read(tmp_path, row)


def test_label_beside_a_text_is_no_class_until_the_format_says_so(tmp_path):
    with pytest.raises(DataError, match="'label'"):
        read_rows(write(tmp_path / "a.jsonl", [HAM, SPAM]))


def test_tokens_are_those_of_the_tokenizer_and_none_is_supervised(tmp_path):
    tokenizer = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bos = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    chat = {"messages": [USER], "label": ["spam", "prize"]}
    rows = tokenize_dataset(read(tmp_path, HAM, chat), tokenizer, max_seq_len=64, path="a")[0]
    assert rows[0]["input_ids"] == tokenizer(HAM["text"])["input_ids"]
    assert set(rows[0]["labels"]) == {-100}
    assert tokenizer.decode(rows[1]["input_ids"]).rstrip().endswith("user\nYou won!<|im_end|>")


def test_sort_labels_orders_numbers_by_value():
    assert sort_labels(["10", "9", "9"]) == ["9", "10"]
    assert sort_labels(["b", "a", "10"]) == ["10", "a", "b"]


def rows_of(**counts):
    return [{"text": f"text {i} of {name}", "label": name} for name, n in counts.items() for i in range(n)]


def test_report_counts_classes(tmp_path):
    file = write(tmp_path / "a.jsonl", rows_of(b=2, a=6))
    for tokenizer in (TOK, None):
        report = validate_file(file, tokenizer, model=None, format="classification", processes=1)
        assert report["classes"] == {"a": 6, "b": 2}


def test_report_finds_rare_and_similar_classes(tmp_path):
    issues = find_issues(tmp_path, [*rows_of(spam=60, Spam=5), HAM])
    assert issues["similar-labels"]["count"] == 65
    assert issues["class-imbalance"]["lines"] == [61, 62, 63, 64, 65]
    assert issues["rare-class"]["lines"] == [66]


def test_one_class_is_an_error_unless_rows_have_none(tmp_path):
    assert find_issues(tmp_path, rows_of(a=6))["one-class"]["severity"] == "error"
    assert "one-class" not in find_issues(tmp_path, [*rows_of(a=6), {"text": "other", "label": []}])


def test_contradictory_labels_of_a_text_are_found(tmp_path):
    issues = find_issues(tmp_path, [*rows_of(a=9, b=9), {"text": "text 3 of a", "label": "b"}])
    assert issues["contradictory-label"]["lines"] == [19]
    assert "same-answer" not in issues


def test_class_of_validation_rows_alone_is_an_error(tmp_path):
    other = write(tmp_path / "b.jsonl", [SPAM, HAM])
    issue = find_issues(tmp_path, rows_of(ham=9, eggs=9), validation=other)["unseen-label"]
    assert issue["severity"] == "error"
    assert issue["lines"] == [1]
    assert "'spam'" in issue["what"]
