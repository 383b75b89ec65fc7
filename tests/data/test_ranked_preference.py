"""Rows with several answers to one prompt, with scores or ranks: the spellings, and what is wrong with a row."""

import json

import pytest
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data.dataset import open_rows
from slimtune.data.formats import InvalidRow
from slimtune.data.tokenize import tokenize_dataset
from slimtune.errors import DataError

TOK = make_tokenizer(template_text("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
BEST_FIRST = (" good", " fair", " bad")


def read(tmp_path, **row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Q:", **row}) + "\n")
    rows = open_rows(path)
    return rows, next(iter(rows))


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
        {"responses": json.dumps([" fair", " good", " bad"]), "scores": "[2, 3, 1]"},
    ],
)
def test_answers_are_read_best_first(tmp_path, row):
    rows, found = read(tmp_path, **row)
    assert rows.format == "ranked-preference"
    assert found.answers == BEST_FIRST
    assert list(found.scores) == sorted(found.scores, reverse=True)


def test_rows_of_a_list_share_their_prompt(tmp_path):
    prompt = [{"role": "user", "content": "Hi"}]
    rows, _ = read(tmp_path, prompt=prompt, responses=["a", "b", "c"], scores=[1, 3, 1])
    dataset, _ = tokenize_dataset(rows, TOK, max_seq_len=99, path="a")
    example = dataset[0]
    assert example["row_scores"] == [3, 1, 1]
    assert len(example["row_lengths"]) == 3
    texts = TOK.decode([t for t in example["labels"] if t >= 0])
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
    ],
)  # fmt: skip
def test_faulty_list(tmp_path, row, code, cause):
    _, found = read(tmp_path, **row)
    assert (type(found), found.code) == (InvalidRow, code)
    assert cause in found.cause


def test_equal_answers_with_different_scores_are_refused(tmp_path):
    rows, _ = read(tmp_path, responses=[" a", " b", " a"], scores=[3, 2, 1])
    with pytest.raises(DataError, match=r"a\.jsonl:1: two answers with different scores are the same"):
        tokenize_dataset(rows, TOK, max_seq_len=99, path="a")
