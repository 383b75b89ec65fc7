"""A comparison from a recipe to its table; killed in the middle, with a cell that fails, in another's folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from training.tiny_run import write_rows

from slimtune.comparison import compare as run_module
from slimtune.comparison.compare import compare
from slimtune.comparison.grid import SETTINGS
from slimtune.comparison.launch import Ended
from slimtune.comparison.picture import draw
from slimtune.errors import DataError, RecipeError, RunError, UsageError
from slimtune.training.loop import TrainingLoop


def figures(result: dict) -> dict:
    """What must not hang on how often a comparison was interrupted."""
    own = (
        "method",
        "rate",
        "seeds",
        "trained_tokens",
        "gain_by_seed",
        "loss_reduction_ci95",
        "tuned_loss",
        "file_bytes",
    )
    return {
        "methods": [{k: line[k] for k in own} for line in result["methods"]],
        "pairs": result["pairs"],
        "base_loss": result["base_loss"],
    }


def trained(run: Path) -> list[int]:
    """Tokens trained on after each step."""
    return [json.loads(line)["trained_tokens"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_a_comparison_writes_and_says(grid, here, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(run_module, "draw", draw)
    result = compare(grid("lora", "ia3"), said.append, plot=tmp_path / "p.png")
    assert here == ["lora-7", "ia3-7", "lora-8", "ia3-8"]
    assert {p.name for p in (tmp_path / "c").iterdir()} >= {"settings.json", "compare.json", "table.md", "compare.svg"}
    assert json.loads((tmp_path / "c" / "compare.json").read_text()) == result
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "c").rglob("checkpoint-*"))
    lines = {line["method"]: line for line in result["methods"]}
    # The budget: three steps of about 230 tokens, the same rows for both methods, others for another seed.
    spent = {name: trained(tmp_path / "c" / "cells" / name) for name in here}
    assert spent["lora-7"] == spent["ia3-7"]
    assert spent["lora-8"] == spent["ia3-8"]
    assert spent["lora-7"] != spent["lora-8"]
    assert all(len(steps) == 3 and 600 < steps[-1] <= 900 for steps in spent.values())
    for line in result["methods"]:
        each = [json.loads((tmp_path / f"c/cells/{line['method']}-{s}/eval-test.json").read_text()) for s in (7, 8)]
        assert line["loss_reduction"] == pytest.approx(sum(e["loss_reduction"] for e in each) / 2)
        assert line["loss_reduction_ci95"][0] <= line["loss_reduction"] <= line["loss_reduction_ci95"][1]
    (pair,) = result["pairs"]
    assert pair["difference"] == pytest.approx(
        lines[pair["a"]]["loss_reduction"] - lines[pair["b"]]["loss_reduction"], abs=1e-6
    )
    table = (tmp_path / "c" / "table.md").read_text()
    assert result["advice"] in table
    assert "| lora | 0.0002 default |" in table
    assert any("plan: lora fits" in line for line in said)
    picture = (tmp_path / "c" / "compare.svg").read_text()
    assert all(word in picture for word in ("lora", "ia3", "peak memory, GiB"))


class Killed(BaseException):
    """Stands in for a signal that nothing can catch."""


def test_killed_in_the_middle_it_ends_with_the_same_numbers(grid, here, monkeypatch):
    whole = compare(grid("lora", "prompt", out="whole"))
    del here[:]
    ends, left = TrainingLoop.train_step, [5]

    def dies(self, rows):
        values = ends(self, rows)
        left[0] -= 1
        if not left[0]:
            raise Killed
        return values

    monkeypatch.setattr(TrainingLoop, "train_step", dies)
    with pytest.raises(Killed):
        compare(grid("lora", "prompt"))
    assert here == ["lora-7", "prompt-7"]
    said: list[str] = []
    result = compare(grid("lora", "prompt"), said.append)
    assert here[2:] == ["prompt-7", "lora-8", "prompt-8"]
    assert "[1/4] lora, seed 7: done already" in said
    assert "[2/4] prompt, seed 7: going on" in said
    assert figures(result) == figures(whole)
    del here[:]
    assert figures(compare(grid("lora", "prompt"))) == figures(whole)
    assert here == []


def test_a_cell_that_fails_is_reported_and_the_others_stand(grid, quick, monkeypatch):
    real = run_module.launch

    def fails(recipe_file, log, **how):
        if recipe_file.stem == "lora-7":
            return Ended("the disk is full", False, 0.0)
        return real(recipe_file, log, **how)

    monkeypatch.setattr(run_module, "launch", fails)
    whole = grid("lora", "ia3")
    result = compare(whole)
    assert result["failed"] == [{"method": "lora", "seed": 7, "why": "the disk is full"}]
    lines = {line["method"]: line for line in result["methods"]}
    assert (lines["lora"]["seeds"], lines["ia3"]["seeds"]) == ([8], [7, 8])
    assert (result["pairs"][0]["seeds"], result["pairs"][0]["beyond_noise"]) == ([8], False)
    table = (whole.out / "table.md").read_text()
    assert "Failed: lora, seed 7 (the disk is full)." in table
    assert "lora has 1 of 2 seeds." in table
    monkeypatch.setattr(run_module, "launch", real)
    assert compare(grid("lora", "ia3"))["failed"] == []
    assert quick == ["ia3-7", "lora-8", "ia3-8", "lora-7"]


def test_another_comparison_in_the_folder_is_refused_with_what_differs(grid, quick, tree):
    compare(grid("lora", seeds=1))
    with pytest.raises(UsageError, match="tokens: 900 then, 600 now"):
        compare(grid("lora", seeds=1, tokens=600))
    tree["train"]["batch_size"] = 3
    with pytest.raises(UsageError, match=r"train\.batch_size: 6 then, 3 now"):
        compare(grid("lora", seeds=1))
    tree["train"]["batch_size"] = 6
    with pytest.raises(UsageError, match=r"methods\.lora\.settings\.r: 4 then, 8 now"):
        compare(grid("lora", seeds=1, given={"lora.r": 8}))
    with open(tree["data"]["test"], "a") as f:
        f.write(Path(tree["data"]["test"]).read_text())
    with pytest.raises(UsageError, match="SHA-256"):
        compare(grid("lora", seeds=1))
    assert quick == ["lora-7"]


def test_methods_and_seeds_may_be_added(grid, quick):
    compare(grid("lora", seeds=1))
    result = compare(grid("ia3", "lora", seeds=2))
    assert quick == ["lora-7", "ia3-7", "ia3-8", "lora-8"]
    assert {line["method"]: line["seeds"] for line in result["methods"]} == {"lora": [7, 8], "ia3": [7, 8]}
    assert set(json.loads((grid("lora").out / SETTINGS).read_text())["methods"]) == {"lora", "ia3"}


def test_what_does_not_fit_is_left_out_and_said(grid, quick, monkeypatch):
    make_plan = run_module.make_plan

    def small(request, **options):
        plan = make_plan(request, **options)
        too_big = request.method_name == "ia3"
        return dataclasses.replace(plan, verdict="does not fit", reason="too big") if too_big else plan

    monkeypatch.setattr(run_module, "make_plan", small)
    result = compare(grid("lora", "ia3", seeds=1))
    assert result["left_out"] == [{"method": "ia3", "why": "too big"}]
    assert quick == ["lora-7"]
    assert "Left out: ia3 (too big)." in (grid("lora").out / "table.md").read_text()
    with pytest.raises(RunError, match="no method fits this machine: too big"):
        compare(grid("ia3", out="other"))
    assert not grid("ia3", out="other").out.exists()


def test_what_does_not_go_with_the_base_is_left_out_of_all_and_refused_by_name(grid, quick, monkeypatch):
    made = grid("all", seeds=1)
    assert "token_indices" in made.unfit["trainable_tokens"]
    keep = {"lora", "bitfit"}  # Llama has no biases
    made = dataclasses.replace(made, entries=tuple(e for e in made.entries if e.label in keep))
    result = compare(made)
    assert quick == ["lora-7"]
    assert {x["method"] for x in result["left_out"]} == {"bitfit", "trainable_tokens"}
    with pytest.raises(UsageError, match="bias"):
        compare(grid("lora", "bitfit", out="named"))
    with pytest.raises(RecipeError, match="token_indices"):
        grid("trainable_tokens")


def test_one_at_a_time(grid, quick):
    made = grid("lora", seeds=1)
    made.out.mkdir()
    with FileLock(made.out / ".lock"), pytest.raises(UsageError, match="another slimtune compare is at work"):
        compare(made)
    assert quick == []


def test_what_is_refused_before_anything_is_made(grid, tree, tmp_path):
    with pytest.raises(UsageError, match="--tokens 100 is less than one step: 6 rows have"):
        grid("lora", tokens=100)
    with pytest.raises(RecipeError, match="the recipe of lora holds a fault"):
        grid("lora", given={"lora.rnak": 4})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds no comparison but 'thesis.tex'"):
        compare(grid("lora"))
    lines = Path(tree["data"]["test"]).read_text().splitlines()
    Path(tree["data"]["test"]).write_text(lines[0])
    with pytest.raises(UsageError, match="leaves 1 rows to compare methods on"):
        grid("lora")
    Path(tree["data"]["test"]).write_text("\n".join(lines))
    blind = {**tree["data"], "validation": None, "validation_fraction": 0}
    tree["data"] = blind
    with pytest.raises(UsageError, match="no validation rows to search learning rates on"):
        grid("lora", trials=2)
    del tree["data"]["test"]
    with pytest.raises(UsageError, match="names no test rows"):
        grid("lora")
    assert not list((tmp_path / "c").glob("cells"))


def test_as_long_as_the_recipe_says_without_a_budget(grid, tree):
    tree["train"]["epochs"] = 2
    assert grid("lora", tokens=None).steps == 8
    tree["train"]["max_steps"] = 5
    assert grid("full", tokens=None).steps == 5


def test_validation_is_left_out_where_it_could_choose_nothing(grid):
    once = grid("lora")
    assert once.cell_recipe(once.entries[0], 7).data.validation is None
    longer = grid("lora", tokens=1500)
    assert longer.cell_recipe(longer.entries[0], 7).data.validation is not None


def test_rows_that_differ_are_no_pair(grid, quick):
    made = grid("lora", "ia3", seeds=1)
    compare(made)
    metrics = made.cell(made.entries[0], 7) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"trained_tokens": ', '"trained_tokens": 1'))
    with pytest.raises(RunError, match="learned from different rows"):
        compare(made)


def test_faulty_rows_are_said_before_anything_is_made(grid, tree):
    Path(tree["data"]["train"]).write_text("{}\n")
    with pytest.raises(DataError):
        grid("lora")


def test_rows_that_would_spoil_every_run_are_refused(grid, tree, quick):
    write_rows(Path(tree["data"]["train"]), 24, answer="!")
    with pytest.raises(DataError, match="answer says nothing"):
        grid("lora")
    assert compare(grid("lora", seeds=1, force=True))["failed"] == []


@pytest.mark.faults
def test_killed_for_real_in_the_middle_of_a_cell(tree, tmp_path):
    tree["train"] |= {"save_steps": 3, "batch_size": 3}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    def command(out: str) -> list[str]:
        more = ["--methods", "lora,full", "--seeds", "1", "--tokens", "3000", "--out", str(tmp_path / out), "--json"]
        return [sys.executable, "-m", "slimtune", "compare", str(recipe), *more]

    def finished(out: str) -> dict:
        done = subprocess.run(command(out), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    whole = finished("whole")
    with subprocess.Popen(command("c"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        cell, begun = tmp_path / "c" / "cells" / "full-7", time.monotonic()
        while process.poll() is None and not list(cell.glob("checkpoints/checkpoint-*")):
            assert time.monotonic() - begun < 300
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    result = finished("c")
    assert figures(result) == figures(whole)
