"""The run folder refuses to overwrite anything, opens what exists, and never leaves half a file."""

import math
from dataclasses import replace

import pytest

from slimtune.core.config import Recipe
from slimtune.core.foundation.files import write_json
from slimtune.core.training.run_dir import RunDir
from slimtune.errors import RunError, UsageError

RECIPE = Recipe.from_dict({"model": "m", "data": "/d.jsonl", "output_dir": "runs/x"})
EVALUATION = {
    "data": "/test.jsonl", "rows": 3, "base_loss": 4.5, "tuned_loss": 3.7, "loss_reduction": 0.8,
    "loss_reduction_ci95": [0.7, 0.9],
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "runs/x", RECIPE)


def test_new_run_contains_its_recipe(run, tmp_path):
    assert [p.name for p in run.path.iterdir()] == ["recipe.yaml"]
    assert run.load_recipe() == replace(RECIPE, output_dir=run.path)
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path / "empty", RECIPE).recipe_file.is_file()


def test_occupied_folder_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match=r"another run: 'recipe.yaml'") as e:
        RunDir.create(run.path, RECIPE)
    assert "--resume" in e.value.hint
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UsageError, match=r"contains files: 'letter.txt'") as e:
        RunDir.create(tmp_path, RECIPE)
    assert "--resume" not in e.value.hint
    with pytest.raises(UsageError, match="is a file"):
        RunDir.create(tmp_path / "letter.txt", RECIPE)
    with pytest.raises(UsageError, match="a part of the path is a file"):
        RunDir.create(tmp_path / "letter.txt/run", RECIPE)


def test_opening_a_missing_folder_names_the_nearest(run, tmp_path):
    with pytest.raises(UsageError, match=r"did you mean 'x'"):
        RunDir.open(run.path.parent / "xx")
    with pytest.raises(UsageError, match=r"not a run folder: it contains 'runs'"):
        RunDir.open(tmp_path)


def test_opening_a_run_without_adapter_says_how_to_finish(run):
    with pytest.raises(RunError, match="has no adapter yet") as e:
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
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: it is not JSON: .*'\{step\}'"):
        run.load_metrics()


def test_results_contain_every_file(run):
    bare = run.load_results()
    assert (bare.result, bare.plan, bare.metrics, bare.evaluations, bare.held_out) == ({}, {}, [], [], None)
    write_json(run.plan_file, {"plan": {"method": "lora"}, "probe": {"bytes": 3}})
    write_json(run.data_file, {"train": {"rows": 9}})
    write_json(run.result_file, {"steps": 4})
    run.append_metrics({"step": 1})
    write_json(run.evaluation_file("test"), EVALUATION)
    found = run.load_results()
    assert (found.plan, found.probe) == ({"method": "lora"}, {"bytes": 3})
    assert (found.data, found.result) == ({"train": {"rows": 9}}, {"steps": 4})
    assert found.metrics == [{"step": 1}]
    assert found.evaluations[0].values == EVALUATION


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"validation": {}}, "validation"),
        ({"validation": {}, "data-x": {}}, "data-x"),
        ({"data-x": {}, "test": {}}, "test"),
        ({"data-x": {"data": "/d.jsonl"}}, None),
        ({"validation": {"data": "/d.jsonl", "split": "validation"}}, "validation"),
    ],
)
def test_held_out_result_was_not_trained_on(run, files, expected):
    for name, values in files.items():
        write_json(run.evaluation_file(name), EVALUATION | values)
    write_json(run.evaluation_file("data-incomplete"), {"base_loss": 1.0})
    found = run.load_results().held_out
    assert (found and found.name) == expected


@pytest.mark.parametrize("text", ['{"steps": 4', "[1]", ""])
def test_damaged_file_is_one_error(run, text):
    write_json(run.plan_file, {"plan": {"method": "lora"}})
    run.result_file.write_text(text)
    with pytest.raises(RunError, match=r"result\.json is damaged") as e:
        run.load_results()
    found = run.load_results(strict=False)
    assert found.errors == [e.value.message]
    assert found.plan == {"method": "lora"}
