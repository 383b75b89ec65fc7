"""The evaluations that a run folder keeps as `eval-<name>.json`, as results; what is damaged in them is named."""

from dataclasses import dataclass

from ..core.training.run_dir import RunResults
from .eval_result import EvalResult, read_eval_result


@dataclass(frozen=True)
class SavedEvaluation:
    """One `eval-<name>.json`."""

    name: str
    """ "test", "validation", or "data-" and the name of the evaluated file."""
    result: EvalResult
    """What the file contains; optional parts that are damaged are None."""


def read_saved_evaluations(results: RunResults, errors: list[str] | None = None) -> list[SavedEvaluation]:
    """Return the evaluations of a run without those that are too damaged; `errors` gets a sentence for each damage."""
    found = []
    for saved in results.evaluations:
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
