"""Preference pairs and ranked lists of answers: how they are read, and what the report says about them."""

import json

import pytest
from row_files import find_issues, write_jsonl
from tiny_tokenizer import SMOLLM2_TOK

from slimtune.core.data.rows import InvalidRow
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.errors import DataError
from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.extras.row_files import open_rows

BEST_FIRST = ("good", "fair", "bad")


@pytest.fixture
def read(tmp_path):
    """Return the rows of a file with one list, and that list."""

    def make(**row):
        rows = open_rows(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q:", **row}]))
        return rows, next(iter(rows))

    return make


@pytest.fixture
def issues(tmp_path):
    return lambda rows: find_issues(write_jsonl(tmp_path / "a.jsonl", rows), SMOLLM2_TOK)


# --- lists -----------------------------------------------------------------------------------------------------------


def completions(key, values, answer="response"):
    return [{answer: text, key: v, "model": "m"} for text, v in zip((" fair", " good", " bad"), values, strict=True)]


@pytest.mark.parametrize(
    "row",
    [
        {"completions": completions("score", [2, 3.5, -1])},
        {"completions": completions("overall_score", [2, "3.5", 1], "content")},
        {"completions": completions("rank", [2, 1, 3], "answer")},
        {"responses": [" fair", " good", " bad"], "scores": [2, 3, 1]},
        {"responses": [" fair", " good", " bad"], "rankings": [2, 1, 3]},
        {"responses": [" fair", " good", " bad"], "scores": [2, 3, 1], "rankings": [2, 1, 3]},
        {"completions": [c | {"rank": None} for c in completions("score", [2, 3.5, -1])]},
        {"responses": json.dumps([" fair", " good", " bad"]), "scores": "[2, 3, 1]"},
    ],
)
def test_answers_are_read_best_first(read, row):
    rows, found = read(**row)
    assert rows.format == "ranked-preference"
    assert found.answers == BEST_FIRST
    assert list(found.scores) == sorted(found.scores, reverse=True)


def test_rows_of_a_list_share_their_prompt(read):
    prompt = [{"role": "user", "content": "Hi"}]
    rows, _ = read(prompt=prompt, responses=["a", "b", "c"], scores=[1, 3, 1])
    example = tokenize_dataset(rows, SMOLLM2_TOK, max_seq_len=99, source_path="a")[0][0]
    assert example["row_scores"] == [3, 1, 1]
    assert len(example["row_lengths"]) == 3
    texts = SMOLLM2_TOK.decode([t for t in example["labels"] if t >= 0])
    assert [texts.index(text) for text in "bac"] == sorted(texts.index(text) for text in "bac")


@pytest.mark.parametrize(
    ("row", "code", "cause"),
    [
        ({"responses": ["a", "b"], "scores": [1, 1]}, "tied-answers", "nothing to prefer"),
        ({"responses": ["a"], "scores": [1]}, "tied-answers", "nothing to prefer"),
        ({"responses": ["a", "b"], "scores": [1]}, "bad-list", "has 2 responses and 1 scores"),
        ({"responses": ["a", "b"], "scores": [1, None]}, "bad-score", "the score of answer 2 is empty"),
        ({"responses": ["a", "b"], "scores": [1, "N/A"]}, "bad-score", "the score of answer 2 is a string: N/A"),
        ({"responses": ["a", "b"], "scores": [1, True]}, "bad-score", "wanted a number"),
        ({"responses": ["a", " "], "scores": [1, 2]}, "empty-content", "answer 2 is empty"),
        ({"completions": [{"text": "a", "score": 1}]}, "bad-list", "has 'text', 'score': wanted an answer"),
        ({"completions": [{"answer": "a", "score": 1}, {"answer": "b", "rank": 1}]}, "bad-list", "others with a score"),
        ({"completions": [{"answer": "a", "score": 9, "rank": 2}, {"answer": "b", "score": 1, "rank": 1}]},
         "contradictory-rank", "answer 1 has a higher score than answer 2"),
        ({"responses": ["a", "b"], "scores": [1, 9], "rankings": [1, 2]}, "contradictory-rank", "answer 2 has"),
    ],
)  # fmt: skip
def test_faulty_list(read, row, code, cause):
    _, found = read(**row)
    assert (type(found), found.code) == (InvalidRow, code)
    assert cause in found.cause


def test_equal_answers_with_different_scores_are_refused(read):
    rows, _ = read(responses=[" a", " b", " a"], scores=[3, 2, 1])
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*scores"):
        tokenize_dataset(rows, SMOLLM2_TOK, max_seq_len=99, source_path="a")


# --- the report on pairs ---------------------------------------------------------------------------------------------


def pair(i, chosen, rejected):
    return {"prompt": f"question {i}:", "chosen": chosen, "rejected": rejected}


def make_pairs(longer, shorter):
    long, short = " a much longer answer than that", " brief"
    return [pair(i, long, short) if i < longer else pair(i, short, long) for i in range(longer + shorter)]


def test_pair_that_an_earlier_one_contradicts(issues):
    pairs = [pair(0, " A", " B"), pair(1, " A", " B"), pair(0, " B", " A"), pair(0, " C", " A"), pair(0, " A", " B")]
    found = issues(pairs)
    assert found["contradictory-pair"]["lines"] == [3, 5]
    assert "line 3 contradicts line 1" in found["contradictory-pair"]["what"]
    assert "contradiction" not in found


def test_contradiction_of_messages_and_of_lists(issues):
    user, (yes, no) = [{"role": "user", "content": "Q"}], ([{"role": "assistant", "content": t}] for t in ("yes", "no"))
    messages = [{"prompt": user, "chosen": a, "rejected": b} for a, b in ((yes, no), (no, yes))]
    lists = [{"prompt": "Q", "responses": [" a", " b", " c"], "scores": scores} for scores in ([3, 2, 1], [1, 2, 3])]
    for rows in (messages, lists):
        assert issues(rows)["contradictory-pair"]["lines"] == [2]


@pytest.mark.parametrize(("longer", "shorter", "leaks"), [(28, 2, True), (2, 28, True), (18, 12, False), (4, 0, False)])
def test_length_that_decides_pairs_is_a_warning(tmp_path, longer, shorter, leaks):
    path = write_jsonl(tmp_path / "a.jsonl", make_pairs(longer, shorter))
    report = make_data_report(path, SMOLLM2_TOK, model="tiny", processes=1)
    assert (report.pairs.better_longer, report.pairs.better_shorter) == (longer, shorter)
    low, high = report.pairs.longer_share_ci95
    assert low <= longer / (longer + shorter) <= high + 1e-12
    found = [issue for issue in report.issues if issue.code == "length-leak"]
    assert bool(found) == leaks
    for issue in found:
        assert (issue.severity, issue.count) == ("warning", max(longer, shorter))
        assert "28 of 30, 95 % interval 79 to 98 %" in issue.what
    if longer == 18:
        assert any("60 %" in value and "42 to 75 %" in value for _, value in report.lines())


def test_rows_that_are_no_pairs_have_no_share(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A"}])
    assert make_data_report(path, SMOLLM2_TOK, model="tiny", processes=1).pairs is None
