"""Held-out loss of base and tuned model: figures against transformers, files, and bad input."""

import json
import math

import pytest
import torch
from hand_run import TALKS, make_run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.core.adapters.peft_model import PeftModel
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.core.training.run_dir import RunDir
from slimtune.errors import AdapterError, UsageError
from slimtune.evaluation.estimate import Estimate
from slimtune.evaluation.eval_result import read_eval_result
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.run_results import load_run_results
from slimtune.extras.row_files import read_rows


@torch.no_grad()
def score_with_transformers(model, examples):
    """Return the loss of each row in nats, and the number of correct greedy tokens."""
    losses, hits = [], 0
    for e in examples:
        ids, labels = torch.tensor([e["input_ids"]]), torch.tensor([e["labels"]])
        out = model(input_ids=ids, labels=labels)
        losses.append(out.loss.item() * int((labels[0, 1:] != -100).sum()))
        hits += int((out.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
    return losses, hits


def test_figures_equal_transformers(run, tmp_path, tiny_folder):
    found = evaluate(run)
    file = tmp_path / "run-rows.jsonl"
    examples, _ = tokenize_dataset(
        read_rows(file), AutoTokenizer.from_pretrained(tiny_folder), max_seq_len=1024, source_path=file
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    base, base_hits = score_with_transformers(model, examples)
    tuned, tuned_hits = score_with_transformers(PeftModel.from_pretrained(model, run / "adapter"), examples)
    tokens = sum(sum(label != -100 for label in e["labels"][1:]) for e in examples)
    assert (found.measures.tokens, found.measures.rows) == (tokens, len(TALKS))
    assert found.measures.base_loss.value == pytest.approx(sum(base) / tokens, abs=1e-5)
    assert found.measures.tuned_loss.value == pytest.approx(sum(tuned) / tokens, abs=1e-5)
    assert found.measures.loss_reduction.value == pytest.approx(
        found.measures.base_loss.value - found.measures.tuned_loss.value, abs=1e-12
    )
    assert abs(found.measures.loss_reduction.value) > 1e-3
    assert found.measures.rows_better == sum(u < b for u, b in zip(tuned, base, strict=True))
    assert (found.measures.base_accuracy.value, found.measures.tuned_accuracy.value) == (
        base_hits / tokens,
        tuned_hits / tokens,
    )
    assert found.measures.accuracy_gain.value == pytest.approx((tuned_hits - base_hits) / tokens)
    m = found.measures
    for loss, perplexity in ((m.base_loss, m.base_perplexity), (m.tuned_loss, m.tuned_perplexity)):
        assert perplexity.value == pytest.approx(math.exp(loss.value))
        assert perplexity.ci95 == pytest.approx(tuple(map(math.exp, loss.ci95)))
    for estimate in (value for value in vars(m).values() if isinstance(value, Estimate)):
        assert estimate.low <= estimate.value <= estimate.high
    assert (found.dtype, found.dropped, found.truncated) == ("float32", 0, 0)
    assert read_eval_result(json.loads((run / "eval-test.json").read_text())) == found


def test_an_adapter_that_changes_nothing(tmp_path, tiny_folder):
    run, text = make_run(tmp_path / "run", tiny_folder, size=0.0), tmp_path / "general.txt"
    text.write_text("A few words of general text.")
    found = evaluate(run, EvalSettings(general_text=text, forgetting_budget=0.0))
    assert (found.measures.loss_reduction.value, found.measures.loss_reduction.ci95, found.measures.rows_better) == (
        0.0,
        (0.0, 0.0),
        0,
    )
    assert (found.forgetting.change.ci95, found.forgetting.within) == ((0.0, 0.0), True)
    assert not found.verdict.passed
    assert any("nothing" in reason for reason in found.verdict.reasons)


def test_packed_equals_padded(run, tmp_path, tiny_folder):
    packed, padded = evaluate(run), evaluate(make_run(tmp_path / "b", tiny_folder, train={"packing": False}))
    for name in ("base_loss", "tuned_loss"):
        first, second = (getattr(found.measures, name).value for found in (packed, padded))
        assert first == pytest.approx(second, abs=1e-5)


def test_adapter_folder_stays_unchanged(run, tmp_path):
    expected = evaluate(run).measures.tuned_loss.value
    before = sorted(p.name for p in (run / "adapter").iterdir())
    found = evaluate(run / "adapter", EvalSettings(data=tmp_path / "run-rows.jsonl"))
    assert found.measures.tuned_loss.value == pytest.approx(expected, abs=0.05)  # the machine's dtype may be bf16
    assert found.split is None
    assert sorted(p.name for p in (run / "adapter").iterdir()) == before


def test_result_of_a_file_has_its_own_name(run, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", TALKS[:2])
    found = evaluate(run, EvalSettings(data=other))
    assert (found.measures.rows, found.data) == (2, str(other))
    assert json.loads((run / "eval-data-other.json").read_text())["rows"] == 2
    assert not (run / "eval-test.json").exists()


def test_validation_rows_set_aside_by_training(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"validation_fraction": 0.4})
    found = evaluate(run, EvalSettings(split="validation", generate=9, max_new_tokens=2))
    assert (found.measures.rows, len(found.generations)) == (2, 2)
    assert [g.reference for g in found.generations] == [TALKS[g.line - 1][1] for g in found.generations]
    assert (run / "eval-validation.json").is_file()


def test_test_rows_set_aside_by_training(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"test": None, "test_fraction": 0.4})
    found = evaluate(run)
    assert (found.measures.rows, found.split) == (2, "test")
    assert load_run_results(RunDir(run)).held_out.values["rows"] == 2  # they count as rows not trained on


def test_overlong_rows_are_counted(tmp_path, tiny_folder):
    found = evaluate(make_run(tmp_path / "run", tiny_folder, data={"max_seq_len": 82}))
    assert found.dropped > 0
    assert found.measures.rows + found.dropped == len(TALKS)


@pytest.mark.parametrize(
    ("data", "split", "message"),
    [
        ({"test": None, "validation_fraction": 0.4}, "test", "names no test rows"),
        ({"test": None, "validation_fraction": 0.4}, "test", "--data FILE, or --split validation"),
        ({"validation_fraction": 0}, "validation", "names no validation rows"),
        ({"validation_fraction": 0.01}, "validation", "set no rows aside: 0.01 of 5 rows is none"),
        ({"test": None, "test_fraction": 0.01}, "test", "set no rows aside: 0.01 of 5 rows is none"),
    ],
)
def test_no_rows(tmp_path, tiny_folder, data, split, message):
    with pytest.raises(UsageError, match=message):
        evaluate(make_run(tmp_path / "run", tiny_folder, data=data), EvalSettings(split=split))


@pytest.mark.parametrize(
    ("folder", "settings", "message"),
    [
        ("run/adapter", {}, "without a recipe"),
        ("rum", {}, "did you mean 'run'"),
        ("run", {"split": "validatoin"}, "did you mean 'validation'"),
        ("run", {"data": "run-row.jsonl"}, "did you mean 'run-rows.jsonl'"),
        ("run", {"bootstrap": 0}, "bootstrap is 0"),
        ("run", {"forgetting_budget": -0.1}, "forgetting_budget is -0.1"),
        ("run", {"generate": -1}, "generate is -1"),
        ("run", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("run", {"checks": ["exakt"]}, "did you mean 'exact'"),
    ],
)
def test_bad_settings(run, tmp_path, monkeypatch, folder, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        evaluate(tmp_path / folder, EvalSettings(**settings))


def test_nan_adapter(tmp_path, tiny_folder):
    def spoil(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    run = make_run(tmp_path / "run", tiny_folder, change=spoil)
    with pytest.raises(AdapterError, match="NaN"):
        evaluate(run)
    assert not (run / "eval-test.json").exists()
