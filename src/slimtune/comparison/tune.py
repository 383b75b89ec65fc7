"""Search a learning rate for each method, with the same effort for all.

Every candidate gets the same number of trials (Optuna's TPE) in the same range around its own default rate: from a
tenth to ten times the default on a logarithmic scale, the default first. A trial takes half of a run's steps. The
objective is the lowest loss on the validation rows; the test rows are not used. A trial is pruned if its validation
loss at a third or two thirds of its steps is above the median of the earlier trials.

The sampler of each trial depends only on the earlier trials and on the trial's number, so a search that was killed
continues with the same rates.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..errors import RunError
from ..run_dir import RunDir
from ..training.nonfinite import EVENT as NONFINITE
from ..utils.files import write_atomic
from .candidates import Candidate
from .grid import Grid
from .worker import launch_worker

RATE_FACTOR = 10.0
"""The range reaches from the default divided by this to the default times this."""
TRIAL_SHARE = 0.5
"""Share of a run's steps that a trial takes."""
EVALUATIONS_PER_TRIAL = 3
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def search_learning_rate(grid: Grid, candidate: Candidate, log: Callable[[str], None]) -> dict[str, Any]:
    """Search around a candidate's learning rate; return the best rate and all trials.

    Returns:
        `rate`; `at_the_edge`: whether the rate lies within a tenth of the range from an end; `trials`: `rate`, `loss`
        (lowest validation loss, None if pruned or not finite) and `pruned` of each.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    low, high = candidate.learning_rate / RATE_FACTOR, candidate.learning_rate * RATE_FACTOR
    folder = grid.output_dir / "tune" / candidate.label
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(grid.output_dir / "tune" / "trials.journal"))),
        study_name=candidate.label,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0),
        load_if_exists=True,
    )
    if not study.trials:
        study.enqueue_trial({"rate": candidate.learning_rate})
    for killed in study.get_trials(states=[TrialState.RUNNING]):  # the same rate is tried again
        study.tell(killed.number, state=TrialState.FAIL)
        study.enqueue_trial(killed.params)
    while (number := len(study.get_trials(states=FINISHED))) < grid.trials:
        study.sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=min(5, max(2, grid.trials // 2)))
        trial = study.ask({"rate": optuna.distributions.FloatDistribution(low, high, log=True)})
        loss = _run_trial(grid, candidate, trial, folder)
        study.tell(trial, loss, state=TrialState.PRUNED if loss is None else TrialState.COMPLETE)
        outcome = "pruned" if loss is None else f"validation loss {loss:.4f}"
        log(f"{candidate.label}: rate {trial.params['rate']:.2e}, {outcome} ({number + 1} of {grid.trials})")
    trials: list[dict[str, Any]] = []
    for finished in study.get_trials(states=FINISHED):
        pruned = finished.state is TrialState.PRUNED
        loss = None if pruned else finished.value
        trials.append({"rate": finished.params["rate"], "loss": loss, "pruned": pruned})
    complete = [t for t in trials if not t["pruned"]]
    if not complete:
        raise RunError(f"no learning rate from {low:.1e} to {high:.1e} gave a finite loss", "a rate that trains")
    best = min(complete, key=lambda t: t["loss"])["rate"]
    at_the_edge = abs(math.log(best / candidate.learning_rate)) > 0.8 * math.log(RATE_FACTOR)
    return {"rate": best, "at_the_edge": at_the_edge, "trials": trials}


def _run_trial(grid: Grid, candidate: Candidate, trial: optuna.Trial, folder: Path) -> float | None:
    """Run one trial and return its lowest validation loss, or None if it was pruned or diverged."""
    rate, steps = trial.params["rate"], max(1, math.ceil(TRIAL_SHARE * grid.steps))
    run = RunDir(folder / f"{rate:.6e}")
    eval_steps = max(1, math.ceil(steps / EVALUATIONS_PER_TRIAL))
    train = {"learning_rate": rate, "max_steps": steps, "eval_steps": eval_steps, "save_steps": steps}
    recipe_file = folder / f"{run.path.name}.yaml"
    write_atomic(recipe_file, grid.build_recipe(candidate, grid.seeds[0], run.path, **train).to_yaml())
    reported = 0

    def should_stop() -> bool:
        nonlocal reported
        evaluations = [m for m in run.load_metrics() if "validation_loss" in m]
        for metrics in evaluations[reported:]:
            reported += 1
            if metrics["step"] >= steps:
                break
            loss = metrics["validation_loss"]
            if loss is None or not math.isfinite(loss):
                return True
            trial.report(loss, metrics["step"])
            if trial.should_prune():
                return True
        return False

    log_file = folder / f"{run.path.name}.log"
    worker = launch_worker(recipe_file, log_file, trial=True, force=grid.force, should_stop=should_stop)
    diverged = any(m.get("event") == NONFINITE for m in run.load_metrics())
    if worker.error and not diverged:
        raise RunError(f"the trial of {candidate.label} at the rate {rate:.2e} failed: {worker.error}")
    # A trial that ended between two polls is judged by the same rule.
    pruned = worker.stopped or diverged or should_stop()
    losses = [m["validation_loss"] for m in run.load_metrics() if m.get("validation_loss") is not None]
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    shutil.rmtree(run.adapter, ignore_errors=True)
    return None if pruned or not losses else min(losses)
