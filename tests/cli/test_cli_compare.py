"""`slimtune compare`: its flags, its refusals and its exit codes; the room is stood in for."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from training.tiny_run import write_rows
from typer.testing import CliRunner

import slimtune.comparison.compare as room
from slimtune.cli import app

verb = sys.modules["slimtune.cli.compare"]  # by attribute it is the function

LINE = {
    "method": "lora", "loss_reduction": 0.5, "loss_reduction_ci95": [0.4, 0.6], "peak_bytes": 2**31,
    "file_bytes": 2**20, "time_seconds": 60, "seeds": [7], "rate": 2e-4, "rate_from": "default",
    "trained_percent": 1.25, "tuned_loss": 4.0, "front": ["size"],
    "trained_tokens": [1000], "oom_events": 0,
}  # fmt: skip
RESULT = {
    "output_dir": "o", "model": "m", "dtype": "bfloat16", "device": "cpu", "steps": 3, "seeds": [7], "rows": 8,
    "test_tokens": 92, "base_loss": 4.5, "methods": [LINE], "pairs": [], "left_out": [], "failed": [], "searched": {},
    "advice": "Take lora.",
}  # fmt: skip


def slimtune(*args: str):
    return CliRunner().invoke(app, ["compare", *args])


@pytest.fixture
def recipe(tiny_folder, tmp_path) -> str:
    starts = {"train": 0, "validation": 100, "test": 200}
    rows = {n: str(write_rows(tmp_path / f"{n}.jsonl", 12, start=at)) for n, at in starts.items()}
    train = {"batch_size": 6, "seed": 7, "learning_rate": 1e-2}
    tree = {
        "model": str(tiny_folder),
        "data": rows,
        "method": {"r": 4},
        "train": train,
        "output_dir": str(tmp_path / "o"),
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "r.yaml")


@pytest.fixture
def asked(monkeypatch) -> list:
    """Return the grids that a comparison was asked of; `asked.answer` is what it gives."""
    grids: list = []

    def compare(grid, say, *, plot=None):
        grids.append((grid, plot))
        return {**RESULT, "failed": answer["failed"]}

    answer: dict = {"failed": []}
    monkeypatch.setattr(room, "compare", compare)
    grids.append(answer)
    return grids


def test_flags_and_what_is_shown(recipe, asked, tmp_path):
    done = slimtune(recipe, "--methods", "lora, dora,full", "--seeds", "2", "--tokens", "500", "--out", "x", "--set",
                    "train.batch_size=3", "--set", "dora.r=2", "--plot", str(tmp_path / "p.svg"))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    grid, plot = asked[1]
    assert [e.label for e in grid.candidates] == ["lora", "dora", "full"]
    assert grid.candidates[1].settings == {"r": 2, "use_dora": True}
    assert (grid.seeds, grid.tokens, grid.trials, grid.output_dir) == ((7, 8), 500, 0, Path("x"))
    assert grid.build_recipe(grid.candidates[0], 7, Path("x")).train.batch_size == 3
    assert plot == tmp_path / "p.svg"
    assert "the recipe's learning rate, 0.01, is not used" in done.stderr
    for part in (
        "lora",
        "0.0002",
        "0.500 ± 0.100",
        "size",
        "Learning rates: the method's default (lora).",
        "Take lora.",
    ):
        assert part in done.stdout


def test_json_the_default_folder_and_a_search(recipe, asked, tmp_path):
    done = slimtune(recipe, "--methods", "lora", "--tune", "--trials", "3", "--json")
    assert json.loads(done.stdout) == RESULT
    grid, _ = asked[1]
    assert (grid.trials, grid.output_dir) == (3, tmp_path / "o-compare")


def test_a_failed_cell_is_exit_code_1_and_printed(recipe, asked):
    asked[0]["failed"] = [{"method": "lora", "seed": 8, "why": "no memory"}]
    done = slimtune(recipe, "--methods", "lora", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["failed"][0]["why"] == "no memory"
    assert "Failed: lora, seed 8 (no memory)." in slimtune(recipe, "--methods", "lora").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--methods", "lora,lroa"], "'lroa', did you mean 'lora'?"),
        (["--methods", ","], "--methods names no method"),
        (["--methods", "lora", "--seeds", "0"], "--seeds"),
        (["--methods", "lora", "--tokens", "3"], "--tokens 3 is less than one step"),
        (["--methods", "lora", "--set", "ia3.r=3"], "'ia3' is neither a compared method nor a section"),
        (["--methods", "lora", "--set", "train.epocs=3"], "did you mean 'epochs'"),
        (["--methods", "lora", "--plot", "p.gif"], "has the suffix '.gif'"),
    ],
)
def test_wrong_use(recipe, asked, args, says):
    done = slimtune(recipe, *args)
    assert done.exit_code == 2, done.stderr
    assert says in done.stderr.replace("\n", " ")
    assert done.stdout == ""
    assert len(asked) == 1


def test_what_is_not_installed_is_said(recipe, asked, monkeypatch):
    monkeypatch.setattr(verb, "PACKAGES", ("scipy", "no_such_package"))
    done = slimtune(recipe)
    assert done.exit_code == 2
    assert "compare needs no_such_package, not installed here" in done.stderr
    assert "slimtune[compare]" in done.stderr
