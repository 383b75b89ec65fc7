"""Traces that are kept on the disk: the same plan again, and a new trace where anything differs or is damaged."""

import copy
import json
from dataclasses import replace

import models_zoo as zoo
import pytest
import torch

import slimtune
from slimtune.planning import extrapolation as extrapolate
from slimtune.planning.extrapolation import extrapolate_merge_cpu_peak, extrapolate_step_trace
from slimtune.planning.plan_request import MicroBatchWorkload

LORA = slimtune.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def job():
    config = zoo.llama().config
    config.num_hidden_layers = 1
    return MicroBatchWorkload(base_config=config, method=LORA, dtype=torch.bfloat16, lengths=(64,))


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """The jobs that were traced since."""
    monkeypatch.setenv("SLIMTUNE_TRACES", str(tmp_path / "traces"))
    trace_memory, jobs = extrapolate.trace_training_step, []

    def count(job, *rest, **options):
        jobs.append(job)
        return trace_memory(job, *rest, **options)

    monkeypatch.setattr(extrapolate, "trace_training_step", count)
    return jobs


def test_second_plan_traces_nothing(job, traced, tmp_path):
    first, merge = extrapolate_step_trace(job), extrapolate_merge_cpu_peak(job, 1000)
    elsewhere = copy.deepcopy(job.base_config)
    elsewhere.name_or_path = "another/folder"
    again = extrapolate_step_trace(replace(job, base_config=elsewhere))
    assert len(traced) == 1
    assert (again, list(again.counts_by_operator_cost.items())) == (first, list(first.counts_by_operator_cost.items()))
    assert extrapolate_merge_cpu_peak(job, 1000) == merge > 0
    assert len(list((tmp_path / "traces").iterdir())) == 2


def test_a_base_whose_config_has_inf_is_kept(job, traced):
    """As Falcon-H1's and Granite 4's: time_step_limit."""
    job.base_config.time_step_limit = (0.0, float("inf"))
    assert extrapolate_step_trace(job) == extrapolate_step_trace(job)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": (65,)},
        {"dtype": torch.float32},
        {"method": slimtune.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM")},
        {"base_config": zoo.llama(hidden_size=48).config},
    ],
)
def test_other_jobs_are_traced(job, traced, changes):
    extrapolate_step_trace(job)
    extrapolate_step_trace(replace(job, **changes))
    extrapolate_step_trace(job, stop_after_backward=True)
    assert len(traced) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("1", "2"),
        lambda text: json.dumps({**json.loads(text), "trace": {}}),
    ],
)
def test_damaged_files_are_traced_and_replaced(job, traced, tmp_path, damage):
    first = extrapolate_step_trace(job)
    (file,) = (tmp_path / "traces").iterdir()
    text = file.read_text()
    file.write_text(damage(text))
    assert extrapolate_step_trace(job) == first
    assert len(traced) == 2
    assert file.read_text() == text


def test_code_of_others_and_unwritable_folders_keep_nothing(job, traced, tmp_path, monkeypatch):
    class Own(slimtune.LoraConfig):
        pass

    masked = slimtune.ShiraConfig(r=2, target_modules=["q_proj"])
    masked.mask_fn = lambda layer, r: torch.ones(1)
    for method in (Own(r=4, target_modules="all-linear"), masked):
        assert extrapolate.load_or_compute_trace(replace(job, method=method), lambda: "traced") == "traced"
    assert not (tmp_path / "traces").exists()
    monkeypatch.setenv("SLIMTUNE_TRACES", "/dev/null")
    assert extrapolate_step_trace(job) == extrapolate_step_trace(job)
    assert len(traced) == 2
