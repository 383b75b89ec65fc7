"""`slimtune compare`: its flags, its refusals and its exit codes; the comparison is replaced."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hand_results import make_comparison, make_method
from tiny_run import write_rows

import slimtune.experiments.comparison as comparison
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.experiments.experiment_results import FailedRun

METHOD = make_method("lora", 0.5, half=0.1, seeds=[7], front=["size"], trained_tokens=[1000])
RESULT = make_comparison(METHOD, seeds=[7], rows=8, test_tokens=92)


@pytest.fixture
def recipe(tiny_folder, tmp_path) -> Path:
    starts = {"train": 0, "validation": 100, "test": 200}
    tree = {
        "model": str(tiny_folder),
        "data": {n: str(write_rows(tmp_path / f"{n}.jsonl", 12, start=at)) for n, at in starts.items()},
        "method": {"r": 4},
        "train": {"batch_size": 6, "seed": 7, "learning_rate": 1e-2},
        "output_dir": str(tmp_path / "o"),
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "r.yaml"


@pytest.fixture
def calls(monkeypatch) -> list:
    """Replace `compare` by one that returns RESULT; list its grids, plots and places."""
    found: list = []

    def compare(grid, log, *, plot=None, executor_spec=None):
        found.append((grid, plot, executor_spec))
        return RESULT

    monkeypatch.setattr(comparison, "run_comparison", compare)
    return found


def test_flags_and_screen(recipe, calls, slimtune, tmp_path):
    done = slimtune(
        "compare", recipe, "--methods", "lora, dora,full", "--seeds", 2, "--tokens", 500, "--out", "x",
        "--set", "train.batch_size=3", "--set", "dora.r=2", "--plot", tmp_path / "p.svg", "--at-once", 2,
        "--on", "local:3",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    ((grid, plot, place),) = calls
    assert [c.label for c in grid.candidates] == ["lora", "dora", "full"]
    assert grid.candidates[1].settings == {"r": 2, "use_dora": True}
    assert (grid.seeds, grid.tokens, grid.trials_per_candidate, grid.output_dir) == ((7, 8), 500, 0, Path("x"))
    assert grid.build_recipe(grid.candidates[0], 7, Path("x")).train.batch_size == 3
    assert (plot, grid.at_once, place.max_parallel_runs) == (tmp_path / "p.svg", 2, 3)
    assert "0.01" in done.stderr, "the recipe's learning rate is not used"
    rate = "Learning rates: the method's default (lora)."
    for part in ("lora", "0.0002", "0.500 ± 0.100", "size", rate, "Take lora."):
        assert part in done.stdout


def test_json_default_folder_and_search(recipe, calls, slimtune_json, tmp_path):
    assert slimtune_json("compare", recipe, "--methods", "lora", "--tune", "--trials", 3) == to_json_dict(RESULT)
    assert (calls[0][0].trials_per_candidate, calls[0][0].output_dir) == (3, tmp_path / "o-compare")


def test_failed_run_is_exit_code_1(recipe, slimtune, monkeypatch):
    failed = FailedRun(method="lora", seed=8, why="no memory")
    monkeypatch.setattr(comparison, "run_comparison", lambda *_, **__: replace(RESULT, failed=[failed]))
    done = slimtune("compare", recipe, "--methods", "lora", "--json")
    assert (done.exit_code, json.loads(done.stdout)["failed"]) == (1, [to_json_dict(failed)])
    assert "lora, seed 8 (no memory)" in slimtune("compare", recipe, "--methods", "lora").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "lora,lroa"], "'lroa', did you mean 'lora'?"),
        (["--methods", ","], "--methods names no method"),
        (["--seeds", "0"], "--seeds"),
        (["--tokens", "3"], "--tokens 3 is less than one step"),
        (["--methods", "lora", "--set", "ia3.r=3"], "'ia3' is neither a compared method nor a section"),
        (["--plot", "p.gif"], "has the suffix '.gif'"),
    ],
)
def test_wrong_use(recipe, calls, slimtune, args, message):
    done = slimtune("compare", recipe, *args)
    assert (done.exit_code, done.stdout, calls) == (2, "", [])
    assert message in done.stderr.replace("\n", " ")


def test_missing_package(recipe, calls, slimtune, monkeypatch):
    command = sys.modules["slimtune.cli.compare_command"]  # by attribute it is the function
    monkeypatch.setattr(command, "COMPARE_PACKAGES", ("scipy", "no_such_package"))
    done = slimtune("compare", recipe)
    assert (done.exit_code, calls) == (2, [])
    assert "no_such_package" in done.stderr
    assert "slimtune[compare]" in done.stderr
