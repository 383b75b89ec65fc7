"""Search the settings of a recipe, or the learning rate of each method of a comparison.

DIR/settings.json               what is searched: the same command resumes it, a different one is refused
DIR/trials/study.journal        Optuna's study; trial-1.yaml, trial-1/, trial-1.log: one trial
DIR/best.yaml                   the recipe of the best trial, for `slimtune train`
DIR/tune.json, table.md, tune.svg
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.adapters.method_registry import get_method_config_class
from ..core.config import Recipe
from ..core.config.recipe_loading import replace_recipe_values
from ..core.foundation.files import parse_json, to_json, write_atomic, write_json
from ..core.foundation.formatting import format_duration
from ..core.training.datasets import load_training_datasets
from ..core.training.default_learning_rate import fill_in_learning_rate
from ..errors import UsageError
from ..extras.row_digest import hash_rows
from ..extras.row_files import list_missing_data_file_errors
from .candidates import ComparisonCandidate
from .comparison_chart import write_tune_trials_chart
from .executor_specs import make_executor
from .executors import Executor, ExecutorSpec
from .experiment_output_dir import lock_output_dir_and_write_settings
from .experiment_results import LearningRateSearch, LearningRateTrial, TuneResult
from .markdown_table import format_markdown_table
from .run_grid import ComparisonGrid, load_base_hidden_size
from .search import SettingsSearchSpec, find_best_trial, run_search_trials
from .search_space import SettingRange, format_setting_value, format_setting_values, validate_and_mark_integer_ranges

RATE = "train.learning_rate"
RATE_FACTOR = 10.0
"""A comparison searches from a method's default rate divided by this to the default times this."""
TRIAL_SHARE = 0.5
"""Share of a run's steps that a trial of a comparison takes."""
EVALUATIONS_PER_TRIAL = 3
"""Evaluations of a trial, unless the recipe says how often; a trial may be pruned at all but the last."""


def run_tuning(
    tree: Mapping[str, Any],
    ranges: Sequence[SettingRange],
    output_dir: Path,
    log: Callable[[str], None] = lambda _: None,
    *,
    trials: int | None,
    minutes: float | None = None,
    allow_faulty_rows: bool = False,
    plot: Path | None = None,
    executor_spec: ExecutorSpec | None = None,
    at_once: int = 1,
) -> TuneResult:
    """Search settings of a recipe, or continue a search, and return what `slimtune tune --json` prints.

    A trial trains the recipe to its end unless it is pruned. After Ctrl-C the trials that ended stand.

    Args:
        tree: the recipe as a plain tree in long form, with absolute paths.
        ranges: the settings to search.
        output_dir: the folder of the search.
        log: shows a line of progress.
        trials: how many are tried at most, earlier ones included; None: no limit.
        minutes: when the search ends at the latest; None: no limit.
        allow_faulty_rows: train on rows that the data report finds faulty.
        plot: an additional file for the chart (`.svg` or `.png`).
        executor_spec: where trials train at the same time (`--on`); None: here, one after another.
        at_once: how many trials train at the same time in one process, on one base in memory.
    """
    start = time.perf_counter()
    recipe = Recipe.from_dict(tree, extra_checks=list_missing_data_file_errors)

    def build(values: Mapping[str, Any], run: Path = output_dir) -> Recipe:
        settings = replace_recipe_values(tree, {**values, "output_dir": str(run.absolute())})
        return Recipe.from_dict(settings, "--over")

    ranges = validate_and_mark_integer_ranges(ranges, build)
    if recipe.data.validation is None and recipe.data.validation_fraction == 0:
        raise UsageError("there are no validation rows to search on", "data.validation or data.validation_fraction")
    if recipe.train.max_steps is not None and any(r.path == "train.epochs" for r in ranges):
        message = "--over train.epochs: train.max_steps is set, so epochs do not count"
        raise UsageError(message, "--over train.max_steps, or --set train.max_steps=null")
    rows = load_training_datasets(recipe, allow_faulty_rows)
    if not rows.validation:
        raise UsageError("no validation rows are left to search on", "more rows, or data.validation")
    if at_once > 1 and (other := [r.path for r in ranges if r.path.startswith("model.")]):
        raise UsageError(
            f"--at-once trains on one base, which {other[0]} changes", "no --at-once, or no --over model.…"
        )
    if executor_spec is not None and executor_spec.max_parallel_runs is None:
        message = f"--on {executor_spec.text} does not say how many trials train at the same time"
        raise UsageError(message, f"a number, as {executor_spec.text}{',' if ':' in executor_spec.text else ':'}4")
    settings = {
        **{name: value for name, value in recipe.to_dict().items() if name != "output_dir"},
        "over": {r.path: str(r) for r in ranges},
        "rows (SHA-256)": {"train": hash_rows(rows.train), "validation": hash_rows(rows.validation)},
    }

    def build_evaluated(values: Mapping[str, Any], run: Path) -> Recipe:
        steps = build(values).train.count_steps(len(rows.train))
        often = {} if recipe.train.eval_steps else {"train.eval_steps": math.ceil(steps / EVALUATIONS_PER_TRIAL)}
        return build({**often, **values}, run)

    def build_trial(values: Mapping[str, Any], run: Path) -> Recipe:
        trial = build_evaluated(values, run)
        steps = trial.train.count_steps(len(rows.train))
        return replace(trial, train=replace(trial.train, max_steps=steps))

    filled = fill_in_learning_rate(recipe, len(rows.train), load_base_hidden_size(recipe.model))
    first = {r.path: value for r in ranges if r.contains(value := _read_setting(filled, r.path))}
    search = SettingsSearchSpec(output_dir / "trials", ranges, build_trial, first, trials, minutes, allow_faulty_rows)
    with (
        lock_output_dir_and_write_settings(output_dir, settings, "search"),
        make_executor(executor_spec, output_dir) as executor,
    ):
        found = run_search_trials(
            search, log, executor, at_once=at_once * (executor.max_parallel_runs or 1), trials_per_process=at_once
        )
        best = find_best_trial(found)
        own = [t.loss for t in found if len(first) == len(ranges) and t.values == first]
        best_file = output_dir / "best.yaml"
        write_atomic(best_file, build_evaluated(best.values, output_dir / "best").to_yaml())
        result = TuneResult(
            output_dir=str(output_dir),
            model=recipe.model.name,
            over=settings["over"],
            validation_rows=len(rows.validation),
            trials=found,
            best=best,
            recipe_loss=own[0] if own else None,
            at_the_edge=[r.path for r in ranges if r.is_edge(best.values[r.path])],
            best_recipe=str(best_file),
            seconds=round(time.perf_counter() - start, 3),
        )
        write_json(output_dir / "tune.json", result)
        write_atomic(output_dir / "table.md", _format_search(result))
        for file in filter(None, (output_dir / "tune.svg", plot)):
            write_tune_trials_chart(result, ranges, file)
    return result


def search_learning_rate(
    comparison_grid: ComparisonGrid, candidate: ComparisonCandidate, log: Callable[[str], None], executor: Executor
) -> LearningRateSearch:
    """Search around a candidate's learning rate; return the best rate and all trials.

    Every candidate gets the same number of trials of the same length, from a tenth to ten times its own default rate,
    the default first.
    """
    default, steps = float(candidate.learning_rate), max(1, math.ceil(TRIAL_SHARE * comparison_grid.steps))
    length = {"max_steps": steps, "eval_steps": max(1, math.ceil(steps / EVALUATIONS_PER_TRIAL)), "save_steps": steps}

    def build_trial(values: Mapping[str, Any], run: Path) -> Recipe:
        return comparison_grid.build_recipe(
            candidate, comparison_grid.seeds[0], run, learning_rate=values[RATE], **length
        )

    rates = SettingRange(RATE, low=default / RATE_FACTOR, high=default * RATE_FACTOR, log=True)
    folder = comparison_grid.output_dir / "tune" / candidate.label
    search = SettingsSearchSpec(
        folder,
        [rates],
        build_trial,
        {RATE: default},
        comparison_grid.trials_per_candidate,
        allow_faulty_rows=comparison_grid.allow_faulty_rows,
    )
    trials = run_search_trials(search, lambda text: log(f"{candidate.label}: {text}"), executor)
    best = find_best_trial(trials).values[RATE]
    tried = [LearningRateTrial(rate=t.values[RATE], loss=t.loss, pruned=t.outcome == "pruned") for t in trials]
    return LearningRateSearch(rate=best, at_the_edge=rates.is_edge(best), trials=tried)


def _read_setting(recipe: Recipe, path: str) -> Any:
    """Return the value of a setting in a recipe, None if it has none; a method's short names are known."""
    section, _, name = path.partition(".")
    if section == "method":
        name = get_method_config_class(recipe.method.name).short_names.get(name, name)
    return parse_json(to_json(recipe.to_dict().get(section, {}).get(name)))


# --- the report -------------------------------------------------------------------------------------------------------


def list_trial_table_headings(result: TuneResult) -> list[str]:
    """Return the headings of the table of trials; the names of settings lack their section."""
    return ["trial", *(path.partition(".")[2] for path in result.over), "validation loss", "time"]


def make_trial_table_rows(result: TuneResult) -> list[list[str]]:
    """Return the cells of every trial, in the order in which they were begun."""
    rows = []
    for number, trial in enumerate(result.trials, 1):
        loss = trial.outcome if trial.loss is None else f"{trial.loss:.4f}"
        best = " (best)" if trial == result.best else ""
        seconds = "" if trial.seconds is None else format_duration(trial.seconds)
        rows.append([str(number), *map(format_setting_value, trial.values.values()), loss + best, seconds])
    return rows


def describe_best_trial_and_caveats(result: TuneResult) -> list[str]:
    """Return what a reader of the trials must know."""
    outcomes = [t.outcome for t in result.trials]
    ended, best_loss = outcomes.count("complete"), result.best.loss
    assert best_loss is not None
    notes = [f"Best: {format_setting_values(result.best.values)}, validation loss {best_loss:.4f}."]
    if (own := result.recipe_loss) is not None:
        gain = own - best_loss
        notes.append(f"The recipe's own values have {own:.4f}" + (f", {gain:.4f} more." if gain > 0 else ": the best."))
    for path in result.at_the_edge:
        notes.append(f"The best {path} lies at the edge of its range, {result.over[path]}: search beyond it.")
    for trial in result.trials:
        if trial.why:
            notes.append(
                f"Failed: {format_setting_values(trial.values)} ({trial.why}); the same command tries it again."
            )
    if "pruned" in outcomes:
        notes.append("Pruned: stopped at an evaluation whose loss was above the median, or was NaN or Inf.")
    notes.append(
        f"The best loss is the lowest of {ended} on the same {result.validation_rows} validation rows, so it is "
        "lower than on new rows: measure the trained run on test rows (slimtune eval)."
    )
    return notes


def describe_search_setup(result: TuneResult) -> str:
    """Return what was searched, in one sentence."""
    ranges = "; ".join(f"{path} over {text}" for path, text in result.over.items())
    count = len(result.trials)
    return f"{result.model}: {count} trial{'s' * (count != 1)} of {ranges}."


def _format_search(result: TuneResult) -> str:
    """Return `table.md`."""
    table = format_markdown_table(list_trial_table_headings(result), make_trial_table_rows(result))
    parts = [describe_search_setup(result), table, *describe_best_trial_and_caveats(result)]
    return "\n\n".join([*parts, f"Train it: `slimtune train {result.best_recipe}`"]) + "\n"
