"""The training loop: optimizer steps over shuffled rows, with evaluation, checkpoints and early stopping in between.

    step    gradients of all micro-batches ─▶ clip ─▶ optimizer ─▶ method's hook ─▶ learning rate schedule
                                                └─ NaN or Inf: stop the run, or skip the optimizer
    then    log ─▶ evaluate ─▶ save (if due, the best so far, or the run stops)

Several processes: each runs this loop over the same rows in the same order and computes its part of each step's
micro-batches (core/data/step_sharding.py); the gradients are summed before they are clipped. No module is wrapped.
"""

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import RunError, SlimtuneError, format_names, is_out_of_memory
from ..adapters import adapter_files
from ..adapters.peft_model import find_modules_without_gradient
from ..attention.attention_functions import using_packed_attention
from ..data.collator import Example
from ..foundation import distributed
from ..foundation.files import to_json, translate_os_errors, write_atomic
from ..foundation.registry import Registry
from ..kernels.dropout import preserve_rng_state
from . import checkpoint, nonfinite
from .forgetting_budget import group_row_numbers_by_kind, max_loss_increase
from .loss import forward_backward, load_default_objective, move_batch_to_device, score_examples_by_objective
from .objective import Objective
from .prepared_run import PreparedRun
from .validation_scores import score_across_processes

LOSS_SCALERS: Registry[Any] = Registry("slimtune.loss_scalers", "loss scaler")
"""Functions that compute a step's gradients in float16, from the loop and the rows (extras/loss_scaling.py)."""
THREAD_COUNTS: Registry[Any] = Registry("slimtune.thread_counts", "number of threads")
"""Classes that adapt torch's number of threads after each step on a CPU (extras/thread_count.py)."""
REPEATED_CTRL_C_SECONDS = 2.0
"""A second Ctrl-C within this time is torchrun passing on the first, which the terminal had sent to every process."""
MAX_SKIPPED_IN_A_ROW = 10
"""As many skipped steps in a row, or all steps of a shorter run, end the run: the weights are what is wrong."""


class StepGradientStats(NamedTuple):
    """What a step's forward and backward passes leave beside the gradients themselves, which are clipped."""

    loss: Tensor  # of the step, a scalar
    norm: Tensor  # of the gradients before they were clipped, a scalar
    tokens: int  # of the step's rows
    supervised_tokens: int


class TrainingLoop:
    """Trains a prepared run.

    Args:
        prepared: the run before its first step.
        compute_gradients: computes a step's gradients from its rows in place of the method of that name, such as those
            of several runs at once (experiments/simultaneous_runs.py).

    Attributes:
        state: what was done so far.
        stop_requested: ends the run after the current step, with a checkpoint; set it from a signal handler.
        stop_signal: the signal that asked for it, the highest one that any process got.
        stopped_early: whether the validation loss stopped improving for as long as the recipe waits.
        thread_count: adapts torch's threads to what other processes leave of the cores; None: they stay.
    """

    def __init__(
        self, prepared: PreparedRun, compute_gradients: Callable[[Sequence[Example]], StepGradientStats] | None = None
    ) -> None:
        self.prepared, self.settings = prepared, prepared.settings
        self.run_dir, self.logger = prepared.run, prepared.logger
        self.model, self.objective, self.collator = prepared.model, prepared.objective, prepared.collator
        self.train, self.validation = prepared.data.train, prepared.data.validation
        self.general_rows = prepared.general_rows
        self.has_strength = all(m.has_strength for m in prepared.model.adapter_modules("default").values())
        self.state, self.optimizer, self.scheduler = prepared.state, prepared.optimizer, prepared.scheduler
        self.sharder, self.recovery, self.device = prepared.sharder, prepared.recovery, prepared.device
        self.recovery.save_before_exit = self.save_before_exit
        self.processes = distributed.world_size()
        self.rows_per_step, self.steps_per_epoch = self.settings.rows_per_step, prepared.steps_per_epoch
        self._compute_gradients = compute_gradients
        self.stop_requested = self.stop_agreed = False
        self.stop_signal = 0
        self.stopped_early = self.state.is_out_of_patience(self.settings.early_stopping_patience)
        self.skipped_in_a_row = 0
        self.weights_match_state = True  # false from the beginning of an optimizer step until its end
        self.unlogged_loss = torch.full((), self.state.unlogged_loss, device=self.device)
        self.unlogged_steps = self.state.unlogged_steps
        # A thread that waits for a GPU, or for other processes, says nothing about the cores.
        alone_on_cpu = self.device.type == "cpu" and self.processes == 1
        self.thread_count = THREAD_COUNTS.load("continuous")(self.logger.say) if alone_on_cpu else None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until all steps are done, the run stops early, or a signal asks it to stop."""
        with self.stop_on_signals():
            for _ in self.iterate_steps():
                pass

    def iterate_steps(self) -> Iterator[list[Example]]:
        """Yield the rows of each step, as `run` does; the step is taken when the next one is asked for.

        So several loops of one process can take turns. Signals are theirs to handle.
        """
        self.model.train()
        with using_packed_attention(self.model), self.logger.track_training(self.state):
            if self.thread_count is not None and self.state.threads is not None:
                self.thread_count.start_with(self.state.threads)
            try:
                with translate_os_errors(self.run_dir.path):
                    for rows in self.remaining_steps():
                        yield rows
                        values = self.train_step(rows)
                        self.logger.update(self.state, values["learning_rate"])
                        if self.after_step(values):
                            return
            except Exception as error:
                if distributed.is_main_process() and not self.run_dir.path.is_dir():
                    message = f"the run folder {self.run_dir.path} was moved or deleted while the run trained"
                    raise RunError(message, "the folder until the run has ended", self.save_before_exit()) from error
                if isinstance(error, SlimtuneError) and isinstance(error.__cause__, OSError):  # the disk refused
                    hints = (error.hint, checkpoint.describe_newest_checkpoint(self.run_dir))
                    hint = "; then ".join(filter(None, hints))
                    raise RunError(error.message, error.expected, hint, code=error.code) from error
                if not is_out_of_memory(error):
                    raise
                what = "work between two steps" if self.weights_match_state else "the optimizer's step"
                raise self.recovery.give_up("training", self.recovery.describe(error), what) from error
            finally:
                if self.thread_count is not None:
                    self.thread_count.restore()
                if distributed.is_main_process():
                    self.restore_recipe_file()

    def restore_recipe_file(self) -> None:
        """Write the recipe again if it was deleted while the run trained: nothing can be done with a run without it."""
        file = self.run_dir.recipe_file
        if self.run_dir.path.is_dir() and not file.exists():
            write_atomic(file, self.prepared.recipe.to_yaml())
            self.logger.say(f"{file} was deleted while the run trained; it is written again")

    def remaining_steps(self) -> Iterator[list[Example]]:
        """Yield the rows of each step that is left; each epoch shuffles the rows with `seed + epoch`.

        Documents are cut elsewhere in each epoch.
        """
        while self.state.step < self.state.max_steps and not self.stopped_early:
            epoch, steps_done = divmod(self.state.step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.settings.seed + epoch)
            rows = self.train.for_epoch(epoch)
            order = rows.shuffle(partial(torch.randperm, generator=generator))
            if steps_done == 0:
                # A PyTorch DataLoader draws its seed here. Drawing it keeps the dropout of seeded runs what it was.
                torch.empty((), dtype=torch.int64).random_()
            for at in range(steps_done * self.rows_per_step, len(order), self.rows_per_step):
                if self.state.step < self.state.max_steps:
                    yield [rows[i] for i in order[at : at + self.rows_per_step]]

    def train_step(self, rows: Sequence[Example]) -> dict[str, float]:
        """Take one optimizer step; return its gradient norm and learning rate."""
        started, started_cpu, started_thread = time.perf_counter(), time.process_time(), time.thread_time()
        self.prepared.lock.require_held()
        state = self.state
        self.recovery.step = state.step
        loss, norm, tokens, targets = (self._compute_gradients or self.compute_gradients)(rows)
        if state.step == 0 and (untrained := find_modules_without_gradient(self.model)):
            self.logger.say(
                f"warning: {len(untrained)} adapted modules got no gradient and will not be trained, because the model "
                f"does not call them: {format_names(untrained, 4)}"
            )
        grad_norm = norm.item()  # the step's only wait for a GPU; the loss was computed before
        skip = not (math.isfinite(grad_norm) and math.isfinite(loss.item()))
        if skip:
            self.model.zero_grad()
            self.stop_or_skip(rows, loss.item(), grad_norm)
        self.weights_match_state = False
        if not skip:
            self.optimizer.step()
            self.unlogged_loss += loss
            self.unlogged_steps += 1
        self.model.update_and_allocate(state.step + 1)
        learning_rate = self.scheduler.get_last_lr()[0]
        # torch warns about a schedule that moves before the optimizer, as it does if the first step is skipped.
        with warnings.catch_warnings(action="ignore") if skip else nullcontext():
            self.scheduler.step()
        self.model.zero_grad()
        epoch, step_of_epoch = divmod(state.step, self.steps_per_epoch)
        state.step += 1
        state.epoch = epoch + (step_of_epoch + 1) / self.steps_per_epoch
        state.trained_tokens += 0 if skip else tokens
        state.supervised_tokens += 0 if skip else targets
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        self.weights_match_state = True
        seconds = time.perf_counter() - started
        state.train_seconds += seconds
        state.train_cpu_seconds += time.process_time() - started_cpu
        if self.thread_count is not None:
            share = (time.thread_time() - started_thread) / max(seconds, 1e-9)
            self.thread_count.after_step(tokens, seconds, share)
        return {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def stop_or_skip(self, rows: Sequence[Example], loss: float, grad_norm: float) -> None:
        """Report a step whose loss or gradient is NaN or Inf, with its rows; raise RunError unless it is skipped."""
        what, value = ("gradient", grad_norm) if math.isfinite(loss) else ("loss", loss)
        step, examples = self.state.step + 1, self.objective.prepare_step(rows, self.prepared.score_rows)
        lines = nonfinite.find_nonfinite_lines(self.model, examples, self.collator, self.objective)
        found = nonfinite.describe_nonfinite(f"the {what} of step {step}", value, lines, rows, "training")
        skip = self.settings.on_nonfinite == "skip"
        in_a_row = self.skipped_in_a_row + 1
        too_many = in_a_row >= min(MAX_SKIPPED_IN_A_ROW, self.state.max_steps)
        if too_many and skip:
            found += f"; {in_a_row} steps in a row were like this"
        self.report_nonfinite(found, step, what, lines, rows, skip and not too_many)
        self.state.skipped_steps += 1

    def report_nonfinite(
        self, found: str, step: int, what: str, lines: list[int], rows: Sequence[Example], skip: bool
    ) -> None:
        """Record that something is NaN or Inf, and say it; raise RunError unless it is skipped."""
        facts = {"event": nonfinite.EVENT, "step": step, "what": what, "lines": lines, "skipped": skip, "text": found}
        self.logger.record(facts)
        if skip:
            self.logger.say(f"skipped: {found}")
            return
        single = len(lines) < len(rows)  # otherwise the weights are what is wrong
        hint = f"start again with a learning rate below {self.settings.learning_rate:g}"
        hint += "" if self.state.loss_scale is None else ", or with --dtype float32: float16 ends at 65,504"
        hint += ", or without these rows" if single else ""
        if newest := checkpoint.list_checkpoints(self.run_dir.checkpoints)[-1:]:
            hint += f"; {newest[0].name} is from before"
            if single and self.settings.on_nonfinite == "stop":
                hint += f", and skips such steps with: {self.run_dir.resume_command()} --on-nonfinite skip"
        raise RunError(found, "finite losses and gradients", hint)

    def compute_gradients(self, rows: Sequence[Example]) -> StepGradientStats:
        """Compute and clip a step's gradients; in float16 by a part that chooses the loss scale."""
        if self.state.loss_scale is None:
            return self.compute_gradients_at_loss_scale(rows)
        stats: StepGradientStats = LOSS_SCALERS.load("dynamic")(self, rows)
        return stats

    def compute_gradients_at_loss_scale(self, rows: Sequence[Example]) -> StepGradientStats:
        """Compute and clip a step's gradients; the backward passes multiply the loss by the state's loss scale."""
        rows = self.objective.prepare_step(rows, self.prepared.score_rows)
        alone, num_items = self.processes == 1, self.objective.count_items(rows)

        def work() -> tuple[Tensor, Tensor | None, int, int]:
            part = self.sharder(rows)
            micro_batches = [move_batch_to_device(b, self.device) for b in part["micro_batches"]]
            # Outside of this block several processes keep the same random state, so that the checkpoint that one of
            # them writes serves all. Inside, each has its own dropout, seeded by run, step and process: there is room
            # for 2 ** 20 steps and 2 ** 12 processes.
            with nullcontext() if alone else preserve_rng_state(self.device):
                if not alone:
                    torch.manual_seed((self.settings.seed << 32) + (self.state.step << 12) + distributed.rank())
                loss = forward_backward(
                    self.model,
                    micro_batches,
                    objective=self.objective,
                    num_items=num_items,
                    micro_batch_weights=part["weights"],
                    add_regularization=distributed.is_main_process(),
                    loss_scale=self.state.loss_scale or 1.0,
                )
            # One process can repeat the clipping with the rest; several have exchanged their gradients by then.
            return loss, self.clip_gradients() if alone else None, part["tokens"], part["targets"]

        loss, grad_norm, tokens, targets = self.recovery.run_in_micro_batches(
            "a training step", rows, work, self.model.zero_grad
        )
        if grad_norm is None:
            total, stops = distributed.all_reduce_sum([loss.item(), float(self.stop_requested)])
            loss, self.stop_agreed = torch.full_like(loss, total), stops > 0
            if self.stop_agreed:
                self.stop_signal = max(distributed.all_gather_object(self.stop_signal))
            distributed.sum_gradients(p for p in self.model.parameters() if p.requires_grad)
            grad_norm = self.clip_gradients()
        return StepGradientStats(loss, grad_norm, tokens, targets)

    def clip_gradients(self) -> Tensor:
        """Clip the gradients of the model to the largest norm of the settings; return the norm they had."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.state.loss_scale is not None:
            torch._foreach_div_([p.grad for p in parameters], self.state.loss_scale)
        # Measured before anything clips: `train_step` finds NaN and Inf in it, which clipping by value would hide.
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm or math.inf, norm)
        return norm

    def after_step(self, values: dict[str, float]) -> bool:
        """Log, evaluate and save what is due; return whether the run ends here. `values` are `train_step`'s."""
        settings, step = self.settings, self.state.step
        last = step == self.state.max_steps
        eval_steps = settings.eval_steps or self.steps_per_epoch
        save = last or step % (settings.save_steps or eval_steps) == 0
        if step % settings.logging_steps == 0 and self.unlogged_steps:
            loss = self.unlogged_loss.item() / self.unlogged_steps
            self.unlogged_loss.zero_()
            self.unlogged_steps = 0
            self.state.train_losses.append(loss)
            self.logger.log(self.state, {"train_loss": loss, **values, **self.objective.measure_steps()})
        if self.validation and (last or step % eval_steps == 0):
            self.log_validation_loss()
            save = save or self.state.step in self.state.best_steps
            self.stopped_early = self.state.is_out_of_patience(settings.early_stopping_patience)
        stop = self.stop_requested if self.processes == 1 else self.stop_agreed
        if save or stop:
            self.save_checkpoint()
        return stop or self.stopped_early

    def log_validation_loss(self) -> None:
        """Compute and log the loss over the validation rows, the objective's other measures, and the forgetting."""
        scores, measures = self.measure(self.validation, self.objective)
        loss = measures.pop("loss")
        if self.general_rows and (self.settings.forgetting_budget != "auto" or not self.has_strength):
            measures["forgetting"] = self.measure_forgetting()
            if math.isfinite(measures["forgetting"]):
                self.state.forgetting.append((self.state.step, measures["forgetting"]))
        self.logger.log(self.state, {"validation_loss": loss, **measures})
        if math.isfinite(loss):
            self.state.validation_losses.append((self.state.step, loss))
            return
        lines = nonfinite.select_nonfinite_lines(self.validation, scores)
        what = f"the validation loss after step {self.state.step}"
        found = nonfinite.describe_nonfinite(what, loss, lines, self.validation, "validation")
        skip = self.settings.on_nonfinite == "skip"
        self.report_nonfinite(found, self.state.step, "validation loss", lines, self.validation, skip)

    def measure(
        self, rows: Sequence[Example], objective: Objective, alone: bool = False
    ) -> tuple[dict[int, list[float]], dict[str, float]]:
        """Return an objective's measures of each row, by its number, and of all.

        The processes share the rows, unless this one computes `alone`, as the main process does after the last step.
        """
        self.recovery.step, rows = self.state.step, objective.prepare_evaluation(rows)
        score = partial(score_examples_by_objective, objective=objective)
        scores = score_across_processes(
            score, "evaluation", self.model, rows, self.sharder, self.recovery, score_all_here=alone
        )
        return dict(enumerate(scores)), objective.summarize(np.array(scores))

    def measure_forgetting(self, alone: bool = False) -> float:
        """Return how much the loss on general text is above the base's, in nats per token; of all kinds, the most."""
        if not self.state.general_base_losses:
            with self.model.disable_adapter():
                self.state.general_base_losses = self.measure_general_losses(alone)
        return max_loss_increase(self.measure_general_losses(alone), self.state.general_base_losses)

    def measure_general_losses(self, alone: bool = False) -> dict[str, float]:
        """Return the loss on each kind of general text."""
        objective = load_default_objective()
        scores, _ = self.measure(self.general_rows, objective, alone)
        return {
            kind: objective.summarize(np.array([scores[i] for i in numbers]))["loss"]
            for kind, numbers in group_row_numbers_by_kind(self.general_rows).items()
        }

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, and delete those that are no longer needed."""
        if not distributed.is_main_process():
            return  # there is one checkpoint of a run; the others wait for it in their next step
        root, step = self.run_dir.checkpoints, self.state.step
        self.recovery.step = step
        if root.exists() and not root.is_dir():
            kept = checkpoint.rename_as_damaged_replacing_older(root)
            self.logger.say(f"{root} was replaced by a file, which is now {kept.name}")
        self.recovery.retry_once(
            "writing a checkpoint", lambda: checkpoint.write_checkpoint(root, step, self.write_checkpoint_files)
        )
        checkpoint.delete_old_checkpoints(root, self.settings.save_total_limit, self.state.best_steps)

    def write_checkpoint_files(self, folder: Path) -> None:
        """Write the files of a checkpoint into its folder."""
        adapter_files.save_adapter(self.model, folder, "default")
        checkpoint.save_method_state(folder, self.model)
        checkpoint.save_optimizer(folder, self.optimizer.state_dict())
        checkpoint.save_rng_state(folder)
        self.state.unlogged_loss, self.state.unlogged_steps = self.unlogged_loss.item(), self.unlogged_steps
        self.state.threads = None if self.thread_count is None else torch.get_num_threads()
        values = {
            **asdict(self.state),
            "scheduler": self.scheduler.state_dict(),
            "max_tokens": self.collator.max_tokens,
            "max_rows": self.collator.max_rows,
            "checkpointing": self.recovery.checkpointing,
        }
        (folder / checkpoint.STATE_FILE).write_text(to_json(values))

    def save_before_exit(self) -> str:
        """Write a checkpoint if the weights are those of a whole step; return how to continue, if at all."""
        root, step = self.run_dir.checkpoints, self.state.step
        newest = [checkpoint.parse_checkpoint_step(f) for f in checkpoint.list_checkpoints(root)][-1:]
        if step and newest != [step] and self.weights_match_state and distributed.is_main_process():
            try:
                checkpoint.write_checkpoint(root, step, self.write_checkpoint_files)
            except Exception as error:  # no memory, a full disk: the error that ends the run is reported all the same
                self.logger.say(f"no checkpoint of step {step} could be written: {error}")
        return checkpoint.describe_newest_checkpoint(self.run_dir)

    # --- signals ------------------------------------------------------------------------------------------------------

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and SIGHUP end the run after its step, with a checkpoint, and a second Ctrl-C at once.

        Schedulers and machines that are taken away send SIGTERM, a terminal that closes sends SIGHUP.
        """
        first_time = 0.0

        def handle(signum: int, frame: Any) -> None:
            nonlocal first_time
            if self.stop_requested:
                if signum != signal.SIGINT:
                    return
                if self.processes > 1 and time.monotonic() - first_time < REPEATED_CTRL_C_SECONDS:
                    return
                raise KeyboardInterrupt
            first_time, self.stop_requested, self.stop_signal = time.monotonic(), True, signum
            again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            self.logger.say(f"stopping after this step, with a checkpoint{again}")

        previous: dict[int, Any] = {}
        try:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signum = getattr(signal, name, None)  # Windows has no SIGHUP
                # nohup ignores SIGHUP, and so do its children.
                if signum is not None and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):
                    previous[signum] = signal.signal(signum, handle)
        except ValueError:  # not in the main thread, where signal handlers cannot be set
            pass
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
