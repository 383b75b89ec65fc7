"""General text: what is read, how it becomes rows, and what is said of it."""

import json

import pytest
import torch
from hand_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.adapters.model import PeftModel
from slimtune.errors import DataError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.forgetting import (
    BUILT_IN_TEXT,
    WINDOW,
    measure_forgetting,
    read_general_text,
    tokenize_general_text,
)
from slimtune.train_step.loss import RowScore


def test_built_in_text_has_kinds_and_sources(tiny_tokenizer):
    pieces = read_general_text(BUILT_IN_TEXT)
    assert {kind for _, kind, _ in pieces} == {"prose", "instructions", "python", "javascript", "languages"}
    assert 50_000 < BUILT_IN_TEXT.stat().st_size < 150_000
    notice = BUILT_IN_TEXT.with_name("NOTICE").read_text()
    for kind in ("prose", "instructions", "python", "javascript", "languages", "--- MIT", "--- PSF"):
        assert kind in notice
    examples = tokenize_general_text(pieces, BUILT_IN_TEXT, tiny_tokenizer())
    assert len(examples) >= len(pieces)
    assert max(len(e["input_ids"]) for e in examples) <= 2 * WINDOW


def test_text_is_cut_into_windows(tmp_path, tiny_tokenizer):
    text = tmp_path / "own.txt"
    text.write_text("a" * (2 * WINDOW + 40))
    examples = tokenize_general_text(read_general_text(text), text, tiny_tokenizer())
    assert [len(e["input_ids"]) for e in examples] == [WINDOW, WINDOW, 40]
    assert all(e["labels"] == e["input_ids"] for e in examples)
    talk = tmp_path / "own.jsonl"
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    talk.write_text(json.dumps({"messages": said}) + "\n\n" + json.dumps({"text": "abc", "kind": "letters"}) + "\n")
    one, other = tokenize_general_text(read_general_text(talk), talk, tiny_tokenizer())
    assert sum(label != -100 for label in one["labels"]) == 3  # H, o and the end of the turn
    assert (one["kind"], other["kind"], other["line"]) == ("text", "letters", 3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "x.jsonl",
            b'{"text": "abc"}\n{"txt": "abc"}\n[1]\n{"text": " "}\n',
            ["x.jsonl:2:", "x.jsonl:3:", "x.jsonl:4:"],
        ),
        ("x.jsonl", b'{"text": \n', ["x.jsonl:1: does not parse as JSON"]),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}\n', ["neither a text nor messages"]),
        ("x.txt", b"\xff\xfe", ["is not UTF-8 at byte 0"]),
        ("x.txt", b" \n", ["contains no text"]),
        ("x.txt", b"a", ["nothing to predict"]),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "Hi"}]}\n', ["nothing to predict"]),
    ],
)
def test_faults_of_a_text_are_named(tmp_path, tiny_tokenizer, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        tokenize_general_text(read_general_text(file), file, tiny_tokenizer())
    for part in said:
        assert part in str(caught.value)


def test_a_missing_text_is_wrong_use(tmp_path):
    (tmp_path / "plain.txt").write_text("abc")
    with pytest.raises(UsageError, match=r"did you mean 'plain\.txt'"):
        read_general_text(tmp_path / "plane.txt")


@pytest.mark.parametrize(("budget", "within"), [(0.0, False), (0.24, False), (0.26, True)])
def test_budget_is_exceeded_by_the_whole_interval(budget, within):
    rows = [{"kind": "a"}, {"kind": "b"}]

    def judge(examples):
        return [RowScore(8.0, 0, 4), RowScore(4.0, 0, 4)], [RowScore(9.0, 0, 4), RowScore(6.0, 0, 4)]

    found = measure_forgetting(rows[:1] + rows[1:], judge, budget, draws=500)
    assert (found["base_loss"], found["tuned_loss"], found["change"]) == (1.5, 1.875, 0.375)
    assert found["change_ci95"] == [0.25, 0.5]
    assert found["within"] is within
    assert [found["kinds"][k]["change"] for k in "ab"] == [0.25, 0.5]


def test_the_change_is_the_one_computed_window_by_window(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    file = tmp_path / "general.txt"
    file.write_text("Twenty-three letters and a few figures, 0123456789. " * 12)
    found = evaluate(run, EvalSettings(general_text=file))["forgetting"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.tensor(tokenizer(file.read_text())["input_ids"]).split(WINDOW)

    def loss(model) -> float:
        with torch.no_grad():
            return sum(model(w[None], labels=w[None]).loss.item() * (len(w) - 1) for w in ids) / sum(
                len(w) - 1 for w in ids
            )

    base = loss(model)
    tuned = loss(PeftModel.from_pretrained(model, run / "adapter"))
    assert found["base_loss"] == pytest.approx(base, abs=1e-5)
    assert found["change"] == pytest.approx(tuned - base, abs=1e-5)
    assert (found["text"], found["tokens"]) == (str(file), sum(len(w) - 1 for w in ids))
    nothing = evaluate(
        make_run(tmp_path / "nothing", tiny_folder, size=0.0), EvalSettings(general_text=file, forgetting_budget=0.0)
    )
    assert nothing["forgetting"]["change_ci95"] == [0.0, 0.0]
    assert nothing["forgetting"]["within"]
    assert nothing["verdict"]["passed"] is False  # it forgot nothing, and gained nothing
