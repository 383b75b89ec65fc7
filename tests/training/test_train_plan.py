"""Training keeps to its plan: planned before a weight is loaded, refused where it does not fit, probed, recorded."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import recipe_of
from typer.testing import CliRunner

import slimtune.planning.gpus as cards
import slimtune.training.train as run_module
from slimtune.cli import app
from slimtune.errors import ModelError, RunError
from slimtune.planning.gpus import Gpu, detect_gpu
from slimtune.planning.planner import make_plan
from slimtune.planning.request import build_request
from slimtune.training.train import train
from slimtune.utils.device import peak_memory, reset_peak_memory


def planned(recipe, lengths):
    return make_plan(build_request(recipe, detect_gpu("cpu"), lengths)).to_dict()


def slimtune(*args):
    return CliRunner().invoke(app, list(args))


def written(settings, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(settings).to_yaml())
    return file


def test_a_run_is_planned_probed_and_recorded(settings, tmp_path):
    asked = []

    def planner(recipe, lengths):
        assert not asked
        asked.append(lengths)
        return planned(recipe, lengths)

    result = train(recipe_of(settings), planner=planner)
    assert len(asked[0]) == 30  # 24 rows to train on, 6 to validate
    record = json.loads((Path(result["run"]) / "plan.json").read_text())
    assert record["plan"]["adapter_bytes"] == pytest.approx(result["adapter_bytes"], rel=0.02)
    assert record["plan"]["trainable_params"] == result["trainable_params"]
    assert record["plan"]["total_params"] == result["total_params"]
    found = record["probe"]
    assert set(found) == {"tokens", "bytes", "low", "high", "as_planned"}
    # Of a base this small the process is nearly all there is; the test's own process is larger than a run's.
    assert found["bytes"] > record["plan"]["allocated_bytes"]
    assert found["tokens"] <= record["plan"]["max_tokens_per_micro_batch"]
    assert "the longest micro-batch" in (Path(result["run"]) / "train.log").read_text()


def test_a_plan_changes_no_result(settings, tmp_path):
    """The probe draws dropout, fills gradients and drops them: the run after it is the run without it."""
    plain = train(recipe_of({**settings, "output_dir": str(tmp_path / "plain")}))
    probed = train(recipe_of({**settings, "output_dir": str(tmp_path / "probed")}), planner=planned)
    one, other = (load_file(Path(r["adapter"]) / "adapter_model.safetensors") for r in (plain, probed))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert plain["train_loss"] == probed["train_loss"]


def test_a_refused_plan_loads_nothing(settings, monkeypatch):
    def refuse(recipe, lengths):
        raise RunError("this run does not fit")

    monkeypatch.setattr(run_module, "load_base_from_recipe", lambda recipe: pytest.fail("the base was loaded"))
    with pytest.raises(RunError, match="does not fit"):
        train(recipe_of(settings), planner=refuse)
    assert not Path(settings["output_dir"]).exists()


def test_the_command_line_refuses_and_can_be_forced(settings, tmp_path, monkeypatch):
    small = Gpu("a small machine", "cpu", "", "", 2**28, 2**28)
    monkeypatch.setattr(cards, "detect_gpu", lambda device="auto": small)
    file = written(settings, tmp_path)
    done = slimtune("train", str(file))
    assert done.exit_code == 1
    assert "error: this run does not fit: it needs" in done.stderr
    assert "hint: change it so, or --force" in done.stderr
    assert not Path(settings["output_dir"]).exists()
    done = slimtune("train", str(file), "--force")
    assert done.exit_code == 0, done.stderr
    assert "plan: it does not fit" in done.stderr
    assert (Path(settings["output_dir"]) / "result.json").is_file()


def test_an_unplannable_run_is_trained(settings, tmp_path, monkeypatch):
    def strange(*_, **__):
        raise ModelError("this model's step hangs on values")

    monkeypatch.setattr("slimtune.planning.planner.make_plan", strange)
    done = slimtune("train", str(written(settings, tmp_path)))
    assert done.exit_code == 0, done.stderr
    assert "not planned: this model's step hangs on values" in done.stderr
    assert not (Path(settings["output_dir"]) / "plan.json").exists()


def test_micro_batches_keep_to_the_plan(settings):
    """Free memory may say more than the plan: the plan is what was promised."""
    plan = {}

    def planner(recipe, lengths):
        plan.update(planned(recipe, lengths), max_tokens_per_micro_batch=40)
        return plan

    result = train(recipe_of(settings), planner=planner)
    record = json.loads((Path(result["run"]) / "plan.json").read_text())
    longest = max(plan["seq_len"], 40)
    assert record["probe"]["tokens"] <= longest


def test_the_probe_runs_out_of_memory_before_training(settings, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("slimtune.training.memory_probe.forward_backward", full)
    with pytest.raises(RunError, match=r"not enough memory for \d+ tokens of one row \(the longest micro-batch"):
        train(recipe_of(settings), planner=planned)
    assert not Path(settings["output_dir"]).exists()


def test_the_peak_counts_from_the_reset_on():
    cpu = torch.device("cpu")
    with mmap.mmap(-1, 2**28) as big:  # past the allocator, which may keep what it was given
        big.write(b"x" * 2**28)
        with_it = peak_memory(cpu)
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < with_it - 2**27
