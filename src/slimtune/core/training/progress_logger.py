"""What a run shows and logs: a progress line and messages on stderr, train.log, metrics.jsonl, and trackers."""

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ...errors import UsageError, format_names
from ..config import Recipe
from ..foundation import distributed
from ..foundation.device import get_allocated_or_resident_bytes
from ..foundation.formatting import escape_control_characters, format_bytes, format_duration
from ..foundation.progress_bars import live_consoles
from .checkpoint import TrainingState
from .run_dir import RunDir

PRINT_SECONDS = 15
"""Without a terminal, seconds between printed progress lines."""
TRACKER_NAMES = {
    "train_loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
    "epoch": "train/epoch", "validation_loss": "eval/loss",
}  # fmt: skip
"""The names of logged values at the trackers: those of transformers' Trainer; measures of an objective are `eval/…`."""
PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME", "clearml": "CLEARML_PROJECT",
    "swanlab": "SWANLAB_PROJECT",
}  # fmt: skip
"""The environment variables that name a tracker's project."""


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


@distributed.raises_on_all_ranks
def require_installed_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if the package of a tracker is not installed; each is named like its package."""
    alternatives = {"tensorboard": ("tensorboard", "tensorboardX")}
    missing = [n for n in names if not any(map(importlib.util.find_spec, alternatives.get(n, (n,))))]
    if missing:
        raise UsageError(
            f"train.report_to names {format_names(missing)}, and the package is not installed",
            "trackers that are installed, or none",
            f"pip install {' '.join(missing)}, or --set train.report_to=[]",
        )


def start_trackers(recipe: Recipe, run: RunDir) -> list[Any]:
    """Start accelerate's trackers for the recipe's `report_to`, in the main process.

    The project is "slimtune", or what `PROJECT_VARIABLES` say. TensorBoard's files go to the run folder, or where
    TENSORBOARD_LOGGING_DIR says.
    """
    trackers: list[Any] = []
    for name in recipe.train.report_to if distributed.is_main_process() else ():
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = tracker_class("", os.environ.get("TENSORBOARD_LOGGING_DIR", run.tensorboard))
        else:
            tracker = tracker_class(os.environ.get(PROJECT_VARIABLES.get(name, ""), "slimtune"))
        tracker.start()
        tracker.store_init_configuration(_flatten(recipe.to_dict()))
        trackers.append(tracker)
    return trackers


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings as `{"train.epochs": 3.0}`, other values than numbers and texts as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
