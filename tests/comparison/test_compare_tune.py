"""The search for rates: as hard for each method, on validation rows alone, and going on where it was killed."""

from __future__ import annotations

import json
import math

import pytest

from slimtune.comparison import tune
from slimtune.comparison.compare import compare
from slimtune.comparison.launch import Ended
from slimtune.comparison.tune import search
from slimtune.errors import RunError


@pytest.fixture
def bowl(monkeypatch):
    """Stand in for trials: the loss is a bowl in the rate's logarithm, lowest at `best`; what was tried is `tried`."""
    tried: list[tuple[str, float]] = []

    def launch(recipe_file, log, *, trial=False, **_):
        assert trial
        recipe = tune_recipe(recipe_file)
        label, rate = recipe_file.parent.name, recipe["train"]["learning_rate"]
        if launch.dies is not None and len(tried) == launch.dies:
            raise KeyboardInterrupt
        tried.append((label, rate))
        run = recipe_file.parent / recipe_file.name.removesuffix(".yaml")
        run.mkdir(exist_ok=True)
        steps = recipe["train"]["max_steps"]
        loss = 4 + math.log10(rate / launch.best) ** 2
        at = [s for s in range(1, steps + 1) if s == steps or s % recipe["train"]["eval_steps"] == 0]
        lines = [{"step": s, "validation_loss": loss + (steps - s) / 10} for s in at]
        (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
        return Ended("", False, 0.0)

    launch.best, launch.dies, launch.tried = 1e-3, None, tried
    monkeypatch.setattr(tune, "launch", launch)
    return launch


def tune_recipe(file):
    from slimtune.config import load_recipe

    return load_recipe(file).model_dump()


def test_it_finds_a_better_rate_than_the_default(grid, bowl):
    made = grid("lora", tokens=2000, trials=8)
    found = search(made, made.entries[0], lambda _: None)
    assert bowl.tried[0] == ("lora", 2e-4)  # the default first
    assert len(found["trials"]) == len(bowl.tried) == 8
    assert all(2e-5 <= rate <= 2e-3 for _, rate in bowl.tried)
    assert abs(math.log10(found["rate"] / 1e-3)) < abs(math.log10(2e-4 / 1e-3))
    assert any(t["pruned"] for t in found["trials"])
    assert all((t["loss"] is None) == t["pruned"] for t in found["trials"])


def test_killed_it_goes_on_with_the_same_rates(grid, bowl):
    whole = grid("lora", tokens=2000, trials=5, out="whole")
    expected = search(whole, whole.entries[0], lambda _: None)
    del bowl.tried[:]
    made = grid("lora", tokens=2000, trials=5)
    bowl.dies = 3
    with pytest.raises(KeyboardInterrupt):
        search(made, made.entries[0], lambda _: None)
    bowl.dies = None
    assert search(made, made.entries[0], lambda _: None) == expected
    assert len(bowl.tried) == 5
    assert search(made, made.entries[0], lambda _: None) == expected
    assert len(bowl.tried) == 5


def test_a_rate_at_the_edge_is_said(grid, bowl):
    bowl.best = 1.0
    made = grid("lora", tokens=2000, trials=12)
    assert search(made, made.entries[0], lambda _: None)["at_the_edge"]


def test_a_trial_that_fails_is_no_rate(grid, monkeypatch):
    monkeypatch.setattr(tune, "launch", lambda *_, **__: Ended("the disk is full", False, 0.0))
    made = grid("lora", trials=2)
    with pytest.raises(RunError, match=r"the trial of lora at the rate 2\.00e-04 failed: the disk is full"):
        search(made, made.entries[0], lambda _: None)


def test_a_comparison_takes_the_rates_found_and_looks_at_no_test_row(grid, here):
    result = compare(grid("lora", "ia3", seeds=1, tokens=500, trials=2))
    assert here[-2:] == ["lora-7", "ia3-7"]
    assert len(here) == 6
    out = grid("lora").out
    assert not list((out / "tune").rglob("eval-test*"))
    for line in result["methods"]:
        tried = result["searched"][line["method"]]
        assert (line["rate"], line["rate_from"]) == (tried["rate"], "tuned")
        assert line["rate"] == min((t for t in tried["trials"] if t["loss"]), key=lambda t: t["loss"])["rate"]
