"""Training keeps to its plan: planned before a weight is loaded, refused where it does not fit, probed, recorded."""

import dataclasses
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from error_facts import has_code
from tiny_run import distance, recipe_of

import slimtune.planning.this_machine as this_machine
from slimtune.core.data.collator import Collator
from slimtune.core.foundation.device import count_peak_memory, reset_peak_memory
from slimtune.core.training.train import train
from slimtune.errors import ModelError, RunError
from slimtune.planning.gpu_specs import GpuSpec
from slimtune.planning.memory_probe import pick_longest_rows_for_micro_batch
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import estimate_resources
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec


def plan(recipe, lengths, content):
    return estimate_resources(
        build_plan_request(recipe, detect_gpu_or_cpu_spec("cpu"), lengths, row_composition=content)
    )


@pytest.fixture
def recipe(settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(settings).to_yaml())
    return file


def test_run_is_planned_probed_and_recorded(settings, whole_run):
    """The probe draws dropout, fills gradients and drops them: the run after it is the run without it."""
    calls = []

    def planner(recipe, lengths, content):
        calls.append(lengths)
        return plan(recipe, lengths, content)

    result = train(recipe_of(settings), planner=planner)
    assert [len(lengths) for lengths in calls] == [30]  # 24 rows to train on, 6 to validate
    record = json.loads((Path(result.run) / "plan.json").read_text())
    assert record["plan"]["adapter_bytes"] == pytest.approx(result.adapter_bytes, rel=0.02)
    assert record["plan"]["trainable_params"] == result.trainable_params
    assert record["plan"]["total_params"] == result.total_params
    probe = record["probe"]
    assert set(probe) == {"tokens", "bytes", "low", "high", "as_planned"}
    # Of a base this small the process is nearly all there is; the test's own process is larger than a run's.
    assert probe["bytes"] > record["plan"]["allocated_bytes"]
    assert probe["tokens"] <= record["plan"]["max_tokens_per_micro_batch"]
    log = (Path(result.run) / "train.log").read_text()
    assert f"{probe['tokens']} tokens" in log
    assert ("the plan is off" in log) != probe["as_planned"]
    assert distance(result.run, whole_run.run) == 0
    assert result.train_loss == whole_run.train_loss


def test_probed_rows_fill_one_micro_batch():
    """The longest rows alone would be divided into micro-batches of 60 tokens, which steps of other rows exceed."""
    rows = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate([60] * 4 + [25] * 8)]
    data = type("Rows", (list,), {"lengths": np.array([len(r["input_ids"]) for r in rows])})(rows)
    found = pick_longest_rows_for_micro_batch(data, Collator(0, max_tokens=100), 4)
    assert [len(row["input_ids"]) for row in found] == [60, 25]
    assert [len(row["input_ids"]) for row in pick_longest_rows_for_micro_batch(data, Collator(0), 4)] == [60] * 4


def test_refused_plan_loads_nothing(settings, monkeypatch):
    def refuse(*_):
        raise RunError("this run does not fit")

    monkeypatch.setattr(
        "slimtune.core.training.base_model.load_base", lambda *_, **__: pytest.fail("the base was loaded")
    )
    with pytest.raises(RunError):
        train(recipe_of(settings), planner=refuse)
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.slow
def test_command_line_refuses_and_can_be_forced(settings, recipe, slimtune, monkeypatch):
    small = GpuSpec("a small machine", "cpu", "", "", 2**28, 2**28)
    monkeypatch.setattr(this_machine, "detect_gpu_or_cpu_spec", lambda device="auto": small)
    done = slimtune("train", recipe)
    assert done.exit_code == 1
    assert "error: " in done.stderr
    assert "--force" in done.stderr
    assert not Path(settings["output_dir"]).exists()
    done = slimtune("train", recipe, "--force")
    assert done.exit_code == 0, done.stderr
    assert "does not fit" in done.stderr


def test_unplannable_run_is_trained(settings, recipe, slimtune, monkeypatch):
    def strange(*_, **__):
        raise ModelError("strange steps")

    monkeypatch.setattr("slimtune.planning.planner.estimate_resources", strange)
    done = slimtune("train", recipe)
    assert done.exit_code == 0, done.stderr
    assert "strange steps" in done.stderr
    assert not (Path(settings["output_dir"]) / "plan.json").exists()


@pytest.mark.slow
def test_micro_batches_keep_to_the_plan(settings):
    """Free memory may say more than the plan: the plan is what was promised."""
    result = train(
        recipe_of(settings), planner=lambda *job: dataclasses.replace(plan(*job), max_tokens_per_micro_batch=40)
    )
    record = json.loads((Path(result.run) / "plan.json").read_text())
    assert record["probe"]["tokens"] <= max(record["plan"]["seq_len"], 40)


@pytest.mark.slow
def test_probe_out_of_memory_leaves_no_folder(settings, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("slimtune.planning.memory_probe.forward_backward", full)
    with pytest.raises(RunError, check=has_code("system-memory")):
        train(recipe_of(settings), planner=plan)
    assert not Path(settings["output_dir"]).exists()


def test_peak_counts_from_the_reset_on():
    cpu = torch.device("cpu")
    with mmap.mmap(-1, 2**28) as big:  # past the allocator, which may keep what it was given
        big.write(b"x" * 2**28)
        with_it = count_peak_memory(cpu)
    reset_peak_memory(cpu)
    assert count_peak_memory(cpu) < with_it - 2**27
