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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ..core.config import Recipe
from ..core.foundation.files import parse_json, read_json_object, to_json, write_atomic
from ..core.foundation.formatting import format_duration
from ..core.foundation.remote_code import remote_code_allowed
from ..core.training.nonfinite import EVENT as NONFINITE
from ..core.training.run_dir import RunDir
from ..errors import RunError
from .executors import Executor
from .experiment_results import TrialResult
from .run_worker import STOP_SUFFIX, Launch, WorkerResult, train_recipes_at_once_in_subprocess
from .search_space import SettingRange, format_setting_values

REPEATED_DRAWS = 10
"""Values that were tried before are drawn at most this often in a row; then they are drawn at random."""
OUTSIDE_BUDGET = 1e9
"""What a pruner gets in place of the loss of an evaluation outside the forgetting budget; it cannot average Inf."""
RUN, WHY, SECONDS, REPEATS = "run", "why", "seconds", "repeats"
"""What a study keeps of a trial: its run folder, why it failed, its time, and whether its values were tried before."""


@dataclass(frozen=True)
class SettingsSearchSpec:
    """What is searched, and how long.

    Attributes:
        folder: gets the study, and each trial's recipe, run folder and log.
        ranges: the settings that are searched.
        build_recipe: returns a trial's recipe for its values by path and its run folder; `train.max_steps` is set.
        first_trial_values: the values of the first trial; those left out are drawn.
        max_trials: how many are tried at most; None: no limit.
        minutes: when no further trial is begun and the running one is stopped; None: no limit.
        allow_faulty_rows: train on rows that the data report finds faulty.
    """

    folder: Path
    ranges: Sequence[SettingRange]
    build_recipe: Callable[[Mapping[str, Any], Path], Recipe]
    first_trial_values: Mapping[str, Any]
    max_trials: int | None
    minutes: float | None = None
    allow_faulty_rows: bool = False

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


def run_search_trials(
    search: SettingsSearchSpec,
    show_progress: Callable[[str], None],
    executor: Executor,
    at_once: int = 1,
    trials_per_process: int = 1,
) -> list[TrialResult]:
    """Run the trials that are left, and return all of them in the order they were begun.

    Args:
        search: what is searched.
        show_progress: shows a line of progress.
        executor: where trials train.
        trials_per_process: how many of them train in one process, on one base in memory.
        at_once: how many trials are drawn together and train at the same time. Their values and whether they are pruned
            depend on the trials before them, not on which of them ends first.

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
    most = min(search.max_trials or math.inf, math.prod(r.size for r in search.ranges))
    failed_in_a_row = 0
    while len(tried := _list_trials(study, search)) < most and time.monotonic() < deadline:
        # A search that was killed goes on with the trials that were drawn together.
        batch: list[TrialMonitor] = []
        while len(tried) + len(batch) < most and (not batch or (len(tried) + len(batch)) % at_once):
            trial = _ask_untried(study, search, [t.values for t in tried] + [t.values for t in batch], at_once)
            number = f"trial {len(tried) + len(batch) + 1}{f' of {most}' if most < math.inf else ''}"
            batch.append(TrialMonitor(search, trial, number, deadline))
        _run_batch(
            [batch[i : i + trials_per_process] for i in range(0, len(batch), trials_per_process)],
            executor,
            show_progress,
        )
        failed = None
        for run in (run for run in batch if run.why is not None):
            run.trial.set_user_attr(SECONDS, run.seconds)
            failed_in_a_row = failed_in_a_row + 1 if run.why else 0
            if run.why:
                failed = run
                run.trial.set_user_attr(WHY, run.why)
                study.tell(run.trial, state=TrialState.FAIL)
            else:
                study.tell(run.trial, run.loss, state=TrialState.PRUNED if run.loss is None else TrialState.COMPLETE)
        if failed and (failed_in_a_row >= 2 or not study.get_trials(states=[TrialState.COMPLETE])):
            raise RunError(f"the trial with {format_setting_values(failed.values)} failed: {failed.why}")
        if any(run.why is None for run in batch):
            break
    trials = _list_trials(study, search)
    if not any(t.outcome == "complete" for t in trials):
        limit = f" in {format_duration(60 * search.minutes)}" if search.minutes is not None else ""
        hint = "the same command continues the search; or lower learning rates, if losses became NaN or Inf"
        raise RunError(f"no trial ended with a loss{limit}", "a trial that trains to its end", hint)
    return trials


def _run_batch(groups: "Sequence[Sequence[TrialMonitor]]", executor: Executor, log: Callable[[str], None]) -> None:
    """Train trials, those of a group in one process; all of a batch are begun before the first result is used."""
    by_file = {group[0].recipe_file: group for group in groups}
    launches = [(file, _launch_trials(group)) for file, group in by_file.items()]

    def should_stop(file: Path) -> bool:
        group = by_file[file]
        for run in group:
            if not run.stopped and run.should_stop() and len(group) > 1:
                run.stop_file.touch()
        return all(run.stopped for run in group)

    for file, worker in executor.run(launches, should_stop):
        for run in by_file[file]:
            error = worker.errors_by_recipe_file.get(str(run.recipe_file), worker.error)
            run.finish(worker._replace(error=error, stopped_by_should_stop=run.stopped))
            log(f"{run.text}: {run.describe_outcome()}")


def _launch_trials(group: "Sequence[TrialMonitor]") -> Launch:
    """Write the recipes of trials and return what trains them in one process."""
    for run in group:
        run.stop_file.unlink(missing_ok=True)
        write_atomic(run.recipe_file, run.recipe.to_yaml())
    trust, files = remote_code_allowed(), [run.recipe_file for run in group]
    return partial(
        train_recipes_at_once_in_subprocess,
        files,
        skip_test_evaluation=True,
        allow_faulty_rows=group[0].search.allow_faulty_rows,
        trust_remote_code=trust,
    )


def find_best_trial(trials: Sequence[TrialResult]) -> TrialResult:
    """Return the trial with the lowest loss; one is complete."""
    return min(trials, key=lambda t: math.inf if t.loss is None else t.loss)


def _list_trials(study: optuna.Study, search: SettingsSearchSpec) -> list[TrialResult]:
    """Return every trial that ended, in the order in which they were begun first."""
    outcomes: dict[TrialState, Literal["complete", "pruned", "failed"]] = {
        TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
    }  # fmt: skip
    latest = {search.trial_recipe_file(t).stem: t for t in study.trials if REPEATS not in t.user_attrs}
    return [
        TrialResult(
            run=run,
            values=search.values(t),
            outcome=outcomes[t.state],
            loss=t.value if t.state is TrialState.COMPLETE else None,
            seconds=t.user_attrs.get(SECONDS),
            why=t.user_attrs.get(WHY, ""),
        )
        for run, t in latest.items()
        if t.state in outcomes and (t.state is not TrialState.FAIL or WHY in t.user_attrs)  # else it was killed
    ]


def _enqueue_unfinished(study: optuna.Study, search: SettingsSearchSpec) -> None:
    """Enqueue the first values of a new study, or the trials of an earlier process that were killed or failed."""
    if not study.trials:
        known = [r for r in search.ranges if r.path in search.first_trial_values]
        study.enqueue_trial({r.path: _to_parameter(r, search.first_trial_values[r.path]) for r in known})
    latest = {search.trial_recipe_file(t).stem: t for t in study.trials if REPEATS not in t.user_attrs}
    for run, trial in latest.items():
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL):
            study.enqueue_trial(trial.params, user_attrs={RUN: run})


def _ask_untried(
    study: optuna.Study, search: SettingsSearchSpec, tried: Sequence[Mapping[str, Any]], at_once: int
) -> optuna.Trial:
    """Return the next trial; its values were not tried before, as the same recipe gives the same loss."""
    distributions = {r.path: _distribution(r) for r in search.ranges}
    for draw in itertools.count():
        seed = 1000 * len(tried) + draw
        startup = 5 if search.max_trials is None else min(5, max(2, search.max_trials // 2))
        study.sampler = (
            # With `constant_liar` trials that are drawn together lie apart.
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=at_once > 1)
            if draw < REPEATED_DRAWS
            else optuna.samplers.RandomSampler(seed=seed)
        )
        trial = study.ask(distributions)
        if RUN in trial.user_attrs or search.values(trial) not in tried:
            return trial
        trial.set_user_attr(REPEATS, True)
        study.tell(trial, state=TrialState.FAIL)
    raise AssertionError


def _distribution(searched: SettingRange) -> BaseDistribution:
    if searched.choices:
        return CategoricalDistribution([_to_parameter(searched, choice) for choice in searched.choices])
    if searched.whole:
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)


def _to_parameter(searched: SettingRange, value: Any) -> Any:
    """Return a value as Optuna has it: a choice is JSON text, because a study keeps no lists."""
    return to_json(next(c for c in searched.choices if c == value)) if searched.choices else value


class TrialMonitor:
    """The training of one trial.

    Attributes:
        stopped: whether it was ended before its time.
        loss: the validation loss of the adapter that it keeps; None if it was pruned or diverged.
        why: why it failed; "" if it did not, None before its end and if the time of the search ran out.
        seconds: how long it took.
    """

    def __init__(self, search: SettingsSearchSpec, trial: optuna.Trial, label: str, deadline: float) -> None:
        self.search, self.trial, self.deadline = search, trial, deadline
        self.values, self.recipe_file = search.values(trial), search.trial_recipe_file(trial).absolute()
        self.text = f"{label}: {format_setting_values(self.values)}"
        self.run, self.stop_file = RunDir(self.recipe_file.with_suffix("")), self.recipe_file.with_suffix(STOP_SUFFIX)
        self.recipe = search.build_recipe(self.values, self.run.path)
        self.evaluations_seen = 0
        self.out_of_time = self.stopped = False
        self.loss: float | None = None
        self.why: str | None = None
        self.seconds = 0.0

    def should_stop(self) -> bool:
        """Return whether the search is over, or the trial is to be pruned; it stays so."""
        self.out_of_time = time.monotonic() > self.deadline
        self.stopped = self.out_of_time or self.should_prune()
        return self.stopped

    def should_prune(self) -> bool:
        """Report the evaluations since the last call, and return whether one is above the median, NaN or Inf."""
        budget = self.recipe.train.forgetting_budget
        evaluations = [m for m in self.run.load_metrics() if "validation_loss" in m]
        for metrics in evaluations[self.evaluations_seen :]:
            self.evaluations_seen += 1
            if metrics["step"] >= (self.recipe.train.max_steps or 0):
                break
            loss = metrics["validation_loss"]
            if loss is None or not math.isfinite(loss):
                return True
            inside = budget in (None, "auto") or metrics.get("forgetting", math.inf) <= budget
            self.trial.report(loss if inside else OUTSIDE_BUDGET, self.evaluations_seen)
            if self.trial.should_prune():
                return True
        return False

    def finish(self, worker: WorkerResult) -> None:
        """Read how the run ended, and delete its weights."""
        self.seconds = round(worker.seconds, 1)
        if worker.stopped_by_should_stop and self.out_of_time:
            return
        diverged = any(m.get("event") == NONFINITE for m in self.run.load_metrics())
        self.why = ""
        if worker.error and not diverged:
            self.why = worker.error
            return
        # A trial that ended between two polls is judged by the same rule.
        if not (worker.stopped_by_should_stop or diverged or self.should_prune()):
            self.loss = read_json_object(self.run.result_file)["validation_loss"]
        self.stop_file.unlink(missing_ok=True)
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        shutil.rmtree(self.run.adapter, ignore_errors=True)

    def describe_outcome(self) -> str:
        """Return how it ended, for the log."""
        if self.why is None:
            return f"stopped after {self.search.minutes:g} minutes; the same command continues it"
        if self.why:
            return f"failed: {self.why}"
        return "pruned" if self.loss is None else f"validation loss {self.loss:.4f}"
