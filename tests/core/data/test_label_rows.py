"""Rows with a label, a class or a rating: how they are read, their tokens, and what the report finds wrong."""

import pytest
from row_files import find_issues, write_jsonl
from tiny_tokenizer import CHATML, SMOLLM2_TOK, make_tokenizer, template_text
from tokenizers.processors import TemplateProcessing

from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.errors import DataError, SlimtuneError
from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.extras.ratings import RATING_HINT
from slimtune.extras.row_files import open_rows, read_rows
from slimtune.extras.row_formats.classification import sort_class_names
from slimtune.objectives.kto import KTO

HAM, SPAM = {"text": "See you at noon.", "label": "ham"}, {"text": "You won a prize!", "label": "spam"}
USER = {"role": "user", "content": "You won!"}
CLASSES, RATINGS = {"format": "classification"}, {"format": "unpaired-preference"}


@pytest.fixture
def read(tmp_path):
    return lambda *rows, **format: read_rows(write_jsonl(tmp_path / "a.jsonl", rows), **format)


@pytest.fixture
def issues(tmp_path):
    return lambda rows, **options: find_issues(write_jsonl(tmp_path / "a.jsonl", rows), SMOLLM2_TOK, **options)


def rows_of(**counts):
    return [{"text": f"text {i} of {name}", "label": name} for name, n in counts.items() for i in range(n)]


def rate(i, label, answer=" so"):
    return {"prompt": f"question {i}", "completion": f"{answer} {i}", "label": label}


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "names"),
    [("a b", ("a b",)), (" a", ("a",)), (3, ("3",)), (1.0, ("1",)), (True, ("True",)), ([], ()),
     (["b", 2], ("b", "2")), ('["b", "c"]', ("b", "c"))],
)  # fmt: skip
def test_label_becomes_names_of_classes(read, label, names):
    assert read({"text": "x", "label": label}, **CLASSES)[0].labels == names


@pytest.mark.parametrize("label", [None, "", " ", "\u200b", 1.5, float("nan"), {"a": 1}, ["a", "a"], [None]])
def test_label_that_is_no_label_is_named_with_its_line(read, label):
    with pytest.raises(DataError, match=r"a.jsonl:2: .*label"):
        read(HAM, {"text": "x", "label": label}, **CLASSES)


@pytest.mark.parametrize("row", [{"label": "a"}, {"label": "a", "text": "x", "messages": [USER]}])
def test_row_needs_a_text_or_messages(read, row):
    with pytest.raises(DataError, match=r"'text'.*'messages'"):
        read(row, **CLASSES)


def test_tokens_are_those_of_the_tokenizer_and_none_is_supervised(read):
    tokenizer = make_tokenizer(template_text("smollm2"), CHATML)
    bos = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    chat = {"messages": [USER], "label": ["spam", "prize"]}
    rows = tokenize_dataset(read(HAM, chat, **CLASSES), tokenizer, max_seq_len=64, source_path="a")[0]
    assert rows[0]["input_ids"] == tokenizer(HAM["text"])["input_ids"]
    assert set(rows[0]["labels"]) == {-100}
    assert tokenizer.decode(rows[1]["input_ids"]).rstrip().endswith("user\nYou won!<|im_end|>")


def test_sort_labels_orders_numbers_by_value():
    assert sort_class_names(["10", "9", "9"]) == ["9", "10"]
    assert sort_class_names(["b", "a", "10"]) == ["10", "a", "b"]


def test_report_finds_rare_and_similar_classes(issues):
    found = issues([*rows_of(spam=60, Spam=5), HAM], **CLASSES)
    assert found["similar-labels"]["count"] == 65
    assert found["class-imbalance"]["lines"] == [61, 62, 63, 64, 65]
    assert found["rare-class"]["lines"] == [66]


LOOKALIKES = {
    "composed and decomposed": ("caf\u00e9", "cafe\u0301"),
    "a zero-width space": ("spam", "spam\u200b"),
    "a soft hyphen inside": ("spam", "sp\u00adam"),
    "full-width letters": ("pos", "\uff50\uff4f\uff53"),
    "full-width digits": ("2", "\uff12"),
    "a byte order mark": ("ham", "\ufeffham"),
    "a mark of direction": ("ham", "ham\u200f"),
    "a control character": ("ham", "h\x1bam"),
    "a variation selector": ("\u2764", "\u2764\ufe0f"),
    "case and a no-break space": ("not spam", "Not\u00a0spam"),
}


@pytest.mark.parametrize("labels", LOOKALIKES.values(), ids=LOOKALIKES)
def test_labels_that_look_alike_are_told_with_the_fix(issues, labels):
    right, wrong = labels
    rows = [{"text": f"text {i} of {n}", "label": label} for n, label in enumerate(labels) for i in range(9 - n)]
    found = issues([*rows, *rows_of(other=9)], **CLASSES)["similar-labels"]
    assert found["count"] == 17
    for told in (found["what"], found["hint"]):  # the label to keep comes first
        assert 0 < told.index(ascii(right)) < told.index(ascii(wrong))


def test_labels_that_differ_to_the_eye_are_not_told(issues):
    names = ["caf\u00e9", "cafe", "\u4e2d", "\u56fd", "a-b", "ab", "1", "11"]
    rows = [{"text": f"text {i} of {name}", "label": name} for name in names for i in range(6)]
    assert "similar-labels" not in issues(rows, **CLASSES)


def test_label_of_validation_rows_that_looks_like_another_is_told(issues, tmp_path):
    other = write_jsonl(tmp_path / "b.jsonl", [HAM | {"label": "ham\u200b"}])
    issue = issues(rows_of(ham=9, eggs=9), validation=other, **CLASSES)["unseen-label"]
    assert r"'ham\u200b'" in issue["what"]


def test_one_class_is_an_error_unless_rows_have_none(issues):
    assert issues(rows_of(a=6), **CLASSES)["one-class"]["severity"] == "error"
    assert "one-class" not in issues([*rows_of(a=6), {"text": "other", "label": []}], **CLASSES)


def test_class_of_validation_rows_alone_is_an_error(issues, tmp_path):
    other = write_jsonl(tmp_path / "b.jsonl", [SPAM, HAM])
    issue = issues(rows_of(ham=9, eggs=9), validation=other, **CLASSES)["unseen-label"]
    assert (issue["severity"], issue["lines"]) == ("error", [1])
    assert "'spam'" in issue["what"]


# --- ratings, which KTO learns from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, False, "true", "False"])
def test_rating_is_read(read, tmp_path, label):
    assert read(rate(0, label), **RATINGS)[0].is_good is (label in (True, "true"))
    rows, _ = tokenize_dataset(open_rows(tmp_path / "a.jsonl", **RATINGS), SMOLLM2_TOK, max_seq_len=99, source_path="a")
    assert KTO().prepare_rows(rows)[0]["label"] is (label in (True, "true"))


@pytest.mark.parametrize("label", [2, -1, "goood", None, "", [True], 0.5])
def test_word_that_is_no_rating_is_named_with_its_line_and_the_ratings(read, label):
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'label' ") as caught:
        read(rate(0, True), rate(1, label), **RATINGS)
    assert caught.value.hint == RATING_HINT


@pytest.mark.parametrize("prompt", ["", " \n", [], None])
def test_rating_without_a_prompt_is_refused(read, prompt):
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'prompt'"):
        read(rate(0, True) | {"prompt": prompt}, **RATINGS)


def test_ratings_that_all_weigh_nothing_are_refused():
    with pytest.raises(SlimtuneError, match="undesirable_weight"):
        KTO(desirable_weight=0, undesirable_weight=0)


def test_one_rating_is_a_warning(issues):
    issue = issues([rate(i, True) for i in range(6)], **RATINGS)["one-label"]
    assert (issue["severity"], issue["count"]) == ("warning", 6)
    assert "one-label" not in issues([rate(0, True), rate(1, False)], **RATINGS)


# --- both ------------------------------------------------------------------------------------------------------------


def test_label_is_an_error_until_the_format_says_what_it_means(read):
    with pytest.raises(DataError, match="'label'"):
        read(HAM, SPAM)
    with pytest.raises(DataError, match="'label'") as error:
        read(rate(0, True), rate(1, False))
    assert all(flag in error.value.hint for flag in ("--format unpaired-preference", "--task kto"))
    assert KTO.formats == ("unpaired-preference",)


def test_contradictory_labels_are_found(issues):
    texts = [*rows_of(a=9, b=9), {"text": "text 3 of a", "label": "b"}]
    answers = [rate(0, True), rate(0, False, " other"), rate(1, True), rate(1, False)]
    for rows, options, lines in ((texts, CLASSES, [19]), (answers, RATINGS, [4])):
        found = issues(rows, **options)
        assert found["contradictory-label"]["lines"] == lines
        assert not {"same-answer", "duplicate"} & set(found)


@pytest.mark.parametrize("tokenizer", [SMOLLM2_TOK, None])
def test_report_counts_labels(tmp_path, tokenizer):
    file, options = tmp_path / "a.jsonl", {"model": None, "processes": 1}
    write_jsonl(file, rows_of(b=2, a=6))
    assert make_data_report(file, tokenizer, **options, **CLASSES).classes == {"a": 6, "b": 2}
    write_jsonl(file, [rate(i, i % 5 == 0) for i in range(20)])
    report = to_json_dict(make_data_report(file, tokenizer, **options, **RATINGS))
    assert report["classes"] == {"False": 16, "True": 4}
    assert any("4.00 to 5.33" in note for note in report["notes"])
