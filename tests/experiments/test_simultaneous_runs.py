"""Runs at once in one process: each as if it ran alone, on one base."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import distance, metrics, recipe_of, write_settings

from slimtune.core.config import Recipe
from slimtune.core.training.train import InterruptedAfterCheckpoint, train
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.errors import RunError, UsageError
from slimtune.experiments import simultaneous_runs as together
from slimtune.experiments.packed_run_adapters import copy_sharing_parameters
from slimtune.experiments.simultaneous_runs import train_recipes_together


@pytest.fixture
def settings(tmp_path, tiny_llama, tiny_tokenizer):
    return write_settings(tmp_path / "files", tiny_llama, tiny_tokenizer)


@pytest.fixture
def make(settings, tmp_path):
    """Return a recipe of a run: `make("a", r=8, seed=1, learning_rate=1e-3)`; method settings first."""

    def build(name: str, *, r: int = 4, lora_dropout: float = 0.0, **training) -> Recipe:
        method = {"name": "lora", "r": r, "lora_dropout": lora_dropout}
        return recipe_of({**settings, "method": method, "output_dir": str(tmp_path / name)}, **training)

    return build


@pytest.fixture
def packed_steps(monkeypatch) -> list[int]:
    """The number of runs in each step whose gradients were computed together."""
    steps: list[int] = []
    compute = together.forward_backward_packed_runs

    def count(models, *args):
        steps.append(len(models))
        return compute(models, *args)

    monkeypatch.setattr(together, "forward_backward_packed_runs", count)
    return steps


def test_three_runs_equal_runs_alone(make, packed_steps, tmp_path):
    several = {
        "a": {"r": 2, "learning_rate": 1e-2, "seed": 1},
        "b": {"r": 8, "learning_rate": 1e-3, "seed": 2, "batch_size": 4},
        "c": {"r": 4, "learning_rate": 3e-3, "seed": 1, "max_steps": 5},
    }
    outcomes = train_recipes_together([make(name, **how) for name, how in several.items()])
    assert packed_steps == [3] * 5 + [2] * 3, "then the runs have ended one after the other; the last one is alone"
    for (name, how), outcome in zip(several.items(), outcomes, strict=True):
        alone = train(make(f"{name}-alone", **how))
        for value in ("train_loss", "validation_loss"):
            together_values, alone_values = (metrics(tmp_path / n, value) for n in (name, f"{name}-alone"))
            assert together_values == pytest.approx(alone_values, abs=1e-6)
        assert distance(tmp_path / name, tmp_path / f"{name}-alone") < 1e-5
        for name in ("steps", "trained_tokens", "best_step", "rows"):
            assert getattr(outcome, name) == getattr(alone, name)


@pytest.mark.slow
def test_run_that_is_no_longer_wanted_ends_alone(make, packed_steps, tmp_path):
    recipes = [make("a", learning_rate=1e-2), make("b", learning_rate=1e-3)]
    stopped, kept = train_recipes_together(
        recipes, should_stop=lambda recipe: recipe is recipes[0] and len(packed_steps) == 2
    )
    assert isinstance(stopped, together.RunStoppedOutcome)
    assert len(metrics(tmp_path / "a", "train_loss")) == 2
    assert kept.train_loss == pytest.approx(train(make("b-alone", learning_rate=1e-3)).train_loss, abs=1e-6)
    assert not (tmp_path / "a" / "result.json").exists()
    assert train(recipes[0], resume=True).steps == kept.steps, "its folder is free"


@pytest.mark.slow
def test_one_run_or_dropout_is_bit_for_bit_as_alone(make, packed_steps, tmp_path):
    train_recipes_together([make("one")])
    train_recipes_together([make("a", lora_dropout=0.1), make("b", lora_dropout=0.1, seed=3)])
    assert packed_steps == []
    assert "dropout" in (tmp_path / "a" / "train.log").read_text()
    for name, how in {"one": {}, "a": {"lora_dropout": 0.1}, "b": {"lora_dropout": 0.1, "seed": 3}}.items():
        train(make(f"{name}-alone", **how))
        assert distance(tmp_path / name, tmp_path / f"{name}-alone") == 0


def test_failed_run_does_not_end_the_others(make, tmp_path):
    failed, outcome = train_recipes_together([make("failed", learning_rate=1e30), make("b")])
    assert isinstance(failed, RunError)
    assert outcome.steps == 8
    train(make("b-alone"))
    assert metrics(tmp_path / "b", "train_loss") == pytest.approx(metrics(tmp_path / "b-alone", "train_loss"), abs=1e-6)


@pytest.mark.slow
def test_out_of_memory_goes_on_one_after_the_other(make, monkeypatch, tmp_path):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(together, "forward_backward_packed_runs", fail)
    train_recipes_together([make("a"), make("b", seed=3)])
    assert "memory" in (tmp_path / "a" / "train.log").read_text()
    train(make("a-alone"))
    assert distance(tmp_path / "a", tmp_path / "a-alone") == 0


@pytest.mark.slow
def test_interrupted_runs_are_resumed(make, monkeypatch, tmp_path):
    several = {"a": {"r": 2}, "b": {"seed": 3}}
    after_step, steps = TrainingLoop.after_step, [0]

    def interrupt(loop, values):
        steps[0] += 1
        if steps[0] == 5:  # of both runs
            os.kill(os.getpid(), signal.SIGINT)
        return after_step(loop, values)

    monkeypatch.setattr(TrainingLoop, "after_step", interrupt)
    with pytest.raises(InterruptedAfterCheckpoint):
        train_recipes_together([make(name, **how) for name, how in several.items()])
    monkeypatch.setattr(TrainingLoop, "after_step", after_step)
    for name in several:
        (newest,) = (tmp_path / name / "checkpoints").iterdir()
        assert json.loads((newest / "training_state.json").read_text())["step"] == 3
    train_recipes_together([make(name, **how) for name, how in several.items()], resume=[True, True])
    for name, how in several.items():
        train(make(f"{name}-alone", **how))
        alone, resumed = (metrics(tmp_path / n, "train_loss") for n in (f"{name}-alone", name))
        assert resumed == pytest.approx(alone, abs=1e-6)


def test_base_is_in_memory_once(tiny_llama):
    model = tiny_llama()
    copy = copy_sharing_parameters(model)
    tensors = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in (*copy.parameters(), *copy.buffers())} == tensors
    assert {*model.modules()}.isdisjoint(copy.modules())
    assert copy.config is not model.config


def test_different_bases_are_refused(make):
    other = Recipe.from_dict({**make("b").to_dict(), "model": {"name": str(Path("elsewhere"))}})
    with pytest.raises(UsageError, match="bases"):
        train_recipes_together([make("a"), other])
