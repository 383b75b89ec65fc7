"""Search settings with Optuna: trials in their own processes, pruned early, resumable.

Each trial trains a recipe with other values and ends with the lowest loss on the validation rows; test rows are not
used. A trial is pruned if its loss at an evaluation before its end is above the median of the earlier trials'; an
evaluation outside the recipe's forgetting budget counts as the worst. The loss of a trial is that of the adapter that
training keeps: inside the budget, if there is one.

The study is a journal in the search's folder. The sampler of each trial depends only on the trials before it and on
their number, so a search that was killed continues with the same values; the trial that was running is resumed from its
checkpoint. A trial that failed is repeated when the search is started again.
"""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ..config import Recipe
from ..errors import RunError
from ..run_dir import RunDir
from ..training.nonfinite import EVENT as NONFINITE
from ..utils.files import parse_json, read_json, to_json, write_atomic
from ..utils.formatting import format_duration
from .space import Range, format_values
from .worker import launch_worker

REPEATED_DRAWS = 10
"""Values that were tried before are drawn at most this often in a row; then they are drawn at random."""
OUTSIDE_BUDGET = 1e9
"""What a pruner gets in place of the loss of an evaluation outside the forgetting budget; it cannot average Inf."""
RUN, WHY, SECONDS, REPEATS = "run", "why", "seconds", "repeats"
"""What a study keeps of a trial: its run folder, why it failed, its time, and whether its values were tried before."""


@dataclass(frozen=True)
class Search:
    """What is searched, and how long.

    Attributes:
        folder: gets the study, and each trial's recipe, run folder and log.
        ranges: the settings that are searched.
        build_recipe: returns a trial's recipe for its values by path and its run folder; `train.max_steps` is set.
        first: the values of the first trial; those left out are drawn.
        trials: how many are tried at most; None: no limit.
        minutes: when no further trial is begun and the running one is stopped; None: no limit.
        force: train on rows that the data report finds faulty.
    """

    folder: Path
    ranges: Sequence[Range]
    build_recipe: Callable[[Mapping[str, Any], Path], Recipe]
    first: Mapping[str, Any]
    trials: int | None
    minutes: float | None = None
    force: bool = False

    def trial_recipe_file(self, trial: FrozenTrial | optuna.Trial) -> Path:
        """Return the recipe file of a trial; its run folder has the same name without a suffix."""
        return self.folder / f"{trial.user_attrs.get(RUN, f'trial-{trial.number + 1}')}.yaml"

    def values(self, trial: FrozenTrial | optuna.Trial) -> dict[str, Any]:
        """Return a trial's values by path; fractions have four digits, so that a recipe can be read."""
        values: dict[str, Any] = {}
        for searched in self.ranges:
            value = trial.params[searched.path]
            if searched.choices:
                value = parse_json(value)
            elif not searched.whole and value not in searched.ends:
                value = min(max(float(f"{value:.4g}"), searched.low), searched.high)
            values[searched.path] = value
        return values


def run_search(search: Search, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the trials that are left, and return all of them in the order they were begun.

    Returns:
        A mapping for each trial: `run` (name of its run folder), `values` by path, `outcome` ("complete", "pruned" or
        "failed"), `loss` (validation loss of the adapter that it keeps; None unless complete), `seconds`, `why` it
        failed.

    Raises:
        RunError: no trial ended with a loss, or two failed in a row.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    deadline = math.inf if search.minutes is None else time.monotonic() + 60 * search.minutes
    search.folder.mkdir(parents=True, exist_ok=True)
    journal = JournalFileBackend(str(search.folder / "study.journal"))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0)
    storage = optuna.storages.JournalStorage(journal)
    study = optuna.create_study(storage=storage, study_name="trials", pruner=pruner, load_if_exists=True)
    _enqueue_unfinished(study, search)
    most = min(search.trials or math.inf, math.prod(r.size for r in search.ranges))
    failed_in_a_row = 0
    while len(tried := _list_trials(study, search)) < most and time.monotonic() < deadline:
        trial = _ask_untried(study, search, tried)
        recipe_file, values = search.trial_recipe_file(trial), search.values(trial)
        recipe = search.build_recipe(values, recipe_file.with_suffix(""))
        write_atomic(recipe_file, recipe.to_yaml())
        text = f"trial {len(tried) + 1}{f' of {most}' if most < math.inf else ''}: {format_values(values)}"
        started = time.monotonic()
        loss, why = _run_trial(search, trial, recipe, recipe_file, deadline)
        if why is None:
            log(f"{text}: stopped after {search.minutes:g} minutes; the same command continues it")
            break
        trial.set_user_attr(SECONDS, round(time.monotonic() - started, 1))
        failed_in_a_row = failed_in_a_row + 1 if why else 0
        if why:
            trial.set_user_attr(WHY, why)
            study.tell(trial, state=TrialState.FAIL)
            if failed_in_a_row == 2 or not study.get_trials(states=[TrialState.COMPLETE]):
                raise RunError(f"the trial with {format_values(values)} failed: {why}")
            log(f"{text}: failed: {why}")
            continue
        study.tell(trial, loss, state=TrialState.PRUNED if loss is None else TrialState.COMPLETE)
        log(f"{text}: {'pruned' if loss is None else f'validation loss {loss:.4f}'}")
    trials = _list_trials(study, search)
    if not any(t["outcome"] == "complete" for t in trials):
        limit = f" in {format_duration(60 * search.minutes)}" if search.minutes is not None else ""
        hint = "the same command continues the search; or lower learning rates, if losses became NaN or Inf"
        raise RunError(f"no trial ended with a loss{limit}", "a trial that trains to its end", hint)
    return trials


def best_trial(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the trial with the lowest loss; one is complete."""
    return min((t for t in trials if t["loss"] is not None), key=lambda t: t["loss"])


def _list_trials(study: optuna.Study, search: Search) -> list[dict[str, Any]]:
    """Return every trial that ended, in the order in which they were begun first."""
    outcomes = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    latest = {search.trial_recipe_file(t).stem: t for t in study.trials if REPEATS not in t.user_attrs}
    return [
        {
            "run": run,
            "values": search.values(t),
            "outcome": outcomes[t.state],
            "loss": t.value if t.state is TrialState.COMPLETE else None,
            "seconds": t.user_attrs.get(SECONDS),
            "why": t.user_attrs.get(WHY, ""),
        }
        for run, t in latest.items()
        if t.state in outcomes and (t.state is not TrialState.FAIL or WHY in t.user_attrs)  # else it was killed
    ]


def _enqueue_unfinished(study: optuna.Study, search: Search) -> None:
    """Enqueue the first values of a new study, or the trials of an earlier process that were killed or failed."""
    if not study.trials:
        known = [r for r in search.ranges if r.path in search.first]
        study.enqueue_trial({r.path: _to_parameter(r, search.first[r.path]) for r in known})
    latest = {search.trial_recipe_file(t).stem: t for t in study.trials if REPEATS not in t.user_attrs}
    for run, trial in latest.items():
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL):
            study.enqueue_trial(trial.params, user_attrs={RUN: run})


def _ask_untried(study: optuna.Study, search: Search, tried: Sequence[Mapping[str, Any]]) -> optuna.Trial:
    """Return the next trial; its values were not tried before, as the same recipe gives the same loss."""
    distributions = {r.path: _distribution(r) for r in search.ranges}
    for draw in itertools.count():
        seed = 1000 * len(tried) + draw
        startup = 5 if search.trials is None else min(5, max(2, search.trials // 2))
        study.sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
            if draw < REPEATED_DRAWS
            else optuna.samplers.RandomSampler(seed=seed)
        )
        trial = study.ask(distributions)
        if RUN in trial.user_attrs or search.values(trial) not in [t["values"] for t in tried]:
            return trial
        trial.set_user_attr(REPEATS, True)
        study.tell(trial, state=TrialState.FAIL)
    raise AssertionError


def _distribution(searched: Range) -> BaseDistribution:
    if searched.choices:
        return CategoricalDistribution([_to_parameter(searched, choice) for choice in searched.choices])
    if searched.whole:
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)


def _to_parameter(searched: Range, value: Any) -> Any:
    """Return a value as Optuna has it: a choice is JSON text, because a study keeps no lists."""
    return to_json(next(c for c in searched.choices if c == value)) if searched.choices else value


def _run_trial(
    search: Search, trial: optuna.Trial, recipe: Recipe, recipe_file: Path, deadline: float
) -> tuple[float | None, str | None]:
    """Run one trial; return the validation loss of the adapter that it keeps, and why it failed.

    The loss is None if the trial was pruned or diverged. Why is "" if it did not fail, and None if it ran out of time.
    """
    run, steps = RunDir(recipe_file.with_suffix("")), recipe.train.max_steps or 0
    budget = recipe.train.forgetting_budget
    reported = 0
    out_of_time = False

    def should_prune() -> bool:
        nonlocal reported
        evaluations = [m for m in run.load_metrics() if "validation_loss" in m]
        for metrics in evaluations[reported:]:
            reported += 1
            if metrics["step"] >= steps:
                break
            loss = metrics["validation_loss"]
            if loss is None or not math.isfinite(loss):
                return True
            inside = budget is None or metrics.get("forgetting", math.inf) <= budget
            trial.report(loss if inside else OUTSIDE_BUDGET, reported)
            if trial.should_prune():
                return True
        return False

    def should_stop() -> bool:
        nonlocal out_of_time
        out_of_time = time.monotonic() > deadline
        return out_of_time or should_prune()

    log_file = recipe_file.with_suffix(".log")
    worker = launch_worker(recipe_file, log_file, trial=True, force=search.force, should_stop=should_stop)
    if worker.stopped and out_of_time:
        return None, None
    diverged = any(m.get("event") == NONFINITE for m in run.load_metrics())
    if worker.error and not diverged:
        return None, worker.error
    # A trial that ended between two polls is judged by the same rule.
    pruned = worker.stopped or diverged or should_prune()
    loss = None if pruned else read_json(run.result_file)["validation_loss"]
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    shutil.rmtree(run.adapter, ignore_errors=True)
    return loss, ""
