"""What the files of a run folder say: recipe, result, plan, data report, metrics and evaluations."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.config import Recipe
from ..core.foundation.files import read_json_object
from ..core.foundation.json_results import JsonObject
from ..core.training.run_dir import RunDir
from ..errors import RunError
from .eval_result import EvalResult, read_eval_result


@dataclass(frozen=True)
class StoredEvaluationJson:
    """One `eval-<name>.json` ("test", "validation", "data-<file>"), and what `slimtune eval --json` printed."""

    name: str
    values: Mapping[str, Any]

    @property
    def file_name(self) -> str:
        """Name of the file in the run folder."""
        return f"eval-{self.name}.json"


@dataclass(frozen=True)
class RunResults:
    """What the files of a run contain. A part whose file does not exist is empty.

    Evaluations on test rows come first, on validation rows last, the newest of the others first. `errors` has one
    message for each file that cannot be read.
    """

    recipe: Recipe | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[StoredEvaluationJson] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def held_out(self) -> StoredEvaluationJson | None:
        """The first complete evaluation on rows that were not trained on."""
        answers = ("base_loss", "tuned_loss", "loss_reduction"), "loss_reduction_ci95"
        classes = ("accuracy", "baseline_accuracy", "accuracy_gain"), "accuracy_gain_ci95"
        rewards = ("base_reward", "tuned_reward", "reward_gain"), "reward_gain_ci95"
        data = self.recipe.data if self.recipe is not None else None
        for e in self.evaluations:
            # Rows split off the training file carry its name, although they were not trained on.
            split = e.values.get("split")
            split_off = split in ("validation", "test") and getattr(data, split) is None
            seen = data is not None and e.values.get("data") == str(data.train) and not split_off
            by_kind = {"baseline_accuracy": classes, "base_reward": rewards}
            needed, interval = next((by_kind[name] for name in by_kind if name in e.values), answers)
            complete = all(isinstance(e.values.get(name), int | float) for name in (*needed, "rows"))
            if complete and isinstance(e.values.get(interval), list) and not seen:
                return e
        return None


def load_run_results(run: RunDir, raise_if_damaged: bool = True) -> RunResults:
    """Read all results of a run; unless `raise_if_damaged`, a damaged file is left out and named in `errors`."""
    errors: list[str] = []

    def load_json(file: Path, *parts: str) -> JsonObject:
        try:
            values = read_json_object(file) if os.path.lexists(file) else {}
            if wrong := [part for part in parts if not isinstance(values.get(part), Mapping | None)]:
                raise RunError(f"{file} is damaged: {wrong[0]} is no JSON object", "a JSON object", "delete the file")
            return values
        except RunError as e:
            if raise_if_damaged:
                raise
            errors.append(e.message)
            return {}

    def position(file: Path) -> tuple[int, float, str]:
        return {"eval-test": 0, "eval-validation": 2}.get(file.stem, 1), -file.lstat().st_mtime, file.name

    plan = load_json(run.plan_file, "plan", "probe")
    evaluations = [
        StoredEvaluationJson(file.stem.removeprefix("eval-"), values)
        for file in sorted(run.path.glob("eval-*.json"), key=position)
        if not {"base_loss", "baseline", "base_reward"}.isdisjoint(values := load_json(file))
    ]
    if os.path.lexists(run.metrics_file) and not run.metrics_file.is_file():
        errors.append(f"{run.metrics_file} is damaged: it is no file")
    return RunResults(
        recipe=run.load_recipe(),
        result=load_json(run.result_file),
        plan=plan.get("plan") or {},
        probe=plan.get("probe") or {},
        data=load_json(run.data_file),
        metrics=run.load_metrics(None if raise_if_damaged else errors),
        evaluations=evaluations,
        errors=errors,
    )


@dataclass(frozen=True)
class SavedEvaluation:
    """One `eval-<name>.json`."""

    name: str
    """ "test", "validation", or "data-" and the name of the evaluated file."""
    result: EvalResult
    """What the file contains; optional parts that are damaged are None."""


def parse_evaluations_of_run(results_of_run: RunResults, errors: list[str] | None = None) -> list[SavedEvaluation]:
    """Return the evaluations of a run without those that are too damaged; `errors` gets a sentence for each damage."""
    found = []
    for saved in results_of_run.evaluations:
        try:
            found.append(SavedEvaluation(saved.name, read_eval_result(saved.values)))
            continue
        except ValueError as e:
            if errors is not None:
                errors.append(f"{saved.file_name} is damaged, or was written by another version of slimtune: {e}")
        try:
            found.append(SavedEvaluation(saved.name, read_eval_result(saved.values, strict=False)))
        except ValueError:
            continue
    return found


def find_held_out_evaluation(results: RunResults, evaluations: list[SavedEvaluation]) -> SavedEvaluation | None:
    """Return the first evaluation on rows that were not trained on."""
    held_out = results.held_out
    return next((e for e in evaluations if held_out is not None and e.name == held_out.name), None)
