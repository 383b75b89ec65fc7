"""A comparison from a recipe to its table: complete, killed and resumed, with a failed run, in a foreign folder."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from tiny_run import write_rows

from slimtune.core.foundation.json_results import from_json_dict, to_json_dict
from slimtune.errors import DataError, RecipeError, RunError, UsageError
from slimtune.experiments import comparison as module
from slimtune.experiments.comparison import run_comparison
from slimtune.experiments.comparison_chart import write_score_cost_chart
from slimtune.experiments.experiment_output_dir import SETTINGS_FILE
from slimtune.experiments.experiment_results import ComparedMethod, CompareResult, FailedRun, LeftOutMethod
from slimtune.experiments.run_worker import WorkerResult

pytestmark = pytest.mark.usefixtures("kept_traces")
FIGURES = ("method", "rate", "seeds", "trained_tokens", "loss_reduction_by_seed", "loss_reduction", "tuned_loss",
           "file_bytes")  # fmt: skip


def figures(result: CompareResult) -> dict:
    """Return the figures that interruptions must not change."""
    methods = [{name: getattr(method, name) for name in FIGURES} for method in result.methods]
    return {"methods": methods, "pairs": result.pairs, "base_loss": result.base_loss}


def by_method(result: CompareResult) -> dict[str, ComparedMethod]:
    return {method.method: method for method in result.methods}


@pytest.mark.slow
def test_files_and_log(grid, in_process, tmp_path, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(module, "write_score_cost_chart", write_score_cost_chart)
    result = run_comparison(grid("lora", "ia3"), log.append, plot=tmp_path / "p.png")
    assert in_process == ["lora-7", "ia3-7", "lora-8", "ia3-8"]
    out = tmp_path / "c"
    assert {p.name for p in out.iterdir()} >= {"settings.json", "compare.json", "table.md", "compare.svg"}
    assert json.loads((out / "compare.json").read_text()) == to_json_dict(result)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("checkpoint-*"))
    # The budget: three steps of about 230 tokens, the same rows for both methods, others for another seed.
    tokens = {}
    for name in in_process:
        lines = (out / "cells" / name / "metrics.jsonl").read_text().splitlines()
        tokens[name] = [json.loads(line)["trained_tokens"] for line in lines]
    assert tokens["lora-7"] == tokens["ia3-7"] != tokens["lora-8"] == tokens["ia3-8"]
    assert all(len(steps) == 3 and 600 < steps[-1] <= 900 for steps in tokens.values())
    lines = by_method(result)
    for name, line in lines.items():
        each = [json.loads((out / f"cells/{name}-{s}/eval-test.json").read_text()) for s in (7, 8)]
        reduction = line.loss_reduction
        assert reduction.value == pytest.approx(sum(e["loss_reduction"] for e in each) / 2)
        assert reduction.low <= reduction.value <= reduction.high
    (pair,) = result.pairs
    difference = lines[pair.a].loss_reduction.value - lines[pair.b].loss_reduction.value
    assert pair.difference == pytest.approx(difference, abs=1e-6)
    table = (out / "table.md").read_text()
    assert result.advice in table
    assert "| lora | 0.005 default |" in table
    assert any("plan: lora fits" in line for line in log)
    picture = (out / "compare.svg").read_text()
    assert all(word in picture for word in ("lora", "ia3", "peak memory, GiB"))


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_numbers(grid, in_process, kill_after):
    whole = run_comparison(grid("lora", "prompt", out="whole"))
    del in_process[:]
    kill_after(5)
    with pytest.raises(BaseException, match="killed"):
        run_comparison(grid("lora", "prompt"))
    assert in_process == ["lora-7", "prompt-7"]
    log: list[str] = []
    result = run_comparison(grid("lora", "prompt"), log.append)
    assert in_process[2:] == ["prompt-7", "lora-8", "prompt-8"]
    assert figures(result) == figures(whole)
    del in_process[:]
    assert figures(run_comparison(grid("lora", "prompt"))) == figures(whole)
    assert in_process == []


@pytest.mark.slow
def test_seeds_at_once_give_the_numbers_of_seeds_alone(grid, in_process):
    alone = by_method(run_comparison(grid("lora", "ia3", out="alone")))
    del in_process[:]
    result = run_comparison(grid("lora", "ia3", at_once=2))
    assert in_process == ["lora-7", "lora-8", "ia3-7", "ia3-8"]
    assert result.failed == []
    for name, line in by_method(result).items():
        assert line.loss_reduction_by_seed == pytest.approx(alone[name].loss_reduction_by_seed, abs=1e-6)
        assert line.trained_tokens == alone[name].trained_tokens
    assert result.at_once == 2


@pytest.mark.slow
def test_failed_run_is_reported_and_tried_again(grid, without_training, monkeypatch):
    launch_worker = module.train_recipes_at_once_in_subprocess

    def fail(files, **how):
        failed = files[0].stem == "lora-7"
        return WorkerResult("broken", False, 0.0) if failed else launch_worker(files, **how)

    monkeypatch.setattr(module, "train_recipes_at_once_in_subprocess", fail)
    settings = grid("lora", "ia3")
    result = run_comparison(settings)
    assert result.failed == [FailedRun(method="lora", seed=7, why="broken")]
    assert {name: line.seeds for name, line in by_method(result).items()} == {"lora": [8], "ia3": [7, 8]}
    assert [(m.method, m.ranked) for m in result.methods] == [("ia3", True), ("lora", False)]
    assert result.pairs == []
    assert result.advice.endswith("Not ranked, because a run failed: lora.")
    assert by_method(result)["lora"].front == []
    table = (settings.output_dir / "table.md").read_text()
    assert "lora, seed 7 (broken)" in table
    assert re.search(r"lora .*\b1 of 2\b", table)
    monkeypatch.setattr(module, "train_recipes_at_once_in_subprocess", launch_worker)
    assert run_comparison(grid("lora", "ia3")).failed == []
    assert without_training == ["ia3-7", "lora-8", "ia3-8", "lora-7"]


def test_other_settings_in_the_folder(grid, without_training, tree):
    run_comparison(grid("lora", seeds=1))
    with pytest.raises(UsageError, match="tokens: 900 before, 600 now"):
        run_comparison(grid("lora", seeds=1, tokens=600))
    tree["train"]["batch_size"] = 3
    with pytest.raises(UsageError, match=r"train\.batch_size: 6 before, 3 now"):
        run_comparison(grid("lora", seeds=1))
    tree["train"]["batch_size"] = 6
    with pytest.raises(UsageError, match=r"methods\.lora\.settings\.r: 4 before, 8 now"):
        run_comparison(grid("lora", seeds=1, overrides={"lora.r": 8}))
    with open(tree["data"]["test"], "a") as f:
        f.write(Path(tree["data"]["test"]).read_text())
    with pytest.raises(UsageError, match="SHA-256"):
        run_comparison(grid("lora", seeds=1))
    assert without_training == ["lora-7"]


def test_methods_and_seeds_can_be_added(grid, without_training):
    run_comparison(grid("lora", seeds=1))
    result = run_comparison(grid("ia3", "lora", seeds=2))
    assert without_training == ["lora-7", "ia3-7", "ia3-8", "lora-8"]
    assert {name: line.seeds for name, line in by_method(result).items()} == {"lora": [7, 8], "ia3": [7, 8]}
    assert set(json.loads((grid("lora").output_dir / SETTINGS_FILE).read_text())["methods"]) == {"lora", "ia3"}


def test_method_that_does_not_fit_is_left_out(grid, without_training, monkeypatch):
    estimate_resources = module.estimate_resources

    def make_small_plan(request, **options):
        plan = estimate_resources(request, **options)
        too_big = request.method.name == "ia3"
        return dataclasses.replace(plan, verdict="does not fit", reason="too big") if too_big else plan

    monkeypatch.setattr(module, "estimate_resources", make_small_plan)
    result = run_comparison(grid("lora", "ia3", seeds=1))
    assert result.left_out == [LeftOutMethod(method="ia3", why="too big")]
    assert without_training == ["lora-7"]
    assert "ia3 (too big)" in (grid("lora").output_dir / "table.md").read_text()
    with pytest.raises(RunError, match="too big"):
        run_comparison(grid("ia3", out="other"))
    assert not grid("ia3", out="other").output_dir.exists()


def test_unsuited_method_is_left_out_of_all_but_refused_by_name(grid, without_training):
    settings = grid("all", seeds=1)
    assert "token_indices" in settings.excluded["trainable_tokens"]
    chosen = tuple(c for c in settings.candidates if c.label in ("lora", "bitfit"))  # Llama has no biases
    result = run_comparison(dataclasses.replace(settings, candidates=chosen))
    assert without_training == ["lora-7"]
    assert {x.method for x in result.left_out} == {"bitfit", "trainable_tokens"}
    with pytest.raises(UsageError, match="bias"):
        run_comparison(grid("lora", "bitfit", out="named"))
    with pytest.raises(RecipeError, match="token_indices"):
        grid("trainable_tokens")


def test_second_process_is_refused(grid, without_training):
    settings = grid("lora", seeds=1)
    settings.output_dir.mkdir()
    with FileLock(settings.output_dir / ".lock"), pytest.raises(UsageError, match="compare"):
        run_comparison(settings)
    assert without_training == []


def test_wrong_input_writes_nothing(grid, tree, tmp_path):
    with pytest.raises(UsageError, match=r"--tokens 100 .*\b6 rows"):
        grid("lora", tokens=100)
    with pytest.raises(RecipeError, match=r"(?s)lora: 1 .*rnak"):
        grid("lora", overrides={"lora.rnak": 4})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"'thesis\.tex'"):
        run_comparison(grid("lora"))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.tex"]
    tree["data"] |= {"validation": None, "validation_fraction": 0}
    with pytest.raises(UsageError, match="validation"):
        grid("lora", trials=2)
    test_rows = Path(tree["data"]["test"])
    test_rows.write_text(test_rows.read_text().splitlines()[0])
    with pytest.raises(UsageError, match=r"\b1 rows"):
        grid("lora")
    tree["data"]["test"] = tree["data"]["train"]
    Path(tree["data"]["train"]).write_text("{}\n")
    with pytest.raises(DataError):
        grid("lora")
    del tree["data"]["test"]
    with pytest.raises(UsageError, match="test"):
        grid("lora")


def test_length_and_validation_of_a_run(grid, tree):
    once, longer = grid("lora"), grid("lora", tokens=1500)
    assert once.cell_recipe(once.candidates[0], 7).data.validation is None, "one checkpoint leaves nothing to choose"
    assert longer.cell_recipe(longer.candidates[0], 7).data.validation is not None
    tree["train"]["epochs"] = 2
    assert grid("lora", tokens=None).steps == 8
    tree["train"]["max_steps"] = 5
    assert grid("full", tokens=None).steps == 5


def test_different_rows_cannot_be_compared(grid, without_training):
    settings = grid("lora", "ia3", seeds=1)
    run_comparison(settings)
    metrics = settings.run_dir(settings.candidates[0], 7).metrics_file
    metrics.write_text(metrics.read_text().replace('"trained_tokens": ', '"trained_tokens": 1'))
    with pytest.raises(RunError, match="rows"):
        run_comparison(settings)


def test_faulty_rows_are_refused_unless_forced(grid, tree, without_training):
    write_rows(Path(tree["data"]["train"]), 24, answer="!")
    with pytest.raises(DataError, match="placeholder"):
        grid("lora")
    assert run_comparison(grid("lora", seeds=1, allow_faulty_rows=True)).failed == []


@pytest.mark.faults
def test_killed_for_real_in_the_middle_of_a_cell(tree, tmp_path):
    tree["train"] |= {"save_steps": 3, "batch_size": 3}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    def command(out: str) -> list[str]:
        more = ["--methods", "lora,full", "--seeds", "1", "--tokens", "3000", "--out", str(tmp_path / out), "--json"]
        return [sys.executable, "-m", "slimtune", "compare", str(recipe), *more]

    def finished(out: str) -> CompareResult:
        done = subprocess.run(command(out), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return from_json_dict(CompareResult, json.loads(done.stdout))

    whole = finished("whole")
    with subprocess.Popen(command("c"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        cell, start = tmp_path / "c" / "cells" / "full-7", time.monotonic()
        while process.poll() is None and not list(cell.glob("checkpoints/checkpoint-*")):
            assert time.monotonic() - start < 300
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert figures(finished("c")) == figures(whole)
