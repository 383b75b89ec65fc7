"""The training loop: optimizer steps over shuffled rows, with evaluation, checkpoints and early stopping in between.

    step    gradients of all micro-batches ─▶ clip ─▶ optimizer ─▶ method's hook ─▶ learning rate schedule
    then    log ─▶ evaluate ─▶ save (if due, the best so far, or the run stops)

Several processes: each runs this loop over the same rows in the same order and computes its part of each step's
micro-batches (data/step_sharding.py); the gradients are summed before they are clipped. No module is wrapped.
"""

import json
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from ..adapters import state_dict as adapter_files
from ..adapters.architectures import text_config
from ..config.schema import TrainSettings
from ..data.collator import Collator, Example
from ..data.step_sharding import StepSharder
from ..errors import is_out_of_memory
from ..kernels.dropout import preserve_rng_state
from ..run_dir import RunDir
from ..train_step.loss import EVAL_ROWS, batched, forward_backward, mean_loss, move_to_device, score_batch
from ..train_step.optimizer import build_optimizer
from ..utils import distributed
from . import checkpoint
from .oom_recovery import LESS_MEMORY, OomRecovery
from .progress import ProgressLogger

REPEATED_CTRL_C_SECONDS = 2.0
"""A second Ctrl-C within this time is torchrun passing on the first, which the terminal had sent to every process."""


@dataclass
class TrainingState:
    """What a run has done; every checkpoint contains it.

    Args:
        max_steps: optimizer steps of the whole run.
        step: optimizer steps done.
        epoch: passes over the training rows done.
        trained_tokens: tokens of the rows trained on, each row as if it were alone.
        supervised_tokens: how many of them were supervised.
        train_seconds: time in optimizer steps, without evaluations and checkpoints.
        train_cpu_seconds: CPU time of this process in them.
        train_losses: the logged training losses.
        validation_losses: `(step, loss)` of each evaluation.
    """

    max_steps: int
    step: int = 0
    epoch: float = 0.0
    trained_tokens: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second of optimizer steps."""
        return self.trained_tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss, the first of equal ones; None before there is a finite one."""
        finite = [(loss, step) for step, loss in self.validation_losses if math.isfinite(loss)]
        return min(finite)[1] if finite else None

    @property
    def evaluations_since_best(self) -> int:
        """Evaluations after the best one."""
        steps = [step for step, _ in self.validation_losses]
        return len(steps) if self.best_step is None else len(steps) - 1 - steps.index(self.best_step)


class TrainingLoop:
    """Trains an adapted model.

    Args:
        model: the adapted model on its device.
        train: tokenized training rows.
        validation: tokenized validation rows; may be empty.
        settings: the recipe's `train` section.
        collator: divides rows into micro-batches and collates them.
        recovery: repeats what runs out of memory; has the same collator.
        run: the run folder, which gets the checkpoints.
        logger: shows and logs the run.
        resume_from: the checkpoint to continue from; None: from the beginning.

    Attributes:
        state: what was done so far.
        stop_requested: ends the run after the current step, with a checkpoint; set it from a signal handler.
        stopped_early: whether the validation loss stopped improving for as long as the recipe waits.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[Example],
        validation: Sequence[Example],
        settings: TrainSettings,
        collator: Collator,
        recovery: OomRecovery,
        run: RunDir,
        logger: ProgressLogger,
        resume_from: Path | None = None,
    ) -> None:
        self.model, self.train, self.validation, self.settings = model, train, validation, settings
        self.collator, self.recovery, self.run, self.logger = collator, recovery, run, logger
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        self.rows_per_step = settings.batch_size * settings.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(train) / self.rows_per_step)
        self.state = TrainingState(settings.max_steps or math.ceil(settings.epochs * self.steps_per_epoch))
        width = getattr(text_config(model), "hidden_size", 1024)
        self.sharder = StepSharder(collator, width, distributed.world_size(), distributed.rank())
        self.stop_requested = self.stop_agreed = self.stopped_early = False
        self.weights_match_state = True  # false from the beginning of an optimizer step until its end
        self.unlogged_loss = torch.zeros((), device=self.device)
        self.recovery.save_before_exit = self.save_before_exit

        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        if resume_from is not None:  # before the optimizer is built: loading may replace parameters
            self.load_adapter(resume_from)
            checkpoint.load_method_state(resume_from, model)
        for config in model.peft_config.values():
            config.on_train_begin(self.state.max_steps)
        self.optimizer = build_optimizer(
            model, settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scheduler: Any = get_scheduler(
            "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler,
            self.optimizer,
            num_warmup_steps=math.ceil(settings.warmup_ratio * self.state.max_steps),
            num_training_steps=self.state.max_steps,
        )
        if resume_from is not None:
            self.restore_state(resume_from)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run_to_end(self) -> None:
        """Train until all steps are done, the run stops early, or it is asked to stop.

        Raises:
            RunError: memory ran out where the work cannot be repeated; the hint says how to continue.
        """
        self.model.train()
        with self.logger.training(self.state), self.stop_on_interrupt():
            try:
                for rows in self.remaining_steps():
                    values = self.train_step(rows)
                    self.logger.update(self.state, values["learning_rate"])
                    if self.after_step(values):
                        return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                what = "work between two steps" if self.weights_match_state else "the optimizer's step"
                raise self.recovery.give_up("training", self.recovery.describe(error), what) from error

    def remaining_steps(self) -> Iterator[list[Example]]:
        """Yield the rows of each step that is left; each epoch shuffles the rows with `seed + epoch`."""
        while self.state.step < self.state.max_steps and not self.stopped_early:
            epoch, steps_done = divmod(self.state.step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.settings.seed + epoch)
            order = torch.randperm(len(self.train), generator=generator).tolist()
            if steps_done == 0:
                # A PyTorch DataLoader draws its seed here. Drawing it keeps the dropout of seeded runs what it was.
                torch.empty((), dtype=torch.int64).random_()
            for at in range(steps_done * self.rows_per_step, len(order), self.rows_per_step):
                if self.state.step < self.state.max_steps:
                    yield [self.train[i] for i in order[at : at + self.rows_per_step]]

    def train_step(self, rows: Sequence[Example]) -> dict[str, float]:
        """Take one optimizer step; return its gradient norm and learning rate."""
        started, started_cpu = time.perf_counter(), time.process_time()
        state = self.state
        self.recovery.step = state.step
        loss, grad_norm, tokens, targets = self.compute_gradients(rows)
        # A check for a loss or gradient norm of NaN or Inf belongs here, before it reaches the weights.
        self.weights_match_state = False
        self.optimizer.step()
        self.model.update_and_allocate(state.step + 1)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.clear_gradients()
        self.unlogged_loss += loss
        epoch, step_of_epoch = divmod(state.step, self.steps_per_epoch)
        state.step += 1
        state.epoch = epoch + (step_of_epoch + 1) / self.steps_per_epoch
        state.trained_tokens += tokens
        state.supervised_tokens += targets
        self.weights_match_state = True
        state.train_seconds += time.perf_counter() - started
        state.train_cpu_seconds += time.process_time() - started_cpu
        return {"grad_norm": grad_norm.item(), "learning_rate": learning_rate}

    def after_step(self, values: dict[str, float]) -> bool:
        """Log, evaluate and save as far as they are due; return whether the run ends here.

        Args:
            values: what `train_step` returned, for the log.
        """
        settings, step = self.settings, self.state.step
        last = step == self.state.max_steps
        eval_steps = settings.eval_steps or self.steps_per_epoch
        save = last or step % (settings.save_steps or eval_steps) == 0
        if step % settings.logging_steps == 0:
            loss = self.unlogged_loss.item() / settings.logging_steps
            self.unlogged_loss.zero_()
            self.state.train_losses.append(loss)
            self.logger.log(self.state, {"train_loss": loss, **values})
        if self.validation and (last or step % eval_steps == 0):
            self.log_validation_loss()
            save = save or self.state.evaluations_since_best == 0
            self.stopped_early = not last and self.patience_exhausted()
        stop = self.stop_requested if distributed.world_size() == 1 else self.stop_agreed
        if save or stop:
            self.save_checkpoint()
        return stop or self.stopped_early

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def compute_gradients(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor, int, int]:
        """Compute and clip a step's gradients; return its loss, gradient norm, tokens and supervised tokens."""
        alone = distributed.world_size() == 1

        def work() -> tuple[Tensor, Tensor | None, int, int]:
            part = self.sharder(rows)
            micro_batches = [move_to_device(b, self.device) for b in part["micro_batches"]]
            with self.own_dropout_seed(), distributed.translate_peer_errors():
                loss = forward_backward(
                    self.model,
                    micro_batches,
                    num_items=part["targets"],
                    weights=part["weights"],
                    regularize=distributed.is_main_process(),
                )
            # One process can repeat the clipping with the rest; several have exchanged their gradients by then.
            return loss, self.clip_gradients() if alone else None, part["tokens"], part["targets"]

        loss, grad_norm, tokens, targets = self.recovery.run_in_micro_batches(
            "a training step", rows, work, self.clear_gradients
        )
        if not alone:
            total, stops = distributed.all_reduce_sum([loss.item(), float(self.stop_requested)])
            loss, self.stop_agreed = torch.full_like(loss, total), stops > 0
            distributed.sum_gradients(p for p in self.model.parameters() if p.requires_grad)
            grad_norm = self.clip_gradients()
        assert grad_norm is not None
        return loss, grad_norm, tokens, targets

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to the recipe's norm; return their norm before."""
        limit = self.settings.max_grad_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        self.model.zero_grad()

    @contextmanager
    def own_dropout_seed(self) -> Iterator[None]:
        """Seed dropout by run, step and process, if there are several processes.

        Outside the block all processes keep the same random state, so a checkpoint that one of them writes serves all.
        """
        if distributed.world_size() == 1:
            yield
            return
        with preserve_rng_state(self.device):
            # Room for 2 ** 20 steps and 2 ** 12 processes.
            torch.manual_seed((self.settings.seed << 32) + (self.state.step << 12) + distributed.rank())
            yield

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def log_validation_loss(self) -> None:
        """Compute and log the mean loss per supervised token over the validation rows (nats)."""
        self.recovery.step = self.state.step
        loss = mean_loss(self.score_validation_rows())
        self.state.validation_losses.append((self.state.step, loss))
        self.logger.log(self.state, {"validation_loss": loss})

    def score_validation_rows(self) -> list[tuple[float, int]]:
        """Return what `score_rows` returns for the validation rows; each process computes its part of them."""

        def work() -> dict[int, tuple[float, int]]:
            scores: dict[int, tuple[float, int]] = {}
            with distributed.translate_peer_errors():
                for number, some in enumerate(batched(self.validation)):
                    part = score_batch(self.model, some, self.collator, self.sharder.assign_groups(some)[0])
                    scores |= {number * EVAL_ROWS + i: score for i, score in part.items()}
            return scores

        part = self.recovery.run_in_micro_batches("evaluation", self.validation, work, lambda: None, grad=False)
        scores = {i: score for scores in distributed.all_gather_object(part) for i, score in scores.items()}
        return [scores[i] for i in range(len(self.validation))]

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
        self.recovery.retry_once(
            "writing a checkpoint", lambda: checkpoint.write_checkpoint(root, step, self.write_checkpoint_files)
        )
        checkpoint.delete_old_checkpoints(root, self.settings.save_total_limit, self.state.best_step)

    def write_checkpoint_files(self, folder: Path) -> None:
        """Write the files of a checkpoint into its folder."""
        adapter_files.save_adapter(self.model, folder, "default")
        checkpoint.save_method_state(folder, self.model)
        checkpoint.save_optimizer(folder, self.optimizer.state_dict())
        checkpoint.save_rng_state(folder)
        values = {
            **asdict(self.state),
            "unlogged_loss": self.unlogged_loss.item(),
            "scheduler": self.scheduler.state_dict(),
            "max_tokens": self.collator.max_tokens,
            "max_rows": self.collator.max_rows,
            "checkpointing": self.recovery.checkpointing,
        }
        (folder / checkpoint.STATE_FILE).write_text(json.dumps(values))

    def restore_state(self, folder: Path) -> None:
        """Restore everything but the weights from a checkpoint."""
        values = json.loads((folder / checkpoint.STATE_FILE).read_text())
        self.collator.max_tokens, self.collator.max_rows = values.pop("max_tokens"), values.pop("max_rows")
        if values.pop("checkpointing"):
            self.recovery.enable_checkpointing()
        self.scheduler.load_state_dict(values.pop("scheduler"))
        self.unlogged_loss.fill_(values.pop("unlogged_loss"))
        self.state = TrainingState(**{**values, "validation_losses": list(map(tuple, values["validation_losses"]))})
        self.optimizer.load_state_dict(checkpoint.load_optimizer(folder))
        checkpoint.load_rng_state(folder)
        self.stopped_early = self.state.step < self.state.max_steps and self.patience_exhausted()

    def load_adapter(self, folder: Path) -> None:
        """Load the adapter of a checkpoint into the model."""
        tensors, _ = adapter_files.read_adapter_file(folder)
        adapter_files.load_adapter_tensors(self.model, "default", tensors, where=str(folder))

    def save_before_exit(self) -> str:
        """Write a checkpoint if the weights are those of a whole step; return how to continue the run."""
        root, step = self.run.checkpoints, self.state.step
        newest = [checkpoint.checkpoint_step(f) for f in checkpoint.list_checkpoints(root)][-1:]
        if step and newest != [step] and self.weights_match_state and distributed.is_main_process():
            try:
                checkpoint.write_checkpoint(root, step, self.write_checkpoint_files)
                newest = [step]
            except Exception as error:  # no memory, a full disk: the error that ends the run is reported all the same
                self.logger.say(f"no checkpoint of step {step} could be written: {error}")
        if not newest:
            return LESS_MEMORY
        return (
            f"checkpoint-{newest[0]} is complete: free memory, then slimtune train {self.run.recipe_file} --resume; "
            f"or start again with {LESS_MEMORY}"
        )

    # --- signals ------------------------------------------------------------------------------------------------------

    @contextmanager
    def stop_on_interrupt(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run after its step, with a checkpoint, and the second one end it at once."""
        first_time = 0.0

        def handle(signum: int, frame: Any) -> None:
            nonlocal first_time
            if self.stop_requested:
                if distributed.world_size() > 1 and time.monotonic() - first_time < REPEATED_CTRL_C_SECONDS:
                    return
                raise KeyboardInterrupt
            first_time, self.stop_requested = time.monotonic(), True
            self.logger.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

        try:
            previous: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not in the main thread, where signal handlers cannot be set
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
