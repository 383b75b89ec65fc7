"""Training in float16, with a loss scale: as in fp32 but for rounding, whatever overflows on the way."""

import json
from pathlib import Path

import pytest
import torch
from method_cases import CASES
from models_zoo import llama
from tiny_run import distance, metrics, recipe_of, train_in_two_parts

from slimtune import get_peft_model
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.training import resuming
from slimtune.core.training.loss import forward_backward, make_collator
from slimtune.core.training.train import train
from slimtune.core.training.train_result import TrainResult
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.errors import RunError
from slimtune.extras import loss_scaling

TOO_LARGE = 2.0**40


@pytest.fixture
def half(settings):
    settings["model"]["dtype"] = "float16"
    return settings


def read_state(result: TrainResult) -> dict:
    newest = max(Path(result.run, "checkpoints").iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    return json.loads((newest / "training_state.json").read_text())


def test_losses_are_those_of_fp32(half, whole_run):
    result = train(recipe_of(half))
    assert result.dtype == "float16"
    assert result.validation_loss == pytest.approx(whole_run.validation_loss, abs=1e-2)
    assert metrics(result.run, "train_loss") == pytest.approx(metrics(whole_run.run, "train_loss"), abs=1e-2)
    assert metrics(result.run, "grad_norm") == pytest.approx(metrics(whole_run.run, "grad_norm"), rel=0.02)
    assert read_state(result)["loss_scale"] == 2.0**14


def test_a_step_that_overflows_is_computed_again_at_a_smaller_scale(half, whole_run, monkeypatch):
    monkeypatch.setattr(resuming, "INITIAL_LOSS_SCALE", TOO_LARGE)
    result = train(recipe_of(half))
    assert read_state(result)["loss_scale"] < 2.0**24
    assert read_state(result)["skipped_steps"] == 0
    assert result.validation_loss == pytest.approx(whole_run.validation_loss, abs=1e-2)
    event = next(m for m in map(json.loads, Path(result.run, "metrics.jsonl").read_text().splitlines()) if "from" in m)
    assert event == {"event": "loss-scale", "step": 1, "from": TOO_LARGE, "to": read_state(result)["loss_scale"]}


def test_a_run_that_overflowed_resumes_to_the_same_bits(half, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "INITIAL_LOSS_SCALE", TOO_LARGE)
    whole = train(recipe_of(half | {"output_dir": str(tmp_path / "one")}))
    parts = train_in_two_parts(recipe_of(half), monkeypatch, 5)
    assert distance(whole.run, parts.run) == 0
    assert read_state(whole)["loss_scale"] == read_state(parts)["loss_scale"]


def test_the_scale_is_doubled_after_enough_steps(half, monkeypatch):
    monkeypatch.setattr(loss_scaling, "STEPS_UNTIL_DOUBLED", 3)
    assert read_state(train(recipe_of(half)))["loss_scale"] == 2.0**16


def test_weights_that_give_nan_are_not_blamed_on_the_scale(half, monkeypatch):
    train_step, scales = TrainingLoop.train_step, []

    def step_with_broken_weights(loop: TrainingLoop, rows: list) -> dict[str, float]:
        for p in loop.model.parameters():
            p.data.fill_(float("nan"))
        try:
            return train_step(loop, rows)
        finally:
            scales.append(loop.state.loss_scale)

    monkeypatch.setattr(TrainingLoop, "train_step", step_with_broken_weights)
    with pytest.raises(RunError, match="NaN"):
        train(recipe_of(half))
    assert scales == [2.0**14]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(CASES))
def test_each_method_trains_fp32_weights_on_a_float16_base(method):
    torch.manual_seed(0)
    model = get_peft_model(llama().half(), CASES[method]()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    rows = [{"input_ids": [5, 3, 17, 7, 11, 2], "labels": [-100, -100, 17, 7, 11, 2]}]
    with using_packed_attention(model):
        loss = forward_backward(model, [make_collator(model, 0)(rows)], loss_scale=2.0**10)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in trained)
