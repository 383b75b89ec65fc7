"""A comparison that takes seconds: a tiny base, cells in this very process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.tiny_run import write_rows

from slimtune.comparison import compare, worker
from slimtune.comparison.candidates import build_candidates
from slimtune.comparison.grid import Grid, grid_of
from slimtune.comparison.launch import Ended
from slimtune.config import load_recipe
from slimtune.errors import SlimtuneError
from slimtune.run_dir import RunDir

PLANS: dict[str, Any] = {}


@pytest.fixture
def tree(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe's tree: 24 rows, 6 a step."""
    rows = {"train": (24, 0), "validation": (6, 100), "test": (8, 200)}
    return {
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {n: str(write_rows(tmp_path / f"{n}.jsonl", k, start=at)) for n, (k, at) in rows.items()},
        "method": {"name": "lora", "r": 4},
        "train": {"batch_size": 6, "seed": 7},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def grid(tree: dict[str, Any], tmp_path: Path) -> Callable[..., Grid]:
    """Make a grid: `grid("lora", "ia3", seeds=2, tokens=900)`."""

    def make(*labels: str, out: str = "c", seeds: int = 2, trials: int = 0, **how: Any) -> Grid:
        tokens, given = how.pop("tokens", 900), how.pop("given", {})
        found = build_candidates(labels, tree, given)
        return grid_of(tree, found, seeds=seeds, tokens=tokens, trials=trials, out=tmp_path / out, **how)

    return make


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let cells run in this process, which has imported everything; returns the names of those that ran.

    A method is planned once for all tests, and no picture is drawn: what does either has tests of its own.
    """
    ran: list[str] = []

    def cached_make_plan(request: Any, **options: Any) -> Any:
        method = request.method_name
        if method not in PLANS:
            PLANS[method] = real(request, **options)
        return PLANS[method]

    real = compare.make_plan
    monkeypatch.setattr(compare, "make_plan", cached_make_plan)
    monkeypatch.setattr(compare, "draw", lambda *_: None)

    def launch(recipe_file: Path, log: Path, **how: Any) -> Ended:
        ran.append(recipe_file.stem)
        try:
            worker.run(recipe_file, **{k: v for k, v in how.items() if k != "stop"})
        except SlimtuneError as e:
            return Ended(e.message, False, 0.0)
        return Ended("", False, 0.0)

    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr("slimtune.comparison.tune.launch", launch)
    return ran


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, here: list[str]) -> list[str]:
    """As `here`, with cells that train nothing: they write what a cell leaves, in numbers made up from its name."""

    def made_up(recipe_file: Path, *, full: bool = False, **_: Any) -> None:
        recipe = load_recipe(recipe_file)
        folder, noise = Path(recipe.output_dir), random.Random(recipe_file.stem)
        folder.mkdir(parents=True)
        rows = [
            {"line": i, "tokens": 10 + i, "base": 50.0 + i, "tuned": 45 + i + noise.gauss(0, 1)} for i in range(1, 9)
        ]
        tokens = sum(r["tokens"] for r in rows)
        base, tuned = (sum(r[who] for r in rows) / tokens for who in ("base", "tuned"))
        result = {
            "steps": 3, "trained_tokens": 690, "trainable_params": 10, "total_params": 1000, "adapter_bytes": 1 << 20,
            "peak_bytes": 1 << 30, "train_seconds": 2.0, "train_cpu_seconds": 3.0, "tokens_per_second": 345.0,
            "dtype": "float32", "device": "cpu",
        }  # fmt: skip
        measured = {"base_loss": base, "tuned_loss": tuned, "loss_reduction": base - tuned}
        metrics = [{"train_loss": 1.0, "trained_tokens": 230 * n + recipe.train.seed} for n in (1, 2, 3)]
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "eval-test.json").write_text(json.dumps(measured))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
        RunDir(folder).scores_file("test").write_text(json.dumps(rows))

    monkeypatch.setattr(worker, "run", made_up)
    return here
