"""What happens beside the steps: when to evaluate and save, what is logged and shown, and Ctrl-C."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback

from ..run_dir import RunDir
from ..utils import distributed
from ..utils.formatting import format_bytes, format_duration
from .memory_probe import peak_bytes
from .trainer import SlimTrainer

ECHO = 2.0
"""Seconds in which a second Ctrl-C is torchrun passing on the first, which the terminal had sent to every process."""


class EvalSaveSchedule(TrainerCallback):
    """Evaluate and save in step, keep the clock, stop early, stop when asked.

    Args:
        eval_steps: steps between evaluations.
        save_steps: steps between checkpoints; None: at each evaluation.
        patience: evaluations without improvement after which the run ends; None: never.
    """

    def __init__(self, eval_steps: int, save_steps: int | None, patience: int | None) -> None:
        self.eval_steps, self.save_steps, self.patience = eval_steps, save_steps, patience
        self.stopped_early = False
        self.trainer: SlimTrainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        self.trainer.step_begins()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the method look at the step's gradients."""
        self.trainer.on_step_end()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what follows this step."""
        self.trainer.step_ends()
        last = state.global_step >= state.max_steps
        control.should_evaluate = bool(self.trainer.validation) and (last or state.global_step % self.eval_steps == 0)
        due = state.global_step % self.save_steps == 0 if self.save_steps else state.global_step % self.eval_steps == 0
        control.should_save = last or due or self.trainer.stopping()
        if self.trainer.stopping():
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Undo what transformers' own flow wants at an epoch's end: the steps above said it."""
        control.should_evaluate = control.should_save = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the best, and stop when it has not improved for long enough."""
        control.should_save = control.should_save or self.trainer.since_best() == 0
        if self.spent():
            self.stopped_early = control.should_training_stop = True

    def spent(self) -> bool:
        """Return whether the validation loss has not improved for as long as the recipe waits."""
        return self.patience is not None and self.trainer.since_best() >= self.patience


class ProgressLogger(TrainerCallback):
    """Write each log line into metrics.jsonl and keep one progress line for people (stderr); of several processes the
    first one does."""

    def __init__(self, run: RunDir, device: torch.device) -> None:
        self.run, self.device = run, device
        self.trainer: SlimTrainer
        console = Console(stderr=True)
        self.speaks = distributed.is_main_process()
        self.live = console.is_terminal and self.speaks
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[line]}"))
        self.progress = Progress(*columns, console=console, transient=True)
        self.loss: float | None = None
        self.began = time.perf_counter()
        self.first_step = 0
        self.last_print = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress line."""
        self.first_step, self.began = state.global_step, time.perf_counter()
        if self.live:
            self.progress.start()
            self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, line="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append the logged values to metrics.jsonl."""
        logs = logs or {}
        if "train_runtime" in logs or not self.speaks:
            return
        named = {
            "loss": "train_loss",
            "eval_loss": "validation_loss",
            "grad_norm": "grad_norm",
            "learning_rate": "learning_rate",
        }
        values = {named[k]: v for k, v in logs.items() if k in named}
        self.loss = logs.get("loss", self.loss)
        trainer = self.trainer
        self.run.append_metrics(
            {
                "step": state.global_step,
                "epoch": state.epoch,
                **values,
                "trained_tokens": trainer.trained_tokens,
                "tokens_per_second": rate(trainer),
                "memory_bytes": memory_now(self.device),
            }
        )
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the progress line; without a terminal, say it now and then."""
        line = self.line(state)
        if self.live:
            self.progress.update(self.task, completed=state.global_step, line=line)
        elif self.speaks and time.perf_counter() - self.last_print > 15:
            self.last_print = time.perf_counter()
            self.say(line)

    def line(self, state: Any) -> str:
        """Return step, loss, learning rate, trained tokens/s, memory and time left, as one line."""
        done = state.global_step - self.first_step
        left = (time.perf_counter() - self.began) / max(1, done) * (state.max_steps - state.global_step)
        loss = f"loss {self.loss:.3f} · " if self.loss is not None else ""
        lr = self.trainer._get_learning_rate()
        return (
            f"step {state.global_step}/{state.max_steps} · {loss}lr {lr:.1e} · {rate(self.trainer):.0f} tok/s · "
            f"{format_bytes(memory_now(self.device))} · {format_duration(left)} left"
        )

    def say(self, text: str) -> None:
        """Tell a person on stderr, and the run's log."""
        if not self.speaks:
            return
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        with self.run.log_file.open("a") as f:
            f.write(time.strftime("%H:%M:%S ") + text + "\n")

    def close(self) -> None:
        """Take the progress line away."""
        if self.live:
            self.progress.stop()


def rate(trainer: SlimTrainer) -> float:
    """Return trained tokens a second, over the training steps alone."""
    return trainer.trained_tokens / trainer.train_seconds if trainer.train_seconds else 0.0


def memory_now(device: torch.device) -> int:
    """Return the bytes in use: the GPU allocator's, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes(device)


@contextmanager
def stop_on_interrupt(pace: EvalSaveSchedule, watch: ProgressLogger) -> Iterator[None]:
    """Let the first Ctrl-C end the run after its step, with a checkpoint; the second one ends it at once."""
    first = 0.0

    def ask(signum: int, frame: Any) -> None:
        nonlocal first
        if pace.trainer.stop_asked:
            if distributed.world_size() > 1 and time.monotonic() - first < ECHO:
                return
            raise KeyboardInterrupt
        first, pace.trainer.stop_asked = time.monotonic(), True
        watch.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread: whoever is there keeps their handler
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
