"""The run folder refuses to overwrite anything, opens what exists, and never leaves half a file."""

import math
from dataclasses import replace

import pytest

from slimtune.core.config import Recipe
from slimtune.core.training.run_dir import RunDir
from slimtune.errors import RunError, UsageError

RECIPE = Recipe.from_dict({"model": "m", "data": "/d.jsonl", "output_dir": "runs/x"})


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "runs/x", RECIPE)


def test_new_run_contains_its_recipe(run, tmp_path):
    assert [p.name for p in run.path.iterdir()] == ["recipe.yaml"]
    assert run.load_recipe() == replace(RECIPE, output_dir=run.path)
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path / "empty", RECIPE).recipe_file.is_file()


def test_occupied_folder_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match=r"'recipe.yaml'") as e:
        RunDir.create(run.path, RECIPE)
    assert "--resume" in e.value.hint
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UsageError, match=r"'letter.txt'") as e:
        RunDir.create(tmp_path, RECIPE)
    assert "--resume" not in e.value.hint
    with pytest.raises(UsageError, match="is a file"):
        RunDir.create(tmp_path / "letter.txt", RECIPE)
    with pytest.raises(UsageError, match=r"letter\.txt"):
        RunDir.create(tmp_path / "letter.txt/run", RECIPE)


def test_opening_a_missing_folder_names_the_nearest(run, tmp_path):
    with pytest.raises(UsageError, match=r"xx'.*'x'"):
        RunDir.open(run.path.parent / "xx")
    with pytest.raises(UsageError, match="'runs'"):
        RunDir.open(tmp_path)


def test_opening_a_run_without_adapter_says_how_to_finish(run):
    with pytest.raises(RunError, match="adapter") as e:
        RunDir.open(run.path)
    assert f"slimtune train {run.recipe_file} --resume" in e.value.hint
    assert RunDir.open(run.path, require_adapter=False) == run
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    assert RunDir.open(run.path) == run


def test_metrics_survive_an_unfinished_line(run):
    assert run.load_metrics() == []
    run.append_metrics({"step": 1, "loss": math.nan, "note": "ö"})
    with open(run.metrics_file, "a") as f:
        f.write('{"step": 2, "lo')
    assert run.load_metrics() == [{"step": 1, "loss": None, "note": "ö"}]
    run.append_metrics({"step": 2})
    assert run.load_metrics() == [{"step": 1, "loss": None, "note": "ö"}, {"step": 2}]


def test_damaged_metrics_line_is_named(run):
    run.metrics_file.write_text('{"step": 1}\n{step}\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: .*JSON: .*'\{step\}'"):
        run.load_metrics()
