"""A run before its first step: what `prepare` puts together (train.py), and the loop trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from ..config import Recipe
from ..config.schema import TrainSettings
from ..data.collator import Collator, Example
from ..data.step_sharding import DataParallelSharder
from ..models.loader import LoadedBase
from .checkpoint import TrainingState
from .datasets import RunDatasets
from .fingerprint_checks import TrainingFingerprint
from .loss import score_row_logps_by_example_index
from .memory_savings import enable_activation_checkpointing
from .objective import Objective
from .oom_recovery import OomRecovery, make_peer_failure_check
from .progress_logger import ProgressLogger
from .run_dir import RunDir, RunLock
from .validation_scores import make_data_parallel_sharder, score_across_processes


class BytesRange(Protocol):
    """A number of bytes between two ends."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


class MemoryEstimate(Protocol):
    """What training takes from a plan, a dataclass: its memory on this device (planning/plan_result.py)."""

    @property
    def max_tokens_per_micro_batch(self) -> int:
        """Most tokens of a micro-batch that fit."""

    @property
    def need_bytes(self) -> BytesRange:
        """What the device needs, its runtime included."""

    @property
    def runtime_bytes(self) -> BytesRange:
        """What the device's runtime takes beside the allocator."""

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by part, such as "optimizer", at the highest point of a step."""


@dataclass
class PreparedRun:
    """A run before its first step. As a context manager it gives back the lock of the run folder.

    Attributes:
        recipe: with the learning rate of the run.
        run: its folder.
        lock: of the folder; held.
        logger: shows and logs the run.
        data: tokenized rows to train on, and to validate on if there are any.
        base: the loaded base, its tokenizer and its source.
        model: the adapted model on its device.
        objective: what is minimized.
        collator: divides rows into micro-batches and collates them.
        plan: the estimate of the run's memory, if it was planned.
        general_rows: rows of general text to measure forgetting on, if the settings have a budget for it.
        loading_peak: most bytes in use until the adapter was attached.
        init_adapter: the adapter that the run started from, if there is one.
        fingerprint: what the run is trained on.
        start_seconds: time until the first step.
        state: what is done already; more than nothing if the run is resumed.
        optimizer, scheduler: set by `initialize_or_resume_run_in_place` (resuming.py).
    """

    recipe: Recipe
    run: RunDir
    lock: RunLock
    logger: ProgressLogger
    data: RunDatasets
    base: LoadedBase
    model: Any
    objective: Objective
    collator: Collator
    plan: MemoryEstimate | None
    general_rows: Sequence[Example]
    loading_peak: int
    init_adapter: Path | None
    fingerprint: TrainingFingerprint
    start_seconds: float = 0.0
    state: TrainingState = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    scheduler: Any = field(init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.lock.release()

    @property
    def settings(self) -> TrainSettings:
        """The recipe's `train` section."""
        return self.recipe.train

    @property
    def device(self) -> torch.device:
        """The device of the adapter."""
        return next(p.device for p in self.model.parameters() if p.requires_grad)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a pass over the training rows."""
        return math.ceil(len(self.data.train) / self.settings.rows_per_step)

    @cached_property
    def sharder(self) -> DataParallelSharder:
        """What divides the rows of a step over the processes."""
        return make_data_parallel_sharder(self.model, self.collator)

    @cached_property
    def recovery(self) -> OomRecovery:
        """What repeats work that ran out of memory."""
        can_checkpoint = self.model.supports_gradient_checkpointing and not self.settings.gradient_checkpointing
        return OomRecovery(
            self.collator,
            self.device,
            self.logger,
            enable_checkpointing=(lambda: enable_activation_checkpointing(self.model)) if can_checkpoint else None,
            planned_bytes=None if self.plan is None else get_planned_reserved_bytes_range(self.plan, self.device)[1],
            any_failed=make_peer_failure_check(self.model),
        )

    def score_rows(self, rows: Sequence[Example]) -> list[list[float]]:
        """Return the summed log p of each row of some examples, computed by all processes without gradient."""
        where = "the forward pass before a training step"
        return score_across_processes(
            score_row_logps_by_example_index, where, self.model, rows, self.sharder, self.recovery
        )


def get_planned_reserved_bytes_range(plan: MemoryEstimate, device: torch.device) -> tuple[int, int]:
    """Return the fewest and most planned bytes, as `count_peak_memory(reserved=True)` counts them."""
    need, runtime = plan.need_bytes, plan.runtime_bytes
    if device.type != "cuda":
        return int(need.low), int(need.high)
    return int(need.low - runtime.low), int(need.high - runtime.high)  # the runtime is outside of the allocator
