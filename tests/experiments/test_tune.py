"""Searches: on validation rows, resumable, without a repeated trial; a comparison's rates and a recipe's settings."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
from row_files import write_jsonl

from slimtune.core.config import load_recipe
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.train import train
from slimtune.errors import RunError, UsageError
from slimtune.experiments import search
from slimtune.experiments.comparison import run_comparison
from slimtune.experiments.executors import Executor
from slimtune.experiments.run_worker import WorkerResult
from slimtune.experiments.search_space import parse_setting_ranges
from slimtune.experiments.tuning import run_tuning, search_learning_rate


@pytest.fixture
def quadratic(monkeypatch):
    """Replace trials: the loss is quadratic in the logarithm of the rate, lowest at `best`; `tried` lists the rates."""
    tried: list[tuple[str, float]] = []

    def launch(files, *, skip_test_evaluation=False, **_):
        assert skip_test_evaluation
        (recipe_file,) = files
        recipe = load_recipe(recipe_file).to_dict()
        label, rate = recipe_file.parent.name, recipe["train"]["learning_rate"]
        rate = 5e-3 if rate == "auto" else rate
        if launch.interrupt_at is not None and len(tried) == launch.interrupt_at:
            raise KeyboardInterrupt
        tried.append((label, rate))
        run = recipe_file.parent / recipe_file.name.removesuffix(".yaml")
        run.mkdir(exist_ok=True)
        steps = recipe["train"]["max_steps"]
        loss = 4 + math.log10(rate / launch.best) ** 2 + abs(recipe["method"]["r"] - 4) / 100
        at = [s for s in range(1, steps + 1) if s == steps or s % recipe["train"]["eval_steps"] == 0]
        lines = [{"step": s, "validation_loss": loss + (steps - s) / 10} for s in at]
        (run / "result.json").write_text(json.dumps({"validation_loss": loss}))
        write_jsonl(run / "metrics.jsonl", lines)
        return WorkerResult("", False, 0.0)

    launch.best, launch.interrupt_at, launch.tried = 1e-3, None, tried
    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", launch)
    return launch


def test_finds_a_better_rate_than_the_default(grid, quadratic):
    settings = grid("lora", tokens=2000, trials=8)
    found = search_learning_rate(settings, settings.candidates[0], lambda _: None, Executor())
    assert quadratic.tried[0] == ("lora", 5e-3)  # the default first
    assert len(found.trials) == len(quadratic.tried) == 8
    assert all(5e-4 <= rate <= 5e-2 for _, rate in quadratic.tried)
    assert abs(math.log10(found.rate / 1e-3)) < abs(math.log10(5e-3 / 1e-3))
    assert any(t.pruned for t in found.trials)
    assert all((t.loss is None) == t.pruned for t in found.trials)


def test_resumes_with_the_same_rates(grid, quadratic):
    whole = grid("lora", tokens=2000, trials=5, out="whole")
    expected = search_learning_rate(whole, whole.candidates[0], lambda _: None, Executor())
    del quadratic.tried[:]
    settings = grid("lora", tokens=2000, trials=5)
    quadratic.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        search_learning_rate(settings, settings.candidates[0], lambda _: None, Executor())
    quadratic.interrupt_at = None
    assert search_learning_rate(settings, settings.candidates[0], lambda _: None, Executor()) == expected
    assert len(quadratic.tried) == 5
    assert search_learning_rate(settings, settings.candidates[0], lambda _: None, Executor()) == expected
    assert len(quadratic.tried) == 5


def test_rate_at_the_edge_is_reported(grid, quadratic):
    quadratic.best = 1.0
    settings = grid("lora", tokens=2000, trials=12)
    assert search_learning_rate(settings, settings.candidates[0], lambda _: None, Executor()).at_the_edge


def test_failed_trial_is_an_error(grid, monkeypatch):
    monkeypatch.setattr(
        search, "train_recipes_at_once_in_subprocess", lambda *_, **__: WorkerResult("the disk is full", False, 0.0)
    )
    settings = grid("lora", trials=2)
    with pytest.raises(RunError, match=r"train\.learning_rate 0\.005 .*disk"):
        search_learning_rate(settings, settings.candidates[0], lambda _: None, Executor())


@pytest.mark.slow
def test_comparison_uses_the_rates_and_no_test_row(grid, in_process):
    result = run_comparison(grid("lora", "ia3", seeds=1, tokens=500, trials=2))
    assert in_process[-2:] == ["lora-7", "ia3-7"]
    assert len(in_process) == 6
    out = grid("lora").output_dir
    assert not list((out / "tune").rglob("eval-test*"))
    for line in result.methods:
        tried = result.searched[line.method]
        assert (line.rate, line.rate_from) == (tried.rate, "tuned")
        assert line.rate == min((t for t in tried.trials if t.loss), key=lambda t: t.loss).rate


@pytest.fixture
def tune_tree(tree, tmp_path):
    """Search settings of the tree's recipe: `tune_tree("method.r=2,4", trials=3)`."""

    def run(*over: str, trials: int | None = 4, **how):
        log: list[str] = []
        return run_tuning(tree, parse_setting_ranges(over), tmp_path / "t", log.append, trials=trials, **how), log

    return run


def test_best_recipe_of_a_search(tune_tree, quadratic, tmp_path):
    result, _ = tune_tree("train.learning_rate=log:1e-5..1e-2", "method.rank=2,4,8", trials=10)
    assert result.trials[0].values == {"train.learning_rate": 5e-3, "method.rank": 4}, "the recipe's own first"
    assert result.best.loss == min(t.loss for t in result.trials if t.loss) < result.recipe_loss
    best = load_recipe(result.best_recipe)
    assert best.train.learning_rate == result.best.values["train.learning_rate"]
    assert (best.method.settings["r"], best.train.max_steps) == (result.best.values["method.rank"], None)
    assert best.output_dir == tmp_path / "t" / "best"
    assert {p.name for p in (tmp_path / "t").iterdir()} >= {"tune.json", "table.md", "tune.svg", "settings.json"}
    assert json.loads((tmp_path / "t" / "tune.json").read_text()) == to_json_dict(result)
    assert f"{result.best.loss:.4f} (best)" in (tmp_path / "t" / "table.md").read_text()


def test_finite_space_is_tried_once_each(tune_tree, quadratic):
    result, _ = tune_tree("method.r=2,4", "train.batch_size=4..6", trials=50)
    tried = [tuple(t.values.values()) for t in result.trials]
    assert len(tried) == len(set(tried)) == len(quadratic.tried) == 6
    tune_tree("method.r=2,4", "train.batch_size=4..6", trials=50)
    assert len(quadratic.tried) == 6


def test_failed_trial_is_reported_and_tried_again(tune_tree, quadratic, monkeypatch):
    def fail_at_8(files, **how):
        too_big = load_recipe(files[0]).method.settings["r"] == 8
        return WorkerResult("broken", False, 0.0) if too_big else quadratic(files, **how)

    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", fail_at_8)
    result, log = tune_tree("method.r=4,8", trials=9)
    assert [(t.outcome, t.why) for t in result.trials] == [("complete", ""), ("failed", "broken")]
    assert any("method.r 8: " in line and "broken" in line for line in log)
    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", quadratic)
    again, _ = tune_tree("method.r=4,8", trials=9)
    assert [t.outcome for t in again.trials] == ["complete", "complete"]


def test_trial_out_of_time_is_continued(tune_tree, quadratic, monkeypatch):
    tune_tree("train.learning_rate=log:1e-5..1e-2", trials=1)

    def wait(files, *, should_stop, **_):
        while not should_stop():
            pass
        return WorkerResult("", True, 0.0)

    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", wait)
    result, log = tune_tree("train.learning_rate=log:1e-5..1e-2", trials=3, minutes=0.001)
    assert len(result.trials) == 1
    assert "0.001 minutes" in log[-1]
    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", quadratic)
    again, log = tune_tree("train.learning_rate=log:1e-5..1e-2", trials=3)
    assert [t.run for t in again.trials] == ["trial-1", "trial-2", "trial-4"]


def test_trial_outside_of_the_forgetting_budget_is_pruned(tune_tree, tree, quadratic, monkeypatch, tmp_path):
    def launch_and_forget(files, **how):
        result, run = quadratic(files, **how), files[0].with_suffix("")
        forgetting = 0.5 if run.name == forgetful else 0.01
        lines = [json.loads(line) | {"forgetting": forgetting} for line in (run / "metrics.jsonl").open()]
        write_jsonl(run / "metrics.jsonl", lines)
        return result

    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", launch_and_forget)
    tree["train"]["forgetting_budget"], tree["method"]["r"] = 0.1, 8
    forgetful = None
    before = tune_tree("method.r=8,6,4,3,2", trials=5)[0].trials
    forgetful = next(t.run for t in before[2:] if t.outcome == "complete")
    shutil.rmtree(tmp_path / "t")
    after = tune_tree("method.r=8,6,4,3,2", trials=5)[0].trials
    assert {t.run: t.outcome for t in after}[forgetful] == "pruned"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("train.learning_rat=1e-5..1e-2", "train.learning_rat: no such field; did you mean 'learning_rate'"),
        ("method.r=0,8", "method.r: got 0; expected: an integer, at least 1"),
        ("method.dropout=0..2.0", "method.lora_dropout"),
        ("train.batch_size=0..4", "train.batch_size: got 0"),
        ("train.epochs=1..3", "train.max_steps is set"),
    ],
)
def test_range_outside_of_the_schema_writes_nothing(tune_tree, tree, quadratic, tmp_path, over, message):
    tree["train"]["max_steps"] = 4
    with pytest.raises(UsageError, match=re.escape(message)):
        tune_tree(over)
    assert not (tmp_path / "t").exists()
    assert quadratic.tried == []


def test_another_search_in_the_folder_is_refused(tune_tree, quadratic):
    tune_tree("method.r=2,4")
    with pytest.raises(UsageError, match=r"over\.method\.r: '2, 4' .*'2, 8'"):
        tune_tree("method.r=2,8")


def test_trials_at_once_are_one_process_and_are_pruned_alone(tune_tree, quadratic, monkeypatch):
    groups: list[list[str]] = []

    def launch_group(files, *, should_stop, **how):
        groups.append([file.stem for file in files])
        for file in files:
            quadratic([file], **how)
            (file.with_suffix("") / "result.json").unlink()
        all_stopped = should_stop()
        pruned = {file for file in files if file.with_suffix(".stop").exists()}
        assert all_stopped == (len(pruned) == len(groups[-1]))
        for file in {*files} - pruned:
            quadratic([file], **how)
        return WorkerResult("", all_stopped, 0.0)

    monkeypatch.setattr(search, "train_recipes_at_once_in_subprocess", launch_group)
    result, _ = tune_tree("train.learning_rate=log:1e-5..1e-2", trials=12, at_once=3)
    assert list(map(len, groups)) == [3] * 4
    outcomes = {t.run: t.outcome for t in result.trials}
    assert {outcomes[run] for run in groups[0]} == {"complete"}, "nothing to compare the first ones with"
    assert {"complete", "pruned"} in [{outcomes[run] for run in group} for group in groups[1:]]
    with pytest.raises(UsageError, match=r"model\.dtype"):
        tune_tree("model.dtype=float32,bfloat16", at_once=2)


@pytest.mark.slow
def test_trials_at_once_have_the_losses_of_trials_alone(tune_tree, in_process, tree, tmp_path):
    result, _ = tune_tree("train.learning_rate=log:1e-4..1e-1", "method.r=2,4", trials=3, at_once=3)
    assert [t.outcome for t in result.trials] == ["complete"] * 3
    for trial in result.trials:
        recipe = load_recipe(tmp_path / "t" / "trials" / f"{trial.run}.yaml")
        alone = train(replace(recipe, output_dir=tmp_path / "alone" / trial.run))
        assert trial.loss == pytest.approx(alone.validation_loss, abs=1e-6)


@pytest.mark.slow
def test_killed_search_resumes_and_trains_its_recipe(tune_tree, in_process, tree, tmp_path, kill_after):
    tree["train"] |= {"epochs": 2, "save_steps": 1}
    over = "train.learning_rate=log:1e-4..1e-1", "method.r=2,4"
    whole, _ = tune_tree(*over, trials=3)
    (tmp_path / "t").rename(tmp_path / "whole")
    steps_left = kill_after(11)
    with pytest.raises(BaseException, match="killed"):
        tune_tree(*over, trials=3)
    result, _ = tune_tree(*over, trials=3)
    assert steps_left == [11 - 24], "the killed trial went on from its checkpoint"
    compared = ("values", "outcome", "loss")
    assert [[getattr(t, k) for k in compared] for t in result.trials] == [
        [getattr(t, k) for k in compared] for t in whole.trials
    ]
    trained = train(load_recipe(result.best_recipe))
    assert trained.validation_loss == result.best.loss
