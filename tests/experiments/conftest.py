"""Comparisons that take seconds: a tiny base, and workers that run in this process."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hand_results import make_sft_result
from row_files import write_jsonl
from tiny_run import write_rows

from slimtune.core.config import load_recipe
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.run_dir import RunDir
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.errors import SlimtuneError
from slimtune.evaluation.estimate import Estimate
from slimtune.experiments import comparison as compare
from slimtune.experiments import run_worker as worker
from slimtune.experiments.candidates import build_candidates
from slimtune.experiments.run_grid import ComparisonGrid, build_comparison_grid
from slimtune.experiments.run_worker import WorkerResult

PLANS: dict[str, Any] = {}


@pytest.fixture
def tree(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe as a tree: 24 training rows, 6 per step."""
    rows = {"train": (24, 0), "validation": (6, 100), "test": (8, 200)}
    return {
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {n: str(write_rows(tmp_path / f"{n}.jsonl", k, start=at)) for n, (k, at) in rows.items()},
        "method": {"name": "lora", "r": 4},
        "train": {"batch_size": 6, "seed": 7, "forgetting_budget": None},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def grid(tree: dict[str, Any], tmp_path: Path) -> Callable[..., ComparisonGrid]:
    """Make a grid: `grid("lora", "ia3", seeds=2, tokens=900)`."""

    def make(*labels: str, out: str = "c", seeds: int = 2, trials: int = 0, **settings: Any) -> ComparisonGrid:
        tokens, overrides = settings.pop("tokens", 900), settings.pop("overrides", {})
        candidates = build_candidates(labels, tree, overrides)
        return build_comparison_grid(
            tree,
            candidates,
            seed_count=seeds,
            tokens_per_run=tokens,
            trials=trials,
            output_dir=tmp_path / out,
            **settings,
        )

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run workers in this process and plan each method once; returns the names of the runs, in order."""
    started: list[str] = []
    estimate_resources = compare.estimate_resources

    def plan_once(request: Any, **settings: Any) -> Any:
        method = request.method.name
        if method not in PLANS:
            PLANS[method] = estimate_resources(request, **settings)
        return PLANS[method]

    def launch_worker(
        files: Sequence[Path], *, skip_test_evaluation: bool = False, allow_faulty_rows: bool, **_: Any
    ) -> WorkerResult:
        started.extend(file.stem for file in files)
        try:
            errors = worker.train_and_test_recipes_returning_errors(
                files, skip_test_evaluation=skip_test_evaluation, allow_faulty_rows=allow_faulty_rows
            )
        except SlimtuneError as e:
            return WorkerResult(e.message, False, 0.0)
        failed = {str(file): e.message for file, e in errors.items()}
        return WorkerResult("" if len(files) > 1 else failed.pop(str(files[0]), ""), False, 0.0, failed)

    monkeypatch.setattr(compare, "estimate_resources", plan_once)
    monkeypatch.setattr(compare, "write_score_cost_chart", lambda *_: None)
    monkeypatch.setattr(compare, "train_recipes_at_once_in_subprocess", launch_worker)
    monkeypatch.setattr("slimtune.experiments.search.train_recipes_at_once_in_subprocess", launch_worker)
    return started


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch, in_process: list[str]) -> list[str]:
    """Like `in_process`, but a run trains nothing: it writes a run's files with numbers drawn from its name."""

    def write_results(recipe_file: Path) -> None:
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
        losses = {"base_loss": base, "tuned_loss": tuned, "loss_reduction": base - tuned}
        measured = make_sft_result(**{name: Estimate(loss, (loss, loss)) for name, loss in losses.items()})
        metrics = [{"train_loss": 1.0, "trained_tokens": 230 * n + recipe.train.seed} for n in (1, 2, 3)]
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "eval-test.json").write_text(json.dumps(to_json_dict(measured)))
        write_jsonl(folder / "metrics.jsonl", metrics)
        RunDir(folder).scores_file("test").write_text(json.dumps(rows))

    def run_cells(recipe_files: Sequence[Path], **_: Any) -> dict[Path, SlimtuneError]:
        for file in recipe_files:
            write_results(file)
        return {}

    monkeypatch.setattr(worker, "train_and_test_recipes_returning_errors", run_cells)
    return in_process


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Kill this process, as it seems to it, after so many steps of all runs; returns a list with the steps left."""

    def install(steps: int) -> list[int]:
        after_step, steps_left = TrainingLoop.after_step, [steps]

        def kill(self: TrainingLoop, values: Any) -> Any:
            result = after_step(self, values)
            steps_left[0] -= 1
            if not steps_left[0]:
                raise BaseException("killed")
            return result

        monkeypatch.setattr(TrainingLoop, "after_step", kill)
        return steps_left

    return install
