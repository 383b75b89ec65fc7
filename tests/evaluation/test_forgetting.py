"""Forgetting on general text: what is read, how it becomes rows, and what is measured."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.core.adapters.peft_model import PeftModel
from slimtune.errors import DataError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.forgetting import measure_forgetting
from slimtune.evaluation.general_text import (
    BUILT_IN_TEXT,
    WINDOW,
    build_general_text_examples,
    read_general_text_pieces,
)
from slimtune.evaluation.row_scores import RowScore


@pytest.fixture
def tokenize(tiny_tokenizer):
    return lambda file: build_general_text_examples(read_general_text_pieces(file), file, tiny_tokenizer())


def test_built_in_text(tokenize):
    examples = tokenize(BUILT_IN_TEXT)
    kinds = {"prose", "instructions", "python", "javascript", "languages"}
    assert {e["kind"] for e in examples} == kinds
    assert max(len(e["input_ids"]) for e in examples) <= 2 * WINDOW
    notice = BUILT_IN_TEXT.with_name("NOTICE").read_text()
    assert all(name in notice for name in (*kinds, "--- MIT", "--- PSF"))


def test_plain_text_is_cut_into_windows(tmp_path, tokenize):
    file = tmp_path / "own.txt"
    file.write_text("a" * (2 * WINDOW + 40))
    examples = tokenize(file)
    assert [len(e["input_ids"]) for e in examples] == [WINDOW, WINDOW, 40]
    assert all(e["labels"] == e["input_ids"] for e in examples)


def test_messages_supervise_the_assistant(tmp_path, tokenize):
    file = tmp_path / "own.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    file.write_text(json.dumps({"messages": talk}) + "\n\n" + json.dumps({"text": "abc", "kind": "letters"}) + "\n")
    one, other = tokenize(file)
    assert sum(label != -100 for label in one["labels"]) == 3  # H, o and the end of the turn
    assert (one["kind"], other["kind"], other["line"]) == ("text", "letters", 3)


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("x.jsonl", b'{"text": "abc"}\n{"txt": "abc"}\n[1]\n{"text": " "}\n', [f"x.jsonl:{n}:" for n in (2, 3, 4)]),
        ("x.jsonl", b'{"text": \n', ["x.jsonl:1: does not parse as JSON"]),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}\n', ["neither a text nor messages"]),
        ("x.txt", b"ab\xff", ["x.txt:1: is not UTF-8 at character 3"]),
        ("x.txt", b" \n", ["is an empty document"]),
        ("x.jsonl", b" \n", ["contains no text"]),
        ("x.txt", b"a", ["nothing to predict"]),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "Hi"}]}\n', ["nothing to predict"]),
    ],
)
def test_bad_text(tmp_path, tokenize, name, content, messages):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        tokenize(tmp_path / name)
    assert all(message in str(caught.value) for message in messages)


def test_missing_file(tmp_path, tokenize):
    (tmp_path / "plain.txt").write_text("abc")
    with pytest.raises(UsageError, match=r"plane\.txt.*'plain\.txt'"):
        tokenize(tmp_path / "plane.txt")


@pytest.mark.parametrize(("budget", "within"), [(0.0, False), (0.24, False), (0.26, True)])
def test_budget_is_exceeded_by_the_whole_interval(budget, within):
    scores = [[RowScore(nats, 0, 4) for nats in pair] for pair in ((8.0, 4.0), (9.0, 6.0))]
    found = measure_forgetting("text", [{"kind": "a"}, {"kind": "b"}], lambda rows: scores, budget, draws=500)
    assert (found.base_loss, found.tuned_loss, found.change.value) == (1.5, 1.875, 0.375)
    assert (found.change.ci95, found.within) == ((0.25, 0.5), within)


def score_kinds(rows):
    after = {"a": 9.0, "b": 6.0}
    return [RowScore(4.0, 0, 4) for _ in rows], [RowScore(after[e["kind"]], 0, 4) for e in rows]


def test_figures_by_kind():
    found = measure_forgetting("text", [{"kind": "a"}, {"kind": "b"}], score_kinds, 0.1, draws=10)
    assert [found.kinds[k].change.value for k in "ab"] == [1.25, 0.5]


def test_change_equals_transformers(run, tmp_path, tiny_folder):
    file = tmp_path / "general.txt"
    file.write_text("Twenty-three letters and a few figures, 0123456789. " * 12)
    found = evaluate(run, EvalSettings(general_text=file)).forgetting
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    windows = torch.tensor(tokenizer(file.read_text())["input_ids"]).split(WINDOW)
    tokens = sum(len(w) - 1 for w in windows)

    @torch.no_grad()
    def loss(model):
        return sum(model(w[None], labels=w[None]).loss.item() * (len(w) - 1) for w in windows) / tokens

    base, tuned = loss(model), loss(PeftModel.from_pretrained(model, run / "adapter"))
    assert found.base_loss == pytest.approx(base, abs=1e-5)
    assert found.change.value == pytest.approx(tuned - base, abs=1e-5)
    assert (found.text, found.tokens) == (str(file), tokens)
