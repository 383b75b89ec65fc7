"""The run folder: refuses what would overwrite, opens what is there, and never leaves half a file."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest

from slimtune.config import Recipe
from slimtune.errors import RunError, UsageError
from slimtune.run_dir import RunDir, to_json, write_atomic

RECIPE = Recipe.from_dict({"model": "m", "data": "/d.jsonl", "out": "runs/x"})


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "runs/x", RECIPE)


def finished(run: RunDir) -> RunDir:
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()
    return run


def test_names(run):
    names = {p.name for p in (run.recipe_file, run.adapter, run.checkpoints, run.metrics_file, run.log_file,
                              run.report_file, run.result_file)}  # fmt: skip
    assert names == {
        "recipe.yaml",
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "train.log",
        "report.html",
        "result.json",
    }


def test_a_new_run_holds_its_recipe(run):
    assert [p.name for p in run.path.iterdir()] == ["recipe.yaml"]
    assert run.recipe() == RECIPE.model_copy(update={"out": run.path})


def test_an_empty_folder_is_taken(tmp_path):
    assert RunDir.create(tmp_path, RECIPE).recipe_file.is_file()


def test_a_folder_with_another_run_is_refused_and_left_alone(run):
    before = run.recipe_file.read_bytes()
    with pytest.raises(UsageError, match=r"already holds another run: 'recipe.yaml'") as e:
        RunDir.create(run.path, RECIPE)
    assert e.value.exit_code == 2
    assert "--resume" in e.value.hint
    assert "another --out" in e.value.hint
    assert run.recipe_file.read_bytes() == before


def test_a_folder_with_any_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UsageError, match=r"already holds files: 'letter.txt'") as e:
        RunDir.create(tmp_path, RECIPE)
    assert "--resume" not in e.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UsageError, match="is a file"):
        RunDir.create(tmp_path / "x", RECIPE)
    with pytest.raises(UsageError, match=r"cannot be made: (Not a directory|File exists)"):
        RunDir.create(tmp_path / "x/y", RECIPE)


def test_open(run):
    assert RunDir.open(finished(run).path) == run


def test_open_names_the_nearest(run):
    with pytest.raises(UsageError, match=r"there is no run folder .*xx'; did you mean 'x'") as e:
        RunDir.open(run.path.parent / "xx")
    assert e.value.exit_code == 2


def test_open_what_is_no_run_folder(tmp_path):
    with pytest.raises(UsageError, match="it holds nothing"):
        RunDir.open(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UsageError, match=r"it holds 'a.txt'"):
        RunDir.open(tmp_path)


def test_open_without_an_adapter_says_how_to_finish(run):
    with pytest.raises(RunError, match="has no adapter yet") as e:
        RunDir.open(run.path)
    assert e.value.exit_code == 1
    assert f"slimtune train {run.recipe_file} --resume" in e.value.hint
    assert RunDir.open(run.path, adapter=False) == run


def test_metrics_are_lines_of_json(run):
    assert run.metrics() == []
    run.append_metrics({"step": 1, "loss": 2.5})
    run.append_metrics({"step": 2, "loss": math.nan, "note": "ö"})
    assert run.metrics() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "note": "ö"}]
    assert all(json.loads(line) for line in run.metrics_file.read_text().splitlines())


def test_a_torn_last_line_is_no_metric_and_is_cut_before_the_next(run):
    run.append_metrics({"step": 1})
    with open(run.metrics_file, "a") as f:
        f.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.append_metrics({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_faulty_line_is_named(run):
    run.metrics_file.write_text('{"step": 1}\n{step}\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2 is not JSON .*'\{step\}'"):
        run.metrics()


def test_write_atomic(tmp_path):
    write_atomic(tmp_path / "a", "text ö")
    write_atomic(tmp_path / "a", b"bytes")
    assert (tmp_path / "a").read_bytes() == b"bytes"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, code):
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, "full")))
    with pytest.raises(RunError, match="the disk is full") as e:
        write_atomic(tmp_path / "a", "n" * 2048)
    assert e.value.exit_code == 1
    assert "2.0 KiB" in str(e.value)
    assert e.value.hint
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_while_appending(run):
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(RunError, match="the disk is full"):
        run.append_metrics({"step": 1})


def test_json_text_takes_scalars_of_torch_and_paths(tmp_path):
    import torch

    text = to_json({"a": torch.tensor(1.5), "b": tmp_path, "c": (1, math.inf), "d": {1: True}})
    assert json.loads(text) == {"a": 1.5, "b": str(tmp_path), "c": [1, None], "d": {"1": True}}
