"""Trackers are accelerate's: TensorBoard's reader finds the losses; what is not installed is said first."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_run import recipe_of

from slimtune.core.training.train import train
from slimtune.errors import UsageError
from slimtune.extras.trackers import require_installed_trackers

# Its events are protobuf classes that Python 3.12 and newer warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_tensorboard_reads_the_losses(settings):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = Path(train(recipe_of(settings, report_to=["tensorboard"])).run)
    read = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "train_loss"), ("eval/loss", "validation_loss")):
        logged = [(m["step"], pytest.approx(m[key], rel=1e-6)) for m in metrics if key in m]
        assert [(e.step, e.value) for e in read.Scalars(tag)] == logged != []


def test_missing_tracker_is_an_error_before_loading(settings, monkeypatch):
    monkeypatch.setattr(
        "slimtune.core.training.base_model.load_base", lambda *_, **__: pytest.fail("the base was loaded")
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in ("wandb", "mlflow") else find(n, *a))
    with pytest.raises(UsageError, match="'wandb', 'mlflow'") as e:
        train(recipe_of(settings, report_to=["wandb", "tensorboard", "mlflow"]))
    assert e.value.hint == "pip install wandb mlflow, or --set train.report_to=[]"
    assert not Path(settings["output_dir"]).exists()


def test_tensorboardx_will_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboardX" or None)
    require_installed_trackers(["tensorboard"])
    with pytest.raises(UsageError, match="'trackio'"):
        require_installed_trackers(["trackio"])
