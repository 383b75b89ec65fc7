"""Held-out loss of base and tuned model: figures against transformers, files, and bad input."""

import json
import math

import pytest
import torch
from hand_run import TALKS, make_run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.adapters.model import PeftModel
from slimtune.data.dataset import read_rows
from slimtune.data.tokenize import tokenize_dataset
from slimtune.errors import AdapterError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate


def scores(model, examples) -> tuple[list[float], int]:
    """Loss of each row in nats with transformers' own loss, and the number of correct greedy tokens."""
    found, hits = [], 0
    with torch.no_grad():
        for e in examples:
            ids, labels = torch.tensor([e["input_ids"]]), torch.tensor([e["labels"]])
            count = int((labels[0, 1:] != -100).sum())
            out = model(input_ids=ids, labels=labels)
            found.append(out.loss.item() * count)
            hits += int((out.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
    return found, hits


def test_figures_equal_transformers_row_by_row(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    found = evaluate(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    file = tmp_path / "run-rows.jsonl"
    examples, _ = tokenize_dataset(read_rows(file), tokenizer, max_seq_len=1024, path=file)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    base, base_hits = scores(model, examples)
    tuned, tuned_hits = scores(PeftModel.from_pretrained(model, run / "adapter"), examples)
    tokens = sum(sum(label != -100 for label in e["labels"][1:]) for e in examples)
    assert found["tokens"] == tokens
    assert found["rows"] == len(TALKS)
    assert found["base_loss"] == pytest.approx(sum(base) / tokens, abs=1e-5)
    assert found["tuned_loss"] == pytest.approx(sum(tuned) / tokens, abs=1e-5)
    assert found["loss_reduction"] == pytest.approx(found["base_loss"] - found["tuned_loss"], abs=1e-12)
    assert abs(found["loss_reduction"]) > 1e-3
    assert found["rows_better"] == sum(u < b for u, b in zip(tuned, base, strict=True))
    assert found["loss_reduction_ci95"][0] <= found["loss_reduction"] <= found["loss_reduction_ci95"][1]
    assert found["base_accuracy"] == base_hits / tokens
    assert found["tuned_accuracy"] == tuned_hits / tokens
    assert found["accuracy_gain"] == pytest.approx((tuned_hits - base_hits) / tokens)
    for who in ("base", "tuned"):
        assert found[f"{who}_perplexity"] == pytest.approx(math.exp(found[f"{who}_loss"]))
        ends = [math.exp(end) for end in found[f"{who}_loss_ci95"]]
        assert found[f"{who}_perplexity_ci95"] == pytest.approx(ends)
        for name in ("loss", "perplexity", "accuracy"):
            low, high = found[f"{who}_{name}_ci95"]
            assert low <= found[f"{who}_{name}"] <= high
    assert found["accuracy_gain_ci95"][0] <= found["accuracy_gain"] <= found["accuracy_gain_ci95"][1]
    assert (found["dtype"], found["dropped"], found["truncated"]) == ("float32", 0, 0)
    assert json.loads((run / "eval-test.json").read_text()) == found


def test_zero_adapter_reduces_the_loss_by_exactly_zero(tmp_path, tiny_folder):
    found = evaluate(make_run(tmp_path / "run", tiny_folder, size=0.0))
    assert (found["loss_reduction"], found["loss_reduction_ci95"], found["rows_better"]) == (0.0, [0.0, 0.0], 0)


def test_packed_equals_unpacked(tmp_path, tiny_folder):
    packed = evaluate(make_run(tmp_path / "a", tiny_folder))
    padded = evaluate(make_run(tmp_path / "b", tiny_folder, train={"packing": False}))
    for name in ("base_loss", "tuned_loss"):
        assert packed[name] == pytest.approx(padded[name], abs=1e-5)


def test_adapter_folder_needs_a_file_and_stays_unchanged(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    wanted = evaluate(run)
    before = sorted(p.name for p in (run / "adapter").iterdir())
    found = evaluate(run / "adapter", EvalSettings(data=tmp_path / "run-rows.jsonl"))
    assert found["tuned_loss"] == pytest.approx(wanted["tuned_loss"], abs=0.05)  # the machine's dtype may be bf16
    assert found["split"] is None
    assert sorted(p.name for p in (run / "adapter").iterdir()) == before


def test_result_of_a_file_has_its_own_name(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    other = write_rows(tmp_path / "other.jsonl", TALKS[:2])
    found = evaluate(run, EvalSettings(data=other))
    assert (found["rows"], found["data"]) == (2, str(other))
    assert json.loads((run / "eval-data-other.json").read_text())["rows"] == 2
    assert not (run / "eval-test.json").exists()


def test_validation_rows_set_aside_by_training(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"validation_fraction": 0.4})
    found = evaluate(run, EvalSettings(split="validation"))
    assert found["rows"] == 2
    assert found["data"].endswith("run-rows.jsonl")
    assert (run / "eval-validation.json").is_file()


def test_overlong_rows_are_dropped_and_counted(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"max_seq_len": 82})
    found = evaluate(run)
    assert found["dropped"] > 0
    assert found["rows"] + found["dropped"] == len(TALKS)


def refused(run, **settings) -> UsageError:
    with pytest.raises(UsageError) as caught:
        evaluate(run, EvalSettings(**settings))
    assert caught.value.exit_code == 2
    return caught.value


def test_no_test_rows(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"test": None, "validation_fraction": 0.4})
    said = str(refused(run))
    assert "names no test rows" in said
    assert "data.test in" in said
    assert "--data FILE, or --split validation" in said


def test_no_validation_rows(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder, data={"validation_fraction": 0})
    assert "names no validation rows" in str(refused(run, split="validation"))
    none = make_run(tmp_path / "none", tiny_folder, data={"validation_fraction": 0.01})
    assert "set no rows aside: 0.01 of 5 rows is none" in str(refused(none, split="validation"))


def test_adapter_folder_without_a_file(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    said = refused(run / "adapter")
    assert "without a recipe" in said.message
    assert said.hint == "--data FILE"


def test_bad_settings(tmp_path, tiny_folder):
    run = make_run(tmp_path / "run", tiny_folder)
    assert "did you mean 'validation'?" in str(refused(run, split="validatoin"))
    assert "did you mean 'run'?" in str(refused(tmp_path / "rum"))
    assert "did you mean 'run-rows.jsonl'?" in str(refused(run, data=tmp_path / "run-row.jsonl"))
    assert "bootstrap is 0" in str(refused(run, bootstrap=0))
    assert "forgetting_budget is -0.1" in str(refused(run, forgetting_budget=-0.1))
    assert "generate is -1" in str(refused(run, generate=-1))
    assert "max_new_tokens is 0" in str(refused(run, max_new_tokens=0))
    assert "did you mean 'exact'?" in str(refused(run, checks=["exakt"]))


def test_nan_adapter(tmp_path, tiny_folder):
    def spoil(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    run = make_run(tmp_path / "run", tiny_folder, change=spoil)
    with pytest.raises(AdapterError, match=r"NaN or Inf on 5 of 5 rows \(lines '1', '2'") as caught:
        evaluate(run)
    assert caught.value.exit_code == 1
    assert not (run / "eval-test.json").exists()
