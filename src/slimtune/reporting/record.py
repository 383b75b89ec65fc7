"""What a run folder's files tell, read once. A file that is not there is not measured; a damaged one is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Recipe
from ..errors import RunError
from ..run_dir import RunDir

Values = Mapping[str, Any]


class Evaluation(NamedTuple):
    """One `eval-<name>.json`: the split, or the file it was measured on."""

    name: str
    values: Values


@dataclass(frozen=True)
class Record:
    """A run as its files tell it.

    Args:
        folder: the run folder, as it was named.
        recipe: what was asked.
        result: what `slimtune train --json` printed.
        plan: what was planned.
        probe: what the longest pass took.
        data: the data report of "train" and "validation".
        metrics: the lines of metrics.jsonl.
        evaluations: base against tuned; the test rows first, the validation rows last.
        faults: what could not be read, each as a sentence.
    """

    folder: Path
    recipe: Recipe
    result: Values = field(default_factory=dict)
    plan: Values = field(default_factory=dict)
    probe: Values = field(default_factory=dict)
    data: Values = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def split(self) -> str:
        """What `slimtune eval RUN` has to be given beside the run so that it finds rows to measure on."""
        d = self.recipe.data
        if d.test is not None:
            return ""
        validated = d.validation is not None or d.validation_fraction > 0
        return "--split validation" if validated else "--data HELD_OUT.jsonl"


def load_record(run: RunDir) -> Record:
    """Read a run folder.

    Raises:
        UsageError: it has no recipe.
        RecipeError: the recipe holds faults.
    """
    faults: list[str] = []
    planned = _read(run.plan_file, faults)
    evaluations = [
        Evaluation(f.stem.removeprefix("eval-"), values)
        for f in sorted(run.path.glob("eval-*.json"), key=_rank)
        if "base_loss" in (values := _read(f, faults))
    ]
    try:
        metrics = run.load_metrics()
    except RunError as e:
        metrics = []
        faults.append(e.message)
    return Record(
        run.path,
        run.load_recipe(),
        _read(run.result_file, faults),
        _inner(planned, "plan"),
        _inner(planned, "probe"),
        _read(run.data_file, faults),
        metrics,
        evaluations,
        faults,
    )


def _rank(file: Path) -> tuple[int, str]:
    return {"eval-test": 0, "eval-validation": 2}.get(file.stem, 1), file.name


def _read(file: Path, faults: list[str]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        faults.append(f"{file.name} cannot be read: {e}")
        return {}
    if not isinstance(found, dict):
        faults.append(f"{file.name} holds a {type(found).__name__}, not an object")
        return {}
    return found


def _inner(values: Values, key: str) -> Values:
    found = values.get(key)
    return found if isinstance(found, dict) else {}
