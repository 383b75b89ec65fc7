"""Answers after the prompts of other rows, and the dependence measured from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.evaluation.prompt_dependence import prompt_dependence, shuffle_prompts
from slimtune.train_step.loss import RowScore

TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def row(prompt: list[int], answer: list[int], line: int = 1) -> dict:
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "line": line}


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12), st.integers(0, 9))
def test_answers_are_whole_after_a_different_prompt(pairs, seed):
    rows = [row(p, a, i) for i, (p, a) in enumerate(pairs)]
    found = shuffle_prompts(rows, seed)
    assert len(set(found.rows)) == len(found.rows) == len(found.examples)
    for i, example in zip(found.rows, found.examples, strict=True):
        prompt, answer = pairs[i]
        ids, labels = example["input_ids"], example["labels"]
        cut = len(ids) - len(answer)
        assert ids[cut:] == labels[cut:] == answer
        assert set(labels[:cut]) == {-100}
        assert ids[:cut] != prompt
        assert ids[:cut] in [p for p, _ in pairs]
        assert len(ids) <= max(len(r["input_ids"]) for r in rows)
        assert example["line"] == i
    left = set(range(len(rows))) - set(found.rows)
    longest = max(len(p) + len(a) for p, a in pairs)
    for i in left:
        assert all(q == pairs[i][0] or len(q) + len(pairs[i][1]) > longest for q, _ in pairs)


def test_seed_and_limit(monkeypatch):
    rows = [row([i], [9, i % 3], i) for i in range(40)]
    assert shuffle_prompts(rows, 1) == shuffle_prompts(rows, 1)
    assert shuffle_prompts(rows, 1) != shuffle_prompts(rows, 2)
    monkeypatch.setattr("slimtune.evaluation.prompt_dependence.MAX_ROWS", 7)
    assert len(shuffle_prompts(rows).rows) == 7


def test_rows_that_all_ask_the_same():
    shuffled = shuffle_prompts([row([1, 2], [3]), row([1, 2], [4])])
    assert shuffled.rows == []
    assert prompt_dependence(shuffled, [], [], lambda rows: pytest.fail("nothing is to be scored")) is None


def test_dependence_is_the_increase_in_nats_per_token():
    rows = [row([i], [9, 9], i) for i in range(8)]
    shuffled = shuffle_prompts(rows)
    own = [RowScore(4.0, 0, 2)] * 8

    def score_both(examples):
        return [RowScore(5.0, 0, 2)] * len(examples), [RowScore(7.0, 0, 2)] * len(examples)

    found = prompt_dependence(shuffled, own, own, score_both)
    assert (found["base"], found["tuned"], found["change"], found["rows"]) == (0.5, 1.5, 1.0, 8)
    assert found["tuned_ci95"] == [1.5, 1.5]
