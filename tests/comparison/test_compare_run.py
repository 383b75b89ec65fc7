"""A comparison from a recipe to its table: complete, killed and resumed, with a failed run, in a foreign folder."""

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
from slimtune.comparison.grid import SETTINGS_FILE
from slimtune.comparison.picture import draw_comparison
from slimtune.comparison.worker import WorkerResult
from slimtune.errors import DataError, RecipeError, RunError, UsageError
from slimtune.training.loop import TrainingLoop


def figures(result: dict) -> dict:
    """The figures that interruptions must not change."""
    own = (
        "method",
        "rate",
        "seeds",
        "trained_tokens",
        "loss_reduction_by_seed",
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
    """Trained tokens after each step."""
    return [json.loads(line)["trained_tokens"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_files_and_log(grid, in_process, tmp_path, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(run_module, "draw_comparison", draw_comparison)
    result = compare(grid("lora", "ia3"), log.append, plot=tmp_path / "p.png")
    assert in_process == ["lora-7", "ia3-7", "lora-8", "ia3-8"]
    assert {p.name for p in (tmp_path / "c").iterdir()} >= {"settings.json", "compare.json", "table.md", "compare.svg"}
    assert json.loads((tmp_path / "c" / "compare.json").read_text()) == result
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "c").rglob("checkpoint-*"))
    lines = {line["method"]: line for line in result["methods"]}
    # The budget: three steps of about 230 tokens, the same rows for both methods, others for another seed.
    spent = {name: trained(tmp_path / "c" / "cells" / name) for name in in_process}
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
    assert any("plan: lora fits" in line for line in log)
    picture = (tmp_path / "c" / "compare.svg").read_text()
    assert all(word in picture for word in ("lora", "ia3", "peak memory, GiB"))


class Killed(BaseException):
    """Replaces a signal that cannot be caught."""


def test_killed_and_resumed_gives_the_same_numbers(grid, in_process, monkeypatch):
    whole = compare(grid("lora", "prompt", out="whole"))
    del in_process[:]
    after_step, steps_left = TrainingLoop.after_step, [5]

    def killed_after_five_steps(self, values):
        result = after_step(self, values)
        steps_left[0] -= 1
        if not steps_left[0]:
            raise Killed
        return result

    monkeypatch.setattr(TrainingLoop, "after_step", killed_after_five_steps)
    with pytest.raises(Killed):
        compare(grid("lora", "prompt"))
    assert in_process == ["lora-7", "prompt-7"]
    log: list[str] = []
    result = compare(grid("lora", "prompt"), log.append)
    assert in_process[2:] == ["prompt-7", "lora-8", "prompt-8"]
    assert "[1/4] lora, seed 7: already done" in log
    assert "[2/4] prompt, seed 7: resuming" in log
    assert figures(result) == figures(whole)
    del in_process[:]
    assert figures(compare(grid("lora", "prompt"))) == figures(whole)
    assert in_process == []


def test_failed_run_is_reported_and_retried(grid, without_training, monkeypatch):
    real = run_module.launch_worker

    def fails(recipe_file, log, **how):
        if recipe_file.stem == "lora-7":
            return WorkerResult("the disk is full", False, 0.0)
        return real(recipe_file, log, **how)

    monkeypatch.setattr(run_module, "launch_worker", fails)
    whole = grid("lora", "ia3")
    result = compare(whole)
    assert result["failed"] == [{"method": "lora", "seed": 7, "why": "the disk is full"}]
    lines = {line["method"]: line for line in result["methods"]}
    assert (lines["lora"]["seeds"], lines["ia3"]["seeds"]) == ([8], [7, 8])
    assert (result["pairs"][0]["seeds"], result["pairs"][0]["beyond_noise"]) == ([8], False)
    table = (whole.output_dir / "table.md").read_text()
    assert "Failed: lora, seed 7 (the disk is full)." in table
    assert "lora has 1 of 2 seeds." in table
    monkeypatch.setattr(run_module, "launch_worker", real)
    assert compare(grid("lora", "ia3"))["failed"] == []
    assert without_training == ["ia3-7", "lora-8", "ia3-8", "lora-7"]


def test_other_settings_in_the_folder_are_refused(grid, without_training, tree):
    compare(grid("lora", seeds=1))
    with pytest.raises(UsageError, match="tokens: 900 before, 600 now"):
        compare(grid("lora", seeds=1, tokens=600))
    tree["train"]["batch_size"] = 3
    with pytest.raises(UsageError, match=r"train\.batch_size: 6 before, 3 now"):
        compare(grid("lora", seeds=1))
    tree["train"]["batch_size"] = 6
    with pytest.raises(UsageError, match=r"methods\.lora\.settings\.r: 4 before, 8 now"):
        compare(grid("lora", seeds=1, overrides={"lora.r": 8}))
    with open(tree["data"]["test"], "a") as f:
        f.write(Path(tree["data"]["test"]).read_text())
    with pytest.raises(UsageError, match="SHA-256"):
        compare(grid("lora", seeds=1))
    assert without_training == ["lora-7"]


def test_methods_and_seeds_can_be_added(grid, without_training):
    compare(grid("lora", seeds=1))
    result = compare(grid("ia3", "lora", seeds=2))
    assert without_training == ["lora-7", "ia3-7", "ia3-8", "lora-8"]
    assert {line["method"]: line["seeds"] for line in result["methods"]} == {"lora": [7, 8], "ia3": [7, 8]}
    assert set(json.loads((grid("lora").output_dir / SETTINGS_FILE).read_text())["methods"]) == {"lora", "ia3"}


def test_what_does_not_fit_is_left_out(grid, without_training, monkeypatch):
    make_plan = run_module.make_plan

    def small(request, **options):
        plan = make_plan(request, **options)
        too_big = request.method.name == "ia3"
        return dataclasses.replace(plan, verdict="does not fit", reason="too big") if too_big else plan

    monkeypatch.setattr(run_module, "make_plan", small)
    result = compare(grid("lora", "ia3", seeds=1))
    assert result["left_out"] == [{"method": "ia3", "why": "too big"}]
    assert without_training == ["lora-7"]
    assert "Left out: ia3 (too big)." in (grid("lora").output_dir / "table.md").read_text()
    with pytest.raises(RunError, match="no method fits this machine: too big"):
        compare(grid("ia3", out="other"))
    assert not grid("ia3", out="other").output_dir.exists()


def test_unsuited_method_is_left_out_of_all_but_refused_by_name(grid, without_training, monkeypatch):
    settings = grid("all", seeds=1)
    assert "token_indices" in settings.excluded["trainable_tokens"]
    keep = {"lora", "bitfit"}  # Llama has no biases
    settings = dataclasses.replace(settings, candidates=tuple(c for c in settings.candidates if c.label in keep))
    result = compare(settings)
    assert without_training == ["lora-7"]
    assert {x["method"] for x in result["left_out"]} == {"bitfit", "trainable_tokens"}
    with pytest.raises(UsageError, match="bias"):
        compare(grid("lora", "bitfit", out="named"))
    with pytest.raises(RecipeError, match="token_indices"):
        grid("trainable_tokens")


def test_second_process_is_refused(grid, without_training):
    settings = grid("lora", seeds=1)
    settings.output_dir.mkdir()
    with FileLock(settings.output_dir / ".lock"), pytest.raises(UsageError, match="another slimtune compare works"):
        compare(settings)
    assert without_training == []


def test_bad_input_is_refused_before_anything_is_written(grid, tree, tmp_path):
    with pytest.raises(UsageError, match="--tokens 100 is less than one step: 6 rows have"):
        grid("lora", tokens=100)
    with pytest.raises(RecipeError, match="the recipe of lora: 1 problem"):
        grid("lora", overrides={"lora.rnak": 4})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"contains 'thesis.tex', which belongs to no comparison"):
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


def test_length_of_the_recipe_without_a_budget(grid, tree):
    tree["train"]["epochs"] = 2
    assert grid("lora", tokens=None).steps == 8
    tree["train"]["max_steps"] = 5
    assert grid("full", tokens=None).steps == 5


def test_no_validation_when_there_is_nothing_to_choose(grid):
    once = grid("lora")
    assert once.cell_recipe(once.candidates[0], 7).data.validation is None
    longer = grid("lora", tokens=1500)
    assert longer.cell_recipe(longer.candidates[0], 7).data.validation is not None


def test_different_rows_cannot_be_compared(grid, without_training):
    settings = grid("lora", "ia3", seeds=1)
    compare(settings)
    metrics = settings.run_dir(settings.candidates[0], 7).metrics_file
    metrics.write_text(metrics.read_text().replace('"trained_tokens": ', '"trained_tokens": 1'))
    with pytest.raises(RunError, match="trained on different rows"):
        compare(settings)


def test_unreadable_rows_are_refused(grid, tree):
    Path(tree["data"]["train"]).write_text("{}\n")
    with pytest.raises(DataError):
        grid("lora")


def test_faulty_rows_are_refused_unless_forced(grid, tree, without_training):
    write_rows(Path(tree["data"]["train"]), 24, answer="!")
    with pytest.raises(DataError, match="placeholder as the answer"):
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
