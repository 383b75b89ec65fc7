"""The search for learning rates: on validation rows, the same effort for each method, resumable."""

import json
import math

import pytest

from slimtune.comparison import tune
from slimtune.comparison.compare import compare
from slimtune.comparison.tune import search_learning_rate
from slimtune.comparison.worker import WorkerResult
from slimtune.config import load_recipe
from slimtune.errors import RunError


@pytest.fixture
def quadratic(monkeypatch):
    """Replace trials: the loss is quadratic in the logarithm of the rate, lowest at `best`; `tried` lists the rates."""
    tried: list[tuple[str, float]] = []

    def launch(recipe_file, log, *, trial=False, **_):
        assert trial
        recipe = load_recipe(recipe_file).model_dump()
        label, rate = recipe_file.parent.name, recipe["train"]["learning_rate"]
        if launch.interrupt_at is not None and len(tried) == launch.interrupt_at:
            raise KeyboardInterrupt
        tried.append((label, rate))
        run = recipe_file.parent / recipe_file.name.removesuffix(".yaml")
        run.mkdir(exist_ok=True)
        steps = recipe["train"]["max_steps"]
        loss = 4 + math.log10(rate / launch.best) ** 2
        at = [s for s in range(1, steps + 1) if s == steps or s % recipe["train"]["eval_steps"] == 0]
        lines = [{"step": s, "validation_loss": loss + (steps - s) / 10} for s in at]
        (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
        return WorkerResult("", False, 0.0)

    launch.best, launch.interrupt_at, launch.tried = 1e-3, None, tried
    monkeypatch.setattr(tune, "launch_worker", launch)
    return launch


def test_finds_a_better_rate_than_the_default(grid, quadratic):
    settings = grid("lora", tokens=2000, trials=8)
    search = search_learning_rate(settings, settings.candidates[0], lambda _: None)
    assert quadratic.tried[0] == ("lora", 2e-4)  # the default first
    assert len(search["trials"]) == len(quadratic.tried) == 8
    assert all(2e-5 <= rate <= 2e-3 for _, rate in quadratic.tried)
    assert abs(math.log10(search["rate"] / 1e-3)) < abs(math.log10(2e-4 / 1e-3))
    assert any(t["pruned"] for t in search["trials"])
    assert all((t["loss"] is None) == t["pruned"] for t in search["trials"])


def test_resumes_with_the_same_rates(grid, quadratic):
    whole = grid("lora", tokens=2000, trials=5, out="whole")
    expected = search_learning_rate(whole, whole.candidates[0], lambda _: None)
    del quadratic.tried[:]
    settings = grid("lora", tokens=2000, trials=5)
    quadratic.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        search_learning_rate(settings, settings.candidates[0], lambda _: None)
    quadratic.interrupt_at = None
    assert search_learning_rate(settings, settings.candidates[0], lambda _: None) == expected
    assert len(quadratic.tried) == 5
    assert search_learning_rate(settings, settings.candidates[0], lambda _: None) == expected
    assert len(quadratic.tried) == 5


def test_rate_at_the_edge_is_reported(grid, quadratic):
    quadratic.best = 1.0
    settings = grid("lora", tokens=2000, trials=12)
    assert search_learning_rate(settings, settings.candidates[0], lambda _: None)["at_the_edge"]


def test_failed_trial_is_an_error(grid, monkeypatch):
    monkeypatch.setattr(tune, "launch_worker", lambda *_, **__: WorkerResult("the disk is full", False, 0.0))
    settings = grid("lora", trials=2)
    with pytest.raises(RunError, match=r"the trial of lora at the rate 2\.00e-04 failed: the disk is full"):
        search_learning_rate(settings, settings.candidates[0], lambda _: None)


@pytest.mark.slow
def test_comparison_uses_the_rates_and_no_test_row(grid, in_process):
    result = compare(grid("lora", "ia3", seeds=1, tokens=500, trials=2))
    assert in_process[-2:] == ["lora-7", "ia3-7"]
    assert len(in_process) == 6
    out = grid("lora").output_dir
    assert not list((out / "tune").rglob("eval-test*"))
    for line in result["methods"]:
        tried = result["searched"][line["method"]]
        assert (line["rate"], line["rate_from"]) == (tried["rate"], "tuned")
        assert line["rate"] == min((t for t in tried["trials"] if t["loss"]), key=lambda t: t["loss"])["rate"]
