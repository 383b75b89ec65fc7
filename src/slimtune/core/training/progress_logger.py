"""What a run shows and logs: a progress line and messages on stderr, train.log, metrics.jsonl, and trackers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ..foundation import distributed
from ..foundation.device import get_allocated_or_resident_bytes
from ..foundation.formatting import escape_control_characters, format_bytes, format_duration
from ..foundation.progress_bars import live_consoles
from ..foundation.registry import Registry
from .checkpoint import TrainingState
from .run_dir import RunDir

PRINT_SECONDS = 15
"""Without a terminal, seconds between printed progress lines."""
TRACKER_NAMES = {
    "train_loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
    "epoch": "train/epoch", "validation_loss": "eval/loss",
}  # fmt: skip
"""The names of logged values at the trackers: those of transformers' Trainer; measures of an objective are `eval/…`."""
TRACKERS: Registry[Any] = Registry("slimtune.trackers", "tracker")
"""Modules that check and start the trackers of a recipe's `report_to` (extras/trackers.py)."""


class ProgressLogger:
    """Shows and logs a run, with the memory in use on `device`; only the main process does it."""

    def __init__(self, run: RunDir, device: torch.device) -> None:
        self.run, self.device = run, device
        self.trackers: Sequence[Any] = ()
        self.enabled = distributed.is_main_process()
        console = Console(stderr=True, highlight=False, markup=False)
        bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # as wide as the line leaves
        self.progress = Progress(bar, TextColumn("{task.fields[line]}"), console=console, transient=True, expand=True)
        self.live = console.is_terminal and self.enabled
        self.log_failed = False
        self.last_loss: float | None = None
        self.last_print = 0.0

    @contextmanager
    def track_training(self, state: TrainingState) -> Iterator[None]:
        """Show the progress line while the block runs; finish the trackers after it."""
        self.started, self.first_step = time.perf_counter(), state.step
        if self.live:
            self.progress.start()
            live_consoles.append(self.progress.console)
            self.task = self.progress.add_task("training", total=state.max_steps, completed=state.step, line="")
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Remove the progress line and finish the trackers."""
        self.progress.stop()
        if self.progress.console in live_consoles:
            live_consoles.remove(self.progress.console)
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = ()

    def say(self, text: str) -> None:
        """Print a line on stderr and append it to the run's log; a log that cannot be written does not end the run."""
        if not self.enabled:
            return
        text = escape_control_characters(text)  # of rows and names, for the terminal and whoever shows the log on one
        screen = self.progress.console  # a terminal gets lines of whole words, a pipe long lines
        screen.print(text, soft_wrap=not screen.is_terminal)
        try:
            with self.run.log_file.open("a") as f:
                f.write(time.strftime("%H:%M:%S ") + text + "\n")
        except OSError as e:
            if not self.log_failed:
                self.log_failed = True
                self.say(f"{self.run.log_file} cannot be written ({e.strerror}): its messages are on the screen alone")

    def log(self, state: TrainingState, values: Mapping[str, float]) -> None:
        """Append a step's values (names as in `TRACKER_NAMES`) to metrics.jsonl and send them to the trackers."""
        self.last_loss = values.get("train_loss", self.last_loss)
        progress = {"step": state.step, "epoch": state.epoch}
        speed = {"trained_tokens": state.trained_tokens, "tokens_per_second": state.tokens_per_second}
        self.record({**progress, **values, **speed, "memory_bytes": get_allocated_or_resident_bytes(self.device)})
        for tracker in self.trackers:
            kind = "train" if "train_loss" in values else "eval"
            named = {TRACKER_NAMES.get(k, f"{kind}/{k}"): v for k, v in {**values, "epoch": state.epoch}.items()}
            tracker.log(named, step=state.step)
        if "validation_loss" in values:
            change = values.get("forgetting")
            forgetting = "" if change is None else f", forgetting {change:+.4f} (budget {state.forgetting_budget:g})"
            self.say(f"step {state.step}: validation loss {values['validation_loss']:.4f}{forgetting}")

    def record(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.enabled:
            self.run.append_metrics(values)

    def update(self, state: TrainingState, learning_rate: float) -> None:
        """Show how far the run is; without a terminal, print it every `PRINT_SECONDS`."""
        seconds_per_step = (time.perf_counter() - self.started) / max(1, state.step - self.first_step)
        loss = f"loss {self.last_loss:.3f} · " if self.last_loss is not None else ""
        done, rate = f"{state.step}/{state.max_steps} · {loss}", f"lr {learning_rate:.1e} · "
        rest = (
            f"{state.tokens_per_second:.0f} tok/s · {format_bytes(get_allocated_or_resident_bytes(self.device))} · "
            f"{format_duration(seconds_per_step * (state.max_steps - state.step))} left"
        )
        if self.live:  # without the learning rate it fits 80 columns, with a bar
            self.progress.update(self.task, completed=state.step, line=done + rest)
        elif self.enabled and time.perf_counter() - self.last_print > PRINT_SECONDS:
            self.last_print = time.perf_counter()
            self.say(f"step {done}{rate}{rest}")
