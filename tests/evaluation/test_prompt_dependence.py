"""Answers after the prompts of other rows, and the dependence measured from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.evaluation.prompt_dependence import make_shuffled_prompt_examples, measure_prompt_dependence
from slimtune.evaluation.row_scores import RowScore

TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def row(prompt, answer, line=1):
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "line": line}


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12), st.integers(0, 9))
def test_whole_answers_after_different_prompts(pairs, seed):
    rows = [row(p, a, i) for i, (p, a) in enumerate(pairs)]
    longest = max(len(r["input_ids"]) for r in rows)
    found = make_shuffled_prompt_examples(rows, seed)
    for i, example in found.items():
        prompt, answer = pairs[i]
        ids, labels = example["input_ids"], example["labels"]
        cut = len(ids) - len(answer)
        assert ids[cut:] == labels[cut:] == answer
        assert set(labels[:cut]) == {-100}
        assert ids[:cut] != prompt
        assert ids[:cut] in [p for p, _ in pairs]
        assert len(ids) <= longest
        assert example["line"] == i
    for i in set(range(len(rows))) - set(found):
        assert all(p == pairs[i][0] or len(p) + len(pairs[i][1]) > longest for p, _ in pairs)


def test_seed_and_limit(monkeypatch):
    rows = [row([i], [9, i % 3], i) for i in range(40)]
    assert (
        make_shuffled_prompt_examples(rows, 1)
        == make_shuffled_prompt_examples(rows, 1)
        != make_shuffled_prompt_examples(rows, 2)
    )
    monkeypatch.setattr("slimtune.evaluation.prompt_dependence.MAX_ROWS", 7)
    assert len(make_shuffled_prompt_examples(rows)) == 7


def test_all_rows_ask_the_same():
    shuffled = make_shuffled_prompt_examples([row([1, 2], [3]), row([1, 2], [4])])
    assert shuffled == {}
    assert measure_prompt_dependence(shuffled, [], [], lambda rows: pytest.fail("nothing is to be scored")) is None


def test_dependence_in_nats_per_token():
    own = [RowScore(4.0, 0, 2)] * 8
    found = measure_prompt_dependence(
        make_shuffled_prompt_examples([row([i], [9, 9], i) for i in range(8)]), own, own,
        lambda rows: ([RowScore(5.0, 0, 2)] * len(rows), [RowScore(7.0, 0, 2)] * len(rows)),
    )  # fmt: skip
    assert (found.base.value, found.tuned.value, found.change.value, found.rows) == (0.5, 1.5, 1.0, 8)
    assert found.tuned.ci95 == (1.5, 1.5)
