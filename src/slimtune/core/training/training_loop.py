"""The training loop: optimizer steps over shuffled rows, with evaluation, checkpoints and early stopping in between.

    step    gradients of all micro-batches ─▶ clip ─▶ optimizer ─▶ method's hook ─▶ learning rate schedule
                                                └─ NaN or Inf: stop the run, or skip the optimizer
    then    log ─▶ evaluate ─▶ save (if due, the best so far, or the run stops)

Several processes: each runs this loop over the same rows in the same order and computes its part of each step's
micro-batches (core/data/step_sharding.py); the gradients are summed before they are clipped. No module is wrapped.
"""

import json
import math
import random
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from ...errors import RunError, SlimtuneError, format_names, is_out_of_memory
from ..adapters import state_dict as adapter_files
from ..adapters.adapter_strength import AdapterStrength
from ..adapters.peft_model import find_modules_without_gradient
from ..config.schema import TrainSettings
from ..data.collator import Collator, Example
from ..data.general_text import numbers_by_kind
from ..foundation import distributed
from ..foundation.files import to_json, translate_os_errors
from ..kernels.dropout import preserve_rng_state
from . import checkpoint, nonfinite
from .datasets import Datasets
from .forgetting_budget import reduce_strength_to_budget, worst_change
from .loss import count_targets, cross_entropy, forward_backward, move_to_device, score_objective, score_row_logps
from .memory_savings import enable_activation_checkpointing
from .objective import Objective
from .oom_recovery import OomRecovery, failure_check
from .optimizer import build_optimizer
from .progress_logger import ProgressLogger
from .run_dir import RunDir
from .thread_count import ThreadCount
from .validation_scores import build_sharder, score_in_parts

REPEATED_CTRL_C_SECONDS = 2.0
"""A second Ctrl-C within this time is torchrun passing on the first, which the terminal had sent to every process."""
MAX_SKIPPED_IN_A_ROW = 10
"""As many skipped steps in a row, or all steps of a shorter run, end the run: the weights are what is wrong."""


class TrainingLoop:
    """Trains an adapted model.

    Args:
        model: the adapted model on its device.
        data: tokenized rows to train on, and to validate on if there are any.
        settings: the recipe's `train` section.
        objective: what is minimized.
        collator: divides rows into micro-batches and collates them.
        run: the run folder, which gets the checkpoints.
        logger: shows and logs the run.
        resume: continue from the newest undamaged checkpoint; from the beginning if there is none.
        planned_bytes: most bytes that were planned, for messages about memory.
        general_rows: rows of general text to measure forgetting on, if the settings have a budget for it.

    Attributes:
        state: what was done so far.
        stop_requested: ends the run after the current step, with a checkpoint; set it from a signal handler.
        stop_signal: the signal that asked for it, the highest one that any process got.
        together: whether other loops of this process train at the same time (experiments/simultaneous_runs.py).
        computed: what `compute_gradients` returns for the next step, if its gradients were computed with other runs'.
        stopped_early: whether the validation loss stopped improving for as long as the recipe waits.
    """

    def __init__(
        self,
        model: Any,
        data: Datasets,
        settings: TrainSettings,
        objective: Objective,
        collator: Collator,
        run: RunDir,
        logger: ProgressLogger,
        resume: bool = False,
        planned_bytes: int | None = None,
        general_rows: Sequence[Example] = (),
    ) -> None:
        self.model, self.train, self.validation, self.settings = model, data.train, data.validation, settings
        self.objective, self.collator, self.run, self.logger = objective, collator, run, logger
        self.general_rows, self.alone = general_rows, False
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        self.processes = distributed.world_size()
        self.rows_per_step = settings.rows_per_step
        self.steps_per_epoch = math.ceil(len(self.train) / self.rows_per_step)
        max_steps = settings.count_steps(len(self.train))
        self.state = checkpoint.TrainingState(max_steps, forgetting_budget=settings.forgetting_budget)
        self.sharder = build_sharder(model, collator)
        self.stop_requested = self.stop_agreed = self.stopped_early = False
        self.stop_signal = 0
        self.skipped_in_a_row = 0
        # A thread that waits for a GPU, or for other processes, says nothing about the cores.
        alone_on_cpu = self.device.type == "cpu" and self.processes == 1
        self.thread_count = ThreadCount(logger.say) if alone_on_cpu else None
        self.together = False
        self.computed: tuple[Tensor, Tensor, int, int] | None = None
        self.weights_match_state = True  # false from the beginning of an optimizer step until its end
        self.unlogged_loss = torch.zeros((), device=self.device)
        self.unlogged_steps = 0
        can_checkpoint = model.supports_gradient_checkpointing and not settings.gradient_checkpointing
        self.recovery = OomRecovery(
            collator,
            self.device,
            logger,
            enable_checkpointing=(lambda: enable_activation_checkpointing(model)) if can_checkpoint else None,
            planned_bytes=planned_bytes,
            any_failed=failure_check(model),
        )
        self.recovery.save_before_exit = self.save_before_exit

        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        newest = None
        if resume:
            newest = distributed.run_on_main(lambda: checkpoint.find_newest_checkpoint(run.checkpoints, logger.say))
        if newest is not None:  # before the optimizer is built: loading may replace parameters
            self.load_adapter(newest)
            checkpoint.load_method_state(newest, model)
        for config in model.peft_config.values():
            config.on_train_begin(max_steps)
        self.optimizer = build_optimizer(
            model, settings.optimizer, lr=float(settings.learning_rate), weight_decay=settings.weight_decay
        )
        self.scheduler: Any = get_scheduler(
            "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler,
            self.optimizer,
            num_warmup_steps=math.ceil(settings.warmup_ratio * max_steps),
            num_training_steps=max_steps,
        )
        if newest is not None:
            self.restore_state(newest)
            if distributed.is_main_process():  # a kill after the last checkpoint was written left the old ones
                checkpoint.delete_old_checkpoints(run.checkpoints, settings.save_total_limit, self.state.best_steps)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run_steps(self) -> Iterator[list[Example]]:
        """Train until all steps are done, the run stops early, or it is asked to stop; yield the rows of each step.

        A step is taken when the next one is asked for. With `together`, several loops of one process take turns.
        """
        self.model.train()
        with self.logger.track_training(self.state), nullcontext() if self.together else self.stop_on_signals():
            try:
                with translate_os_errors(self.run.path):
                    for rows in self.remaining_steps():
                        yield rows
                        values = self.train_step(rows)
                        self.logger.update(self.state, values["learning_rate"])
                        if self.after_step(values):
                            return
            except Exception as error:
                if distributed.is_main_process() and not self.run.path.is_dir():
                    message = f"the run folder {self.run.path} was moved or deleted while the run trained"
                    raise RunError(message, "the folder until the run has ended", self.save_before_exit()) from error
                if isinstance(error, SlimtuneError) and isinstance(error.__cause__, OSError):  # the disk refused
                    hint = "; then ".join(filter(None, (error.hint, self.describe_resume())))
                    raise RunError(error.message, error.expected, hint) from error
                if not is_out_of_memory(error):
                    raise
                what = "work between two steps" if self.weights_match_state else "the optimizer's step"
                raise self.recovery.give_up("training", self.recovery.describe(error), what) from error
            finally:
                if self.thread_count is not None:
                    self.thread_count.restore()

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
        state = self.state
        self.recovery.step = state.step
        loss, norm, tokens, targets = self.compute_gradients(rows)
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
        if self.thread_count is not None and not self.together:
            share = (time.thread_time() - started_thread) / max(seconds, 1e-9)
            self.thread_count.after_step(tokens, seconds, share)
        return {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def stop_or_skip(self, rows: Sequence[Example], loss: float, grad_norm: float) -> None:
        """Report a step whose loss or gradient is NaN or Inf, with its rows; raise RunError unless it is skipped."""
        what, value = ("gradient", grad_norm) if math.isfinite(loss) else ("loss", loss)
        lines = nonfinite.find_nonfinite_lines(self.model, rows, self.collator, self.objective)
        step = self.state.step + 1
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
        hint += ", or without these rows" if single else ""
        if newest := checkpoint.list_checkpoints(self.run.checkpoints)[-1:]:
            hint += f"; {newest[0].name} is from before"
            if single and self.settings.on_nonfinite == "stop":
                hint += f", and skips such steps with: {self.run.resume_command()} --on-nonfinite skip"
        raise RunError(found, "finite losses and gradients", hint)

    def compute_gradients(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor, int, int]:
        """Compute and clip a step's gradients; return its loss, gradient norm, tokens and supervised tokens."""
        if self.computed is not None:
            computed, self.computed = self.computed, None
            return computed
        rows = self.objective.prepare_step(rows, self.score_rows)
        alone, num_items = self.processes == 1, self.objective.count_items(rows)

        def work() -> tuple[Tensor, Tensor | None, int, int]:
            part = self.sharder(rows)
            micro_batches = [move_to_device(b, self.device) for b in part["micro_batches"]]
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
                    weights=part["weights"],
                    regularize=distributed.is_main_process(),
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
        return loss, grad_norm, tokens, targets

    def clip_gradients(self) -> Tensor:
        """Clip the gradients of the model to the largest norm of the settings; return the norm they had."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm or math.inf)

    def score_rows(self, rows: Sequence[Example]) -> list[list[float]]:
        """Return the summed log p of each row of some examples, computed by all processes without gradient."""
        where = "the forward pass before a training step"
        return score_in_parts(score_row_logps, where, self.model, rows, self.sharder, self.recovery)

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
            self.logger.log(self.state, {"train_loss": loss, **values})
        if self.validation and (last or step % eval_steps == 0):
            self.log_validation_loss()
            save = save or self.state.step in self.state.best_steps
            self.stopped_early = not last and self.patience_exhausted()
        stop = self.stop_requested if self.processes == 1 else self.stop_agreed
        if save or stop:
            self.save_checkpoint()
        return stop or self.stopped_early

    def log_validation_loss(self) -> None:
        """Compute and log the loss over the validation rows, the objective's other measures, and the forgetting."""
        scores, measures = self.measure(self.validation, self.objective)
        loss = measures.pop("loss")
        if self.general_rows:
            measures["forgetting"] = self.measure_forgetting()
            if math.isfinite(measures["forgetting"]):
                self.state.forgetting.append((self.state.step, measures["forgetting"]))
        self.logger.log(self.state, {"validation_loss": loss, **measures})
        if math.isfinite(loss):
            self.state.validation_losses.append((self.state.step, loss))
            return
        lines = nonfinite.nonfinite_lines(self.validation, scores)
        what = f"the validation loss after step {self.state.step}"
        found = nonfinite.describe_nonfinite(what, loss, lines, self.validation, "validation")
        skip = self.settings.on_nonfinite == "skip"
        self.report_nonfinite(found, self.state.step, "validation loss", lines, self.validation, skip)

    def measure(self, rows: Sequence[Example], objective: Objective) -> tuple[dict[int, list[float]], dict[str, float]]:
        """Return an objective's measures of each row, by its number, and of all; the processes share the rows."""
        self.recovery.step = self.state.step
        score = partial(score_objective, objective=objective)
        # After the last step the main process computes alone.
        scores = score_in_parts(score, "evaluation", self.model, rows, self.sharder, self.recovery, alone=self.alone)
        return dict(enumerate(scores)), objective.summarize(np.array(scores))

    def measure_forgetting(self) -> float:
        """Return how much the loss on general text is above the base's, in nats per token; of all kinds, the most."""
        if not self.state.general_base_losses:
            with self.model.disable_adapter():
                self.state.general_base_losses = self.measure_general_losses()
        return worst_change(self.measure_general_losses(), self.state.general_base_losses)

    def measure_general_losses(self) -> dict[str, float]:
        """Return the loss on each kind of general text."""
        objective = cross_entropy()
        scores, _ = self.measure(self.general_rows, objective)
        return {
            kind: objective.summarize(np.array([scores[i] for i in numbers]))["loss"]
            for kind, numbers in numbers_by_kind(self.general_rows).items()
        }

    def patience_exhausted(self) -> bool:
        """Return whether the validation loss has not improved for as long as the recipe waits."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, and delete those that are no longer needed."""
        if not distributed.is_main_process():
            return  # there is one checkpoint of a run; the others wait for it in their next step
        root, step = self.run.checkpoints, self.state.step
        self.recovery.step = step
        if root.exists() and not root.is_dir():
            kept = checkpoint.set_aside(root)
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
        values = {
            **asdict(self.state),
            "unlogged_loss": self.unlogged_loss.item(),
            "unlogged_steps": self.unlogged_steps,
            "scheduler": self.scheduler.state_dict(),
            "max_tokens": self.collator.max_tokens,
            "max_rows": self.collator.max_rows,
            "checkpointing": self.recovery.checkpointing,
        }
        (folder / checkpoint.STATE_FILE).write_text(to_json(values))

    def restore_state(self, folder: Path) -> None:
        """Restore everything but the weights from a checkpoint."""
        values = json.loads((folder / checkpoint.STATE_FILE).read_text())
        self.collator.max_tokens, self.collator.max_rows = values.pop("max_tokens"), values.pop("max_rows")
        if values.pop("checkpointing"):
            self.recovery.enable_checkpointing()
        self.scheduler.load_state_dict(values.pop("scheduler"))
        self.unlogged_loss.fill_(values.pop("unlogged_loss"))
        done = values["step"] % self.settings.logging_steps
        self.unlogged_steps = values.pop("unlogged_steps", done)  # 0.2's first checkpoints lack it
        losses = [(step, loss) for step, loss in values["validation_losses"] if math.isfinite(loss)]
        forgetting = [(step, change) for step, change in values.get("forgetting", ())]
        self.state = checkpoint.TrainingState(**{**values, "validation_losses": losses, "forgetting": forgetting})
        self.optimizer.load_state_dict(checkpoint.load_optimizer(folder))
        checkpoint.load_rng_state(folder)
        self.stopped_early = self.state.step < self.state.max_steps and self.patience_exhausted()

    def load_adapter(self, folder: Path) -> None:
        """Load the adapter of a checkpoint into the model."""
        tensors, _ = adapter_files.read_adapter_file(folder)
        adapter_files.load_adapter_tensors(self.model, "default", tensors, where=str(folder))

    def load_best_adapter(self, ranked: Sequence[tuple[float, int]], loaded: int) -> tuple[int, float | None]:
        """Load the first adapter of `ranked`, `(loss, step)`, that is not lost; return its step and validation loss.

        `loaded` is the step of the adapter that the model has; it stays if all others are lost. A checkpoint that was
        damaged or deleted is named.
        """
        for loss, step in ranked:
            if step == loaded:
                return step, loss
            folder = self.run.checkpoints / f"{checkpoint.PREFIX}{step}"
            if damage := checkpoint.find_damage(folder):
                if (loss, step) == ranked[0]:
                    self.logger.say(f"the adapter of step {step}, with the lowest validation loss, is lost: {damage}")
                continue
            self.load_adapter(folder)
            self.logger.say(f"taking the adapter of step {step}, which has the validation loss {loss:.4f}")
            return step, loss
        return loaded, None

    def keep_best_adapter(self) -> tuple[int, float | None, dict[str, Any] | None]:
        """Load the best adapter; with a forgetting budget make it weaker if it is outside, or take an earlier one.

        Only the main process does this, after the last step. With a budget the better one of two adapters is kept: the
        best of all, weaker, and the best one inside the budget as it is.

        Returns:
            Its step, its validation loss (None: not measured), and what was measured and done about forgetting.
        """
        state, budget = self.state, self.state.forgetting_budget
        step, loss = self.load_best_adapter(state.ranked, state.step)
        if budget is None:
            return step, loss, None
        self.alone, self.recovery.any_failed = True, bool
        known = dict(state.forgetting)
        before = forgetting = known[step] if step in known else self.measure_forgetting()
        strength, tried = 1.0, list[tuple[float, float]]()
        if not before <= budget:  # NaN is outside
            strength, tried = reduce_strength_to_budget(
                AdapterStrength(self.model, "default"), self.measure_forgetting, budget
            )
            forgetting = max((change for s, change in tried if s == strength), default=0.0)
            loss = self.measure(self.validation, self.objective)[1]["loss"] if self.validation else None
            self.logger.say(
                f"the adapter of step {step} forgets {before:.4f} nats per token of a kind of general text, more than "
                f"its budget of {budget:g}: its strength is reduced to {strength:.3f}, "
                f"where it forgets {forgetting:.4f}"
            )
            inside = [(other, at) for other, at in state.ranked_inside_budget if loss is None or not loss <= other]
            if inside and (found := self.load_best_adapter(inside, -1))[0] >= 0:
                (step, loss), strength = found, 1.0
                before = forgetting = known[step]
        return step, loss, {
            "budget": budget,
            "tokens": sum(count_targets(row) for row in self.general_rows),
            "base_losses": state.general_base_losses,
            "measured": [[s, f] for s, f in state.forgetting],
            "before": before,
            "strength": strength,
            "tried": [list(pair) for pair in tried],
            "change": forgetting,
        }  # fmt: skip

    def save_before_exit(self) -> str:
        """Write a checkpoint if the weights are those of a whole step; return how to continue, if at all."""
        root, step = self.run.checkpoints, self.state.step
        newest = [checkpoint.checkpoint_step(f) for f in checkpoint.list_checkpoints(root)][-1:]
        if step and newest != [step] and self.weights_match_state and distributed.is_main_process():
            try:
                checkpoint.write_checkpoint(root, step, self.write_checkpoint_files)
            except Exception as error:  # no memory, a full disk: the error that ends the run is reported all the same
                self.logger.say(f"no checkpoint of step {step} could be written: {error}")
        return self.describe_resume()

    def describe_resume(self) -> str:
        """Name the newest checkpoint and the command that continues from it; "" if there is none."""
        newest = checkpoint.list_checkpoints(self.run.checkpoints)[-1:]
        return f"{newest[0].name} is complete: {self.run.resume_command()}" if newest else ""

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
