"""`slimtune tune`: its flags, its refusals and its screen; the search is replaced."""

import sys
from dataclasses import replace

import pytest
import yaml
from tiny_run import write_rows

import slimtune.experiments.tuning as search
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.experiments.experiment_results import TrialResult, TuneResult

TRIALS = [
    TrialResult(run=f"trial-{n}", values={"method.r": r}, outcome="complete", loss=loss, seconds=2.0, why="")
    for n, r, loss in ((1, 8, 4.5), (2, 16, 4.25))
]
TRIALS.append(replace(TRIALS[0], run="trial-3", values={"method.r": 32}, outcome="failed", loss=None, why="x"))
RESULT = TuneResult(
    output_dir="o-tune", model="m", over={"method.r": "8, 16, 32"}, validation_rows=6, trials=TRIALS, best=TRIALS[1],
    recipe_loss=4.5, at_the_edge=[], best_recipe="o-tune/best.yaml", seconds=5.0,
)  # fmt: skip


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    data = {name: str(write_rows(tmp_path / f"{name}.jsonl", 12)) for name in ("train", "validation")}
    tree = {"model": str(tiny_folder), "data": data, "method": {"r": 4}, "output_dir": "o"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "r.yaml"


@pytest.fixture
def calls(monkeypatch) -> list:
    found: list = []
    monkeypatch.setattr(search, "run_tuning", lambda *args, **how: found.append((args, how)) or RESULT)
    return found


def test_flags_and_screen(recipe, calls, slimtune, tmp_path):
    flags = ["--minutes", 5, "--set", "train.batch_size=3", "--on", "local:2", "--at-once", 3]
    done = slimtune("tune", recipe, "--over", "method.rank=8,16,32", *flags)
    assert done.exit_code == 0, done.stderr
    ((tree, (searched,), folder, _), how) = calls[0]
    assert (searched.path, str(searched), str(folder)) == ("method.rank", "8, 16, 32", "o-tune")
    assert tree["train"] == {"batch_size": 3}
    rest = {"allow_faulty_rows": False, "plot": None, "at_once": 3}
    assert (how.pop("executor_spec").max_parallel_runs, how) == (2, {"trials": None, "minutes": 5.0, **rest})
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["2", "16", "4.2500", "(best)", "2.0", "s"], ["1", "8", "4.5000", "2.0", "s"],
        ["3", "32", "failed", "2.0", "s"],
    ]  # fmt: skip
    for part in ("The recipe's own values have 4.5000, 0.2500 more.", "Failed: method.r 32 (x)"):
        assert part in done.stdout
    assert lines[-1] == "next: slimtune train o-tune/best.yaml"


def test_json_and_default_trials(recipe, calls, slimtune_json):
    assert slimtune_json("tune", recipe, "--over", "method.r=8,16") == to_json_dict(RESULT)
    assert calls[0][1]["trials"] == 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing option '--over'"),
        (["--over", "train.epocs=1..3"], "train.epocs: no such field; did you mean 'epochs'?"),
        (["--over", "method.rnak=8,16"], "method.rnak: no such field; did you mean 'rank'?"),
        (["--over", "train.batch_size=0,8"], "train.batch_size: got 0; expected: an integer, at least 1"),
        (["--over", "method.r=8,16", "--set", "train.epocs=1"], "did you mean 'epochs'?"),
        (["--over", "method.r=8,16", "--plot", "p.gif"], "has the suffix '.gif'"),
    ],
)
def test_wrong_use(recipe, calls, slimtune, args, message):
    done = slimtune("tune", recipe, *args)
    assert (done.exit_code, done.stdout, calls) == (2, "", [])
    assert message in done.stderr.replace("\n", " ")


def test_missing_package(recipe, calls, slimtune, monkeypatch):
    monkeypatch.setattr(sys.modules["slimtune.cli.compare_command"], "TUNE_PACKAGES", ("no_such_package",))
    done = slimtune("tune", recipe, "--over", "method.r=8,16")
    assert (done.exit_code, calls) == (2, [])
    assert "no_such_package" in done.stderr
