"""Trackers are the Trainer's own: TensorBoard's reader finds the losses; what is not installed is said first."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_run import recipe_of

import slimtune.training.train as run_module
from slimtune.cli import app
from slimtune.errors import UsageError
from slimtune.training.progress import require_trackers
from slimtune.training.train import train

# Its events are protobuf classes that Python 3.12 and newer warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_tensorboard_reads_the_losses(settings):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    folder = Path(train(recipe_of(settings, report_to=["tensorboard"]))["run"])
    read = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "train_loss"), ("eval/loss", "validation_loss")):
        told = [(e.step, e.value) for e in read.Scalars(tag)]
        logged = [(m["step"], m[key]) for m in metrics if key in m]
        assert told == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
        assert told
    assert not (folder / "checkpoints" / "runs").exists()


def test_a_missing_tracker_is_an_error_before_loading(settings, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "load_base_from_recipe", lambda *_: pytest.fail("the base was loaded"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in ("wandb", "mlflow") else find(n, *a))
    recipe = recipe_of(settings, report_to=["wandb", "tensorboard", "mlflow"])
    with pytest.raises(UsageError, match=r"'wandb', 'mlflow'.*not installed"):
        train(recipe)
    assert not Path(settings["output_dir"]).exists()
    file = Path(settings["data"]["train"]).with_name("recipe.yaml")
    file.write_text(recipe.to_yaml())
    with pytest.raises(SystemExit) as left:
        app(args=["train", str(file)])
    assert left.value.code == 2
    assert "hint: pip install wandb mlflow, or --set train.report_to=[]" in capsys.readouterr().err


def test_tensorboardx_will_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboardX" or None)
    require_trackers(["tensorboard"])
    with pytest.raises(UsageError, match="'trackio'"):
        require_trackers(["trackio"])
