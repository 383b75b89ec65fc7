"""What the files of a run folder say; damaged ones are named."""

import pytest

from slimtune.core.config import Recipe
from slimtune.core.foundation.files import write_json
from slimtune.core.training.run_dir import RunDir
from slimtune.errors import RunError
from slimtune.evaluation.run_results import load_run_results

RECIPE = Recipe.from_dict({"model": "m", "data": "/d.jsonl", "output_dir": "runs/x"})
EVALUATION = {
    "data": "/test.jsonl", "rows": 3, "base_loss": 4.5, "tuned_loss": 3.7, "loss_reduction": 0.8,
    "loss_reduction_ci95": [0.7, 0.9],
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "runs/x", RECIPE)


def test_results_contain_every_file(run):
    bare = load_run_results(run)
    assert (bare.result, bare.plan, bare.metrics, bare.evaluations, bare.held_out) == ({}, {}, [], [], None)
    write_json(run.plan_file, {"plan": {"method": "lora"}, "probe": {"bytes": 3}})
    write_json(run.data_file, {"train": {"rows": 9}})
    write_json(run.result_file, {"steps": 4})
    run.append_metrics({"step": 1})
    write_json(run.evaluation_file("test"), EVALUATION)
    found = load_run_results(run)
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
    found = load_run_results(run).held_out
    assert (found and found.name) == expected


@pytest.mark.parametrize("text", ['{"steps": 4', "[1]", ""])
def test_damaged_file_is_one_error(run, text):
    write_json(run.plan_file, {"plan": {"method": "lora"}})
    run.result_file.write_text(text)
    with pytest.raises(RunError, match=r"result\.json is damaged") as e:
        load_run_results(run)
    found = load_run_results(run, raise_if_damaged=False)
    assert found.errors == [e.value.message]
    assert found.plan == {"method": "lora"}
