"""Several runs in one process, on one base: each as if it ran alone.

The runs take turns. Each is trained by the same code as alone (train.py), with its own folder, optimizer, schedule,
evaluations, checkpoints and random numbers; only the gradients of a step are computed for all runs at once, in packed
sequences that hold the rows of several runs (packed_run_losses.py). Where that is not known to be exact, each
run computes its own, and the base is still in memory once.

    run 1  data ─▶ adapter ─▶ ┐                ┌ clip ─▶ optimizer ─▶ log, evaluate, save ─▶ ┐
    run 2  data ─▶ adapter ─▶ ┴ forward/backward ┴ clip ─▶ optimizer ─▶ log, evaluate, save ─▶ ┴ next step …
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.config import Recipe
from ..core.config.schema import ModelSettings
from ..core.data.class_labels import ClassLabels
from ..core.foundation import distributed
from ..core.foundation.device import release_unused_memory
from ..core.kernels.dropout import get_rng_states, set_rng_states
from ..core.models.loader import LoadedBase
from ..core.training.base_model import LoadBase, load_base_model
from ..core.training.finish_run import InterruptedAfterCheckpoint, save_final_results
from ..core.training.loss import move_batch_to_device
from ..core.training.prepare_run import prepare_run
from ..core.training.train import train
from ..core.training.train_result import TrainResult
from ..core.training.training_loop import StepGradientStats, TrainingLoop
from ..errors import SlimtuneError, UsageError, is_out_of_memory
from ..objectives.policy_objective import PolicyObjective
from ..objectives.teacher_objective import TeacherObjective
from .packed_run_adapters import copy_sharing_parameters, packing_runs_unsupported_reason_or_empty
from .packed_run_losses import forward_backward_packed_runs


class RunStoppedOutcome(SlimtuneError):
    """How a run ended that its caller no longer wanted."""


class InterleavedRun:
    """One of several runs: its loop, its random numbers while others have their turn, and how it ended."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.loop: TrainingLoop | None = None
        self.rows: Sequence[Any] = ()  # of the next step; empty once it has ended
        self.gradients: StepGradientStats | None = None  # of the next step, if they were computed with other runs'
        self.outcome: TrainResult | SlimtuneError | InterruptedAfterCheckpoint | None = None
        self._steps: Iterator[Sequence[Any]] = iter(())
        self._rng: Any = None

    def start(self, resume: bool, allow_faulty_rows: bool, load_base: LoadBase) -> None:
        """Prepare the run, in its turn."""
        with self._turn():
            prepared = prepare_run(self.recipe, resume=resume, allow_faulty_rows=allow_faulty_rows, load_base=load_base)
            self.loop = TrainingLoop(prepared, self.take_gradients)
            self.loop.thread_count = None  # the time of a step says nothing while others have their turn
            self._steps = self.loop.iterate_steps()

    def run_to_next_step(self) -> None:
        """Take the step whose rows are known, and read the rows of the next one; finish the run if there is none."""
        with self._turn():
            assert self.loop is not None
            self.rows = next(self._steps, ())
            if not self.rows:
                self.outcome = save_final_results(self.loop)
        if self.outcome is not None:
            self.release()

    def take_gradients(self, rows: Sequence[Any]) -> StepGradientStats:
        """Return the gradients that were computed with other runs', or compute the run's own."""
        assert self.loop is not None
        computed, self.gradients = self.gradients, None
        return self.loop.compute_gradients(rows) if computed is None else computed

    def stop(self) -> None:
        """End the run without a checkpoint."""
        self._steps.close()  # type: ignore[attr-defined]
        self.rows, self.outcome = (), RunStoppedOutcome("the run was stopped")
        self.release()

    def release(self) -> None:
        """Unlock the run folder."""
        if self.loop is not None:
            self.loop.prepared.lock.release()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Use the run's own random numbers in the block; an error that ends the run is its outcome."""
        if self._rng is not None:
            set_rng_states(self._rng[0])
            np.random.set_state(self._rng[1])
            random.setstate(self._rng[2])
        self.rows = ()
        try:
            yield
        except (SlimtuneError, InterruptedAfterCheckpoint) as error:
            self.outcome = error
        except BaseException:
            self.release()
            raise
        device = torch.device("cpu") if self.loop is None else self.loop.device
        self._rng = get_rng_states(device), np.random.get_state(), random.getstate()


def train_recipes_together(
    recipes: Sequence[Recipe],
    *,
    resume: Sequence[bool] = (),
    allow_faulty_rows: bool = False,
    should_stop: Callable[[Recipe], bool] = lambda _: False,
) -> list[TrainResult | SlimtuneError]:
    """Train recipes with one base at the same time; return for each what `train` returns, or the error that ended it.

    A run that fails does not end the others. After Ctrl-C every run has a checkpoint.

    Args:
        recipes: their `model` and `data.chat_template` are the same.
        resume: for each whether to continue it from its newest checkpoint; empty: none.
        allow_faulty_rows: train on data even if its validation finds faults.
        should_stop: called for each run before each of its steps; True ends this run with a `RunStoppedOutcome`.

    Raises:
        UsageError: the bases differ, or there are several processes.
        InterruptedAfterCheckpoint: Ctrl-C.
    """
    if distributed.world_size() > 1:
        raise UsageError("several runs at once train in one process", "no torchrun")
    if len({(str(r.model), str(r.data.chat_template)) for r in recipes}) > 1:
        raise UsageError("runs at once have different bases", "the same model and data.chat_template in all")
    if len(recipes) == 1:
        try:
            return [train(recipes[0], resume=any(resume), allow_faulty_rows=allow_faulty_rows)]
        except SlimtuneError as error:
            return [error]
    load_base, runs = _share_base(), [InterleavedRun(recipe) for recipe in recipes]
    for run, again in zip(runs, resume or [False] * len(runs), strict=True):
        run.start(again, allow_faulty_rows, load_base)
    alive = [run for run in runs if run.loop is not None]
    loops = [run.loop for run in alive if run.loop is not None]
    reason = _find_reason_against_packing(loops) if loops else ""
    if reason and len(loops) > 1:
        loops[0].logger.say(f"the gradients of {len(loops)} runs are computed one after the other: {reason}")
    with loops[0].stop_on_signals() if loops else nullcontext():
        for run in alive:
            run.run_to_next_step()
        while waiting := [run for run in alive if run.rows]:
            for run in waiting:
                if should_stop(run.recipe):
                    run.stop()
            waiting = [run for run in waiting if run.rows]
            if len(waiting) > 1 and not reason:
                reason = _compute_gradients_together(waiting)
            for run in waiting:
                run.run_to_next_step()
                if any(loop.stop_requested for loop in loops):  # every run ends after its step
                    for loop in loops:
                        loop.stop_requested, loop.stop_signal = True, loops[0].stop_signal
    outcomes: list[Any] = [run.outcome for run in runs]
    if interrupted := next((o for o in outcomes if isinstance(o, InterruptedAfterCheckpoint)), None):
        raise interrupted
    return outcomes


def _find_reason_against_packing(loops: Sequence[TrainingLoop]) -> str:
    """Return why the gradients of these runs cannot be computed together exactly, "" if they can."""
    for loop in loops:
        if not loop.collator.with_packed_layout:
            return "the base cannot run packed rows with a layout"
        if loop.state.loss_scale is not None:
            return "in float16 each run chooses its own loss scale"
        if loop.objective.task_type != "CAUSAL_LM" or isinstance(loop.objective, PolicyObjective | TeacherObjective):
            return "the objective of a run needs more than the loss of tokens"
        for name in ("compile", "mlp_tile_size", "gradient_checkpointing"):
            if getattr(loop.settings, name):
                return f"train.{name} is {getattr(loop.settings, name)}"
        if loop.recovery.checkpointing:
            return "activations are checkpointed since memory ran out"
    return packing_runs_unsupported_reason_or_empty([loop.model for loop in loops])


def _compute_gradients_together(runs: Sequence[InterleavedRun]) -> str:
    """Compute and clip the gradients of the next step of each run, for its loop to take.

    Returns why the runs must compute their own from now on, "" if they need not: memory ran out, or a layer of the base
    does not get every token. Then nothing is left of the try.
    """
    loops = [run.loop for run in runs if run.loop is not None]
    started, started_cpu = time.perf_counter(), time.process_time()
    reason = ""
    try:
        prepared = [
            loop.objective.prepare_step(run.rows, loop.prepared.score_rows)
            for run, loop in zip(runs, loops, strict=True)
        ]
        parts = [loop.sharder(rows) for rows, loop in zip(prepared, loops, strict=True)]
        losses = forward_backward_packed_runs(
            [loop.model for loop in loops],
            [[move_batch_to_device(batch, loops[0].device) for batch in part["micro_batches"]] for part in parts],
            [loop.objective for loop in loops],
            [loop.objective.count_items(rows) for rows, loop in zip(prepared, loops, strict=True)],
            max(loop.collator.max_tokens or 0 for loop in loops),
        )
    except SlimtuneError as error:
        reason = error.message
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = "memory ran out"
    if reason:
        for loop in loops:
            loop.model.zero_grad()
        release_unused_memory(loops[0].device)
        loops[0].logger.say(f"the runs compute their gradients one after the other from now on: {reason}")
        return reason
    for run, loop, part, loss in zip(runs, loops, parts, losses, strict=True):
        run.gradients = StepGradientStats(loss, loop.clip_gradients(), part["tokens"], part["targets"])
        # The loop counts the rest of its step itself.
        loop.state.train_seconds += (time.perf_counter() - started) / len(loops)
        loop.state.train_cpu_seconds += (time.process_time() - started_cpu) / len(loops)
    return ""


def _share_base() -> LoadBase:
    """Return a function that loads the base of the first run and gives each run a copy with the same parameters."""
    loaded: list[LoadedBase] = []

    def load_base(model: ModelSettings, chat_template: Path | None, classes: ClassLabels | None = None) -> LoadedBase:
        if classes is not None:  # its head is the run's own
            return load_base_model(model, chat_template, classes)
        if not loaded:
            loaded.append(load_base_model(model, chat_template, None))
        return dataclasses.replace(loaded[0], model=copy_sharing_parameters(loaded[0].model))

    return load_base
