"""A run that meets NaN or Inf stops at that step with its sound checkpoints, or skips the step and counts it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from test_processes import run_processes
from tiny_run import adapter, metrics, recipe_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.core.models.loader import load_base
from slimtune.core.training import checkpoint
from slimtune.core.training import training_loop as loop
from slimtune.core.training.nonfinite import find_nonfinite_weights
from slimtune.core.training.train import train
from slimtune.errors import ModelError, RunError


def break_steps(monkeypatch, steps, line=None, value=math.nan):
    """Make the loss of some steps NaN: of every row, or of the row on a line."""
    compute, score = loop.TrainingLoop.compute_gradients, loop.nonfinite.score_examples_by_objective

    def broken(self, rows):
        loss, norm, *rest = compute(self, rows)
        if self.state.step + 1 in steps:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(math.nan)
            return loss * value, norm * math.nan, *rest
        return loss, norm, *rest

    def scores(model, rows, *args, **kwargs):
        found = score(model, rows, *args, **kwargs)
        bad = [i for i, row in enumerate(rows) if line in (None, row["line"])]
        return found | {i: [value, *found[i][1:]] for i in bad}

    monkeypatch.setattr(loop.TrainingLoop, "compute_gradients", broken)
    monkeypatch.setattr(loop.nonfinite, "score_examples_by_objective", scores)


def assert_strict_json(folder):
    def refuse(word):
        raise AssertionError(f"a bare {word}")

    for file in Path(folder).rglob("*.json*"):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)


def test_diverged_run_stops_at_its_step(settings, capfd):
    with pytest.raises(RunError, match=r"step \d+ .*NaN.*\(lines") as e:
        train(recipe_of(settings, learning_rate=1e30, save_steps=1, eval_steps=8))
    folder = Path(settings["output_dir"])
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    assert checkpoint.describe_checkpoint_damage(newest) == ""
    assert newest.name in e.value.hint
    assert not (folder / "adapter").exists()
    assert not (folder / "result.json").exists()
    assert metrics(folder, "event") == ["non-finite"]
    assert all(map(math.isfinite, metrics(folder, "train_loss")))
    assert_strict_json(folder)


def test_clipping_cannot_hide_an_infinite_gradient(settings, monkeypatch):
    """Clipping by value, which somebody may add, makes Inf finite: the norm is measured before anything clips."""
    measure, measured = torch.nn.utils.get_total_norm, []

    def break_and_measure(gradients):
        if len(measured) == 2:
            gradients[0].view(-1)[0] = math.inf
        measured.append(measure(gradients))
        return measured[-1]

    def clip_by_value(parameters, max_norm, norm):
        torch.nn.utils.clip_grad_value_(parameters, 1.0)
        assert all(p.grad.isfinite().all() for p in parameters)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", break_and_measure)
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", clip_by_value)
    with pytest.raises(RunError, match=r"step 3 .*Inf"):
        train(recipe_of(settings))


def test_row_is_named(settings, monkeypatch):
    lines = []
    compute = loop.TrainingLoop.compute_gradients
    monkeypatch.setattr(
        loop.TrainingLoop, "compute_gradients", lambda self, rows: lines.append(rows[0]["line"]) or compute(self, rows)
    )
    train(recipe_of({**settings, "output_dir": settings["output_dir"] + "-first"}, max_steps=3))
    break_steps(monkeypatch, {3}, line=lines[2])
    named = rf"\D*\b1 of 6 .*\(line {lines[2]}\b"
    with pytest.raises(RunError, match=rf"step 3 .*NaN: {named}"):
        train(recipe_of(settings))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_skipped_steps_are_counted(settings, monkeypatch, capfd, method):
    settings["method"] = {"name": method}
    with monkeypatch.context() as patch:
        break_steps(patch, {1, 4, 5})
        result = train(recipe_of(settings, on_nonfinite="skip", logging_steps=2, save_steps=1))
    assert result.skipped_steps == 3
    assert all(torch.isfinite(t).all() for t in adapter(result.run).values())
    assert metrics(result.run, "event") == ["non-finite"] * 3
    losses = metrics(result.run, "train_loss")
    assert len(losses) == 4
    assert all(loss > 5 for loss in losses)  # a mean over the steps that count
    assert re.search(r"step 4 .*NaN", capfd.readouterr().err)
    assert_strict_json(result.run)


def test_skip_can_be_chosen_at_resume(settings, monkeypatch):
    break_steps(monkeypatch, {4})
    with pytest.raises(RunError, match="step 4"):
        train(recipe_of(settings, save_steps=1))
    assert train(recipe_of(settings, save_steps=1, on_nonfinite="skip"), resume=True).skipped_steps == 1


def test_run_of_skipped_steps_alone_fails(settings, monkeypatch):
    break_steps(monkeypatch, range(1, 99), value=math.inf)
    with pytest.raises(RunError, match=r"step 8 .*Inf.*\b8 steps"):
        train(recipe_of(settings, on_nonfinite="skip"))
    assert not Path(settings["output_dir"], "adapter").exists()


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_validation_loss_of_nan(settings, monkeypatch, capfd, choice):
    score, calls = loop.score_examples_by_objective, []

    def broken(model, rows, *args, **kwargs):
        found = score(model, rows, *args, **kwargs)
        calls.append(1)
        return found | ({2: [math.nan, *found[2][1:]]} if len(calls) == 1 else {})

    monkeypatch.setattr(loop, "score_examples_by_objective", broken)
    message = "the validation loss after step 4 is NaN: the loss of 1 of 6 rows is NaN or Inf (line 3 of the validation"
    if choice == "stop":
        with pytest.raises(RunError) as e:
            train(recipe_of(settings))
        assert message in e.value.message
        return
    result = train(recipe_of(settings, on_nonfinite="skip"))
    assert message in capfd.readouterr().err.replace("\n", " ")
    assert result.best_step == 8
    assert math.isfinite(result.validation_loss)


def test_base_with_nan_is_refused_before_training(settings, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["name"])
    weight = model.model.layers[1].mlp.up_proj.weight
    for value in (math.nan, math.inf, -math.inf):
        weight.data[3, 5] = value
        assert find_nonfinite_weights(model) == ["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(settings["model"]["name"]).save_pretrained(tmp_path / "base")
    settings["model"]["name"] = str(tmp_path / "base")
    with pytest.raises(ModelError, match=r"\b1 .*NaN.*'model\.layers\.1\.mlp\.u"):
        train(recipe_of(settings))
    assert not Path(settings["output_dir"]).exists()
    with pytest.raises(RunError, match=r"step 1 .*NaN"):
        train(recipe_of(settings), allow_faulty_rows=True)
    weight.data[3, 5] = torch.finfo(torch.float32).max
    assert find_nonfinite_weights(model) == []


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_scale_of_a_quantized_base_that_is_nan(settings, quantization):
    pytest.importorskip("bitsandbytes")
    model = load_base(settings["model"]["name"], dtype="float32", quantization=quantization).model
    assert find_nonfinite_weights(model) == []
    weight = model.model.layers[1].mlp.up_proj.weight
    scales = weight.SCB if quantization == "int8" else weight.quant_state.state2.absmax
    scales[0] = math.nan
    assert find_nonfinite_weights(model) == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(settings, learning_rate=1e30).to_yaml())
    (code, _, err), (other, _, silence) = run_processes("-m", "slimtune", "train", str(file))
    assert (code, other) == (1, 1)
    assert err.count("error: ") == 1
    assert "error" not in silence
