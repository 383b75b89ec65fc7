"""Rows that prove nothing: trained on, equal to each other, too few, or without a finite loss."""

import json
import re

import pytest
from hand_run import TALKS, write_rows

from slimtune.errors import AdapterError, DataError, ModelError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.row_scores import RowScore
from slimtune.generation.answer_queue import AnswerPiece

MORE = [*TALKS, ("Define a day.", "A period of twenty-four hours, mostly misspent."), ("Define dawn.", "Too early.")]


def trained_rows(run):
    return run.with_name("run-trained.jsonl")


def test_training_rows_are_left_out(run, tmp_path):
    file = write_rows(tmp_path / "mixed.jsonl", MORE)
    expected = evaluate(run, EvalSettings(data=file)).measures.tuned_loss.value
    lines = trained_rows(run).read_text().splitlines(keepends=True)
    file.write_text(lines[0] + file.read_text() + lines[1])
    found = evaluate(run, EvalSettings(data=file))
    assert (found.measures.rows, found.training_rows) == (len(MORE), 2)
    assert found.measures.tuned_loss.value == pytest.approx(expected, abs=1e-6)


def test_the_training_file_is_refused(run):
    with pytest.raises(DataError, match=r"\b5 rows"):
        evaluate(run, EvalSettings(data=trained_rows(run)))


def test_equal_rows_count_as_one(run, tmp_path):
    once = evaluate(run, EvalSettings(data=write_rows(tmp_path / "once.jsonl", MORE)))
    found = evaluate(run, EvalSettings(data=write_rows(tmp_path / "often.jsonl", MORE * 20)))
    assert (found.measures.rows, found.measures.different_rows) == (20 * len(MORE), len(MORE))
    assert found.measures.loss_reduction.ci95 == pytest.approx(once.measures.loss_reduction.ci95, abs=1e-5)


@pytest.mark.parametrize(("talks", "words"), [(TALKS[:1] * 50, "1 row is too few"), (TALKS, "5 different rows are")])
def test_too_few_rows(run, tmp_path, talks, words):
    verdict = evaluate(run, EvalSettings(data=write_rows(tmp_path / "few.jsonl", talks))).verdict
    assert not verdict.passed
    assert words in verdict.reasons[0]


def test_nan_on_general_text_is_an_error(run, tmp_path, monkeypatch):
    (tmp_path / "general.txt").write_text("The sea was calm.")
    scores = []

    def score_supervised_rows(model, rows, collator):
        scores.append(len(rows))
        return [RowScore(float("nan") if len(rows) == 1 else 1.0, 0, 1) for _ in rows]

    monkeypatch.setattr("slimtune.evaluation.model_comparison.score_supervised_rows", score_supervised_rows)
    with pytest.raises((AdapterError, ModelError), match=r"NaN .*\b1 of 1 .*'1' of .*general\.txt"):
        evaluate(run, EvalSettings(general_text=tmp_path / "general.txt"))


def test_empty_answers_fail(run, monkeypatch):
    def say_a_space(generator, answers):
        for answer in answers:
            answer.stream.add_text(" ", last=True)
            answer.add_piece(AnswerPiece(" ", finish_reason="stop"))

    monkeypatch.setattr("slimtune.generation.text_generator.TextGenerator.generate", say_a_space)
    reasons = evaluate(run, EvalSettings(generate=2)).verdict.reasons
    assert re.search(r"\b2\b.*empty", reasons[-1])


def test_run_on_answers_is_measured_on_pairs(run, tmp_path):
    """As the losses of both answers say; a pair whose chosen answer was trained on is left out."""

    def write_pairs(name, talks):
        turns = [json.loads(line)["messages"] for line in write_rows(tmp_path / "talks.jsonl", talks).open()]
        wrong = {"role": "assistant", "content": "abc"}
        rows = [{"prompt": m[:-1], "chosen": m[-1:], "rejected": [wrong]} for m in turns]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    nats = {}
    for name, talks in {"chosen": MORE, "rejected": [(question, "abc") for question, _ in MORE]}.items():
        found = evaluate(run, EvalSettings(data=write_rows(tmp_path / f"{name}.jsonl", talks)))
        nats[name] = {
            model: getattr(found.measures, f"{model}_loss").value * found.measures.tokens for model in ("base", "tuned")
        }
    found = evaluate(run, EvalSettings(data=write_pairs("pairs.jsonl", MORE)))
    assert (found.task, found.measures.rows, found.training_rows) == ("sft", len(MORE), 0)
    for model in ("base", "tuned"):
        margin = (nats["rejected"][model] - nats["chosen"][model]) / len(MORE)
        assert getattr(found.measures.preference, f"{model}_margin").value == pytest.approx(margin, abs=1e-4)
        assert getattr(found.measures, f"{model}_loss").value * found.measures.tokens == pytest.approx(
            nats["chosen"][model], abs=1e-4
        )

    learned = [[m["content"] for m in json.loads(line)["messages"]] for line in trained_rows(run).open()]
    found = evaluate(run, EvalSettings(data=write_pairs("mixed.jsonl", [*MORE, learned[0]])))
    assert (found.measures.rows, found.training_rows) == (len(MORE), 1)
