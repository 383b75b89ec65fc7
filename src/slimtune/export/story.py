"""What a run folder tells others: rows, length, held-out result, memory. Files are called by name, never by place.

A result is held out only if it was not measured on the training file; of several, the test rows' comes first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..errors import UsageError
from ..run_dir import RunDir


@dataclass(frozen=True)
class RunResults:
    """What is known of a run; each part may be missing.

    Args:
        recipe: what it was asked.
        result: what `slimtune train --json` printed.
        plan: what plan.json holds: `plan` and `probe`.
        evaluation: what `slimtune eval --json` printed, of the best file that is there.
        told_by: the name of that file; result.json where only the validation loss is known; "" for nothing.
    """

    recipe: Recipe | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    told_by: str = ""


def load_run_results(folder: Path | None) -> RunResults:
    """Return what a run folder tells; None: nothing.

    Raises:
        UsageError: a file of the run is damaged.
        RecipeError: its recipe is.
    """
    if folder is None:
        return RunResults()
    run = RunDir.open(folder, require_adapter=False)
    recipe, result = run.load_recipe(), _read(run.result_file)
    evaluation, told_by = _best(run.path, str(recipe.data.train))
    if not told_by and result.get("validation_loss") is not None:
        told_by = run.result_file.name
    return RunResults(recipe, result, _read(run.plan_file), evaluation, told_by)


def _best(folder: Path, trained_on: str) -> tuple[Mapping[str, Any], str]:
    others = sorted(folder.glob("eval-data-*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in (folder / "eval-test.json", *others, folder / "eval-validation.json"):
        found = _read(file)
        # Rows that validation set aside are named by the training file, and were not trained on.
        seen = found.get("data") == trained_on and found.get("split") != "validation"
        if (
            found
            and not seen
            and {"base_loss", "tuned_loss", "loss_reduction", "loss_reduction_ci95", "rows"} <= set(found)
        ):
            return found, file.name
    return {}, ""


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UsageError(f"{file} is damaged: {e}", "JSON", "make it again, or take it out") from e
    if not isinstance(found, dict):
        raise UsageError(f"{file} holds a {type(found).__name__}", "an object", "make it again, or take it out")
    return found
