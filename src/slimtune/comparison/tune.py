"""A learning rate for each method, searched as hard for one as for the other.

Every entry gets as many trials (Optuna's TPE), each of half a cell's steps, in the same range around its own default
rate: default / 10 to default × 10 on a logarithmic scale, the default itself first. What counts is the lowest loss on
the validation rows; the test rows are not looked at. A trial whose validation loss at a third or two thirds of its
steps is above the median of those before it is ended there.

Each trial's draw hangs on the trials before it and its number alone, so a search that was killed goes on as if it had
not been.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..errors import RunError
from ..run_dir import RunDir, write_atomic
from .candidates import Candidate
from .grid import TRIAL, Grid
from .launch import launch

FACTOR = 10.0
"""A rate is looked for from the default divided by this to the default times this."""
LOOKS = 3
"""How often a trial is validated; the last time is its end."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def search(grid: Grid, entry: Candidate, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the best rate found for an entry, and every trial.

    Args:
        grid: the comparison.
        entry: its `rate` is the middle of the range.
        say: told how each trial ended.

    Returns:
        `rate`; `at_the_edge`: it lies within a tenth of the range from an end; `trials`: `rate`, `loss` (the lowest
        validation loss, None: pruned or no number), `pruned`.

    Raises:
        RunError: a trial failed, or none gave a loss.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    low, high = entry.rate / FACTOR, entry.rate * FACTOR
    folder = grid.out / "tune" / entry.label
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(grid.out / "tune" / "trials.journal"))),
        study_name=entry.label,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0),
        load_if_exists=True,
    )
    if not study.trials:
        study.enqueue_trial({"rate": entry.rate})
    for left in study.get_trials(states=[TrialState.RUNNING]):  # killed: the same rate is tried again
        study.tell(left.number, state=TrialState.FAIL)
        study.enqueue_trial(left.params)
    while (number := len(study.get_trials(states=DONE))) < grid.trials:
        study.sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=min(5, max(2, grid.trials // 2)))
        trial = study.ask({"rate": optuna.distributions.FloatDistribution(low, high, log=True)})
        loss = _try(grid, entry, trial, folder)
        study.tell(trial, loss, state=TrialState.PRUNED if loss is None else TrialState.COMPLETE)
        said = "ended early" if loss is None else f"validation loss {loss:.4f}"
        say(f"{entry.label}: rate {trial.params['rate']:.2e}, {said} ({number + 1} of {grid.trials})")
    whole = study.get_trials(states=[TrialState.COMPLETE])
    if not whole:
        raise RunError(f"no learning rate of {low:.1e} to {high:.1e} gave a loss", "one that learns")
    best = min(whole, key=lambda t: (t.value, t.number)).params["rate"]
    return {
        "rate": best,
        "at_the_edge": abs(math.log(best / entry.rate)) > 0.8 * math.log(FACTOR),
        "trials": [
            {"rate": t.params["rate"], "loss": t.value if t.state is TrialState.COMPLETE else None,
             "pruned": t.state is TrialState.PRUNED}
            for t in study.get_trials(states=DONE)
        ],
    }  # fmt: skip


def _try(grid: Grid, entry: Candidate, trial: optuna.Trial, folder: Path) -> float | None:
    """Run one trial; return its lowest validation loss, None where it was ended early or diverged."""
    rate, steps = trial.params["rate"], max(1, math.ceil(TRIAL * grid.steps))
    out = folder / f"{rate:.6e}"
    every = max(1, math.ceil(steps / LOOKS))
    how = {"learning_rate": rate, "max_steps": steps, "eval_steps": every, "save_steps": steps}
    recipe = grid.recipe(entry, grid.seeds[0], out, **how)
    file = folder / f"{out.name}.yaml"
    write_atomic(file, grid.text(recipe, entry))
    run, seen = RunDir(out), 0

    def stop() -> bool:
        nonlocal seen
        found = [m for m in run.load_metrics() if "validation_loss" in m]
        for m in found[seen:]:
            seen += 1
            if m["step"] >= steps:
                break
            if m["validation_loss"] is None or not math.isfinite(m["validation_loss"]):
                return True
            trial.report(m["validation_loss"], m["step"])
            if trial.should_prune():
                return True
        return False

    ended = launch(file, folder / f"{out.name}.log", full=entry.is_full, trial=True, force=grid.force, stop=stop)
    if ended.fault:
        raise RunError(f"the trial of {entry.label} at the rate {rate:.2e} failed: {ended.fault}")
    # Where it ran to its end between two looks, it is judged by the same rule.
    early = ended.stopped or stop()
    losses = [m["validation_loss"] for m in run.load_metrics() if m.get("validation_loss") is not None]
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    shutil.rmtree(out / "model", ignore_errors=True)
    return None if early or not losses else min(losses)
