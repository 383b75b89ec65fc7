"""The report of a search: the path of its trials, the best one, and what a reader must know."""

from collections.abc import Mapping
from typing import Any

from ..utils.formatting import format_duration, format_markdown_table
from .space import format_setting, format_values


def trial_columns(result: Mapping[str, Any]) -> list[str]:
    """Return the headings of the table of trials; the names of settings lack their section."""
    return ["trial", *(path.partition(".")[2] for path in result["over"]), "validation loss", "time"]


def format_trials(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of every trial, in the order in which they were begun."""
    rows = []
    for number, trial in enumerate(result["trials"], 1):
        loss = trial["outcome"] if trial["loss"] is None else f"{trial['loss']:.4f}"
        best = " (best)" if trial == result["best"] else ""
        seconds = "" if trial["seconds"] is None else format_duration(trial["seconds"])
        rows.append([str(number), *map(format_setting, trial["values"].values()), loss + best, seconds])
    return rows


def list_search_notes(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the trials must know."""
    outcomes = [t["outcome"] for t in result["trials"]]
    best, ended = result["best"], outcomes.count("complete")
    notes = [f"Best: {format_values(best['values'])}, validation loss {best['loss']:.4f}."]
    if (own := result["recipe_loss"]) is not None:
        gain = own - best["loss"]
        notes.append(f"The recipe's own values have {own:.4f}" + (f", {gain:.4f} more." if gain > 0 else ": the best."))
    for path in result["at_the_edge"]:
        notes.append(f"The best {path} lies at the edge of its range, {result['over'][path]}: search beyond it.")
    for trial in result["trials"]:
        if trial["why"]:
            notes.append(f"Failed: {format_values(trial['values'])} ({trial['why']}); the same command tries it again.")
    if "pruned" in outcomes:
        notes.append("Pruned: stopped at an evaluation whose loss was above the median, or was NaN or Inf.")
    notes.append(
        f"The best loss is the lowest of {ended} on the same {result['validation_rows']} validation rows, so it is "
        "lower than on new rows: measure the trained run on test rows (slimtune eval)."
    )
    return notes


def describe_search(result: Mapping[str, Any]) -> str:
    """Return what was searched, in one sentence."""
    ranges = "; ".join(f"{path} over {text}" for path, text in result["over"].items())
    count = len(result["trials"])
    return f"{result['model']}: {count} trial{'s' * (count != 1)} of {ranges}."


def format_search(result: Mapping[str, Any]) -> str:
    """Return `table.md`."""
    table = format_markdown_table(trial_columns(result), format_trials(result))
    parts = [describe_search(result), table, *list_search_notes(result)]
    return "\n\n".join([*parts, f"Train it: `slimtune train {result['best_recipe']}`"]) + "\n"
