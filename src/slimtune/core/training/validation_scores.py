"""Scoring rows without gradient: each process scores a part of them, and memory is recovered.

`score_in_parts` does it in the middle of a run. `add_reference` does it once before the first step, for DPO and KTO: it
computes the log-probabilities of all rows under the reference, which is the model without its adapter, or with the
adapter that training continues from. So training holds one model and runs one forward pass a step. The values are kept
in the run folder, in reference.safetensors (`train` and `validation`, fp64 [examples, rows of an example], NaN where an
example has fewer rows than another), and read again when the run is resumed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ...errors import RunError
from ..adapters.architectures import text_config
from ..data.collator import Collator, Example
from ..data.step_sharding import StepSharder
from ..data.tokenized_dataset import TokenizedDataset
from ..foundation import distributed
from ..foundation.files import translate_os_errors, write_atomic
from .datasets import Datasets
from .loss import score_row_logps
from .oom_recovery import OomRecovery, failure_check
from .run_dir import RunDir


def build_sharder(model: Any, collator: Collator) -> StepSharder:
    """Return what divides rows over the processes of this run."""
    width = getattr(text_config(model), "hidden_size", 1024)
    return StepSharder(collator, width, distributed.world_size(), distributed.rank())


def score_in_parts(
    score: Callable[..., dict[int, list[float]]],
    where: str,
    model: Any,
    rows: Sequence[Example],
    sharder: StepSharder,
    recovery: OomRecovery,
    alone: bool = False,
) -> list[list[float]]:
    """Return the scores of all rows, in their order, in every process.

    Args:
        score: `score_row_logps`, or another function with its arguments.
        where: what is done, for messages about memory.
        model: the model.
        rows: the examples, the same in every process.
        sharder: chooses the part of this process.
        recovery: repeats the work in smaller micro-batches when memory runs out.
        alone: this process scores all rows.
    """

    def work() -> dict[int, list[float]]:
        def group_rows(some: Sequence[Example]) -> list[list[int]]:
            return sharder.collator.group_rows(some) if alone else sharder.assign_groups(some)[0]

        return score(model, rows, sharder.collator, group_rows=group_rows)

    part = recovery.run_in_micro_batches(where, rows, work, lambda: None, grad=False)
    parts = [part] if alone else distributed.all_gather_object(part)
    found = {i: scores for some in parts for i, scores in some.items()}
    return [found[i] for i in range(len(rows))]


def add_reference(run: RunDir, data: Datasets, model: Any, collator: Collator, logger: Any, disable: bool) -> None:
    """Give every training and validation example its `reference`, from the run folder if it is there.

    Args:
        run: the run folder.
        data: the rows; replaced in place by those with a reference.
        model: the adapted model, before training.
        collator: makes the micro-batches; its limits get smaller if memory runs out.
        logger: says what is done.
        disable: whether the reference is the model without its adapter.
    """
    parts = {"train": data.train, "validation": data.validation}
    digests = {name: rows.digest() for name, rows in parts.items()}
    values = _load_reference(run, digests)
    if values is None:
        logger.say("computing the reference log-probabilities of all rows, once")
        with model.disable_adapter() if disable else nullcontext():
            values = {name: _compute_reference(rows, model, collator, logger) for name, rows in parts.items()}
        if distributed.is_main_process():
            write_atomic(run.reference_file, save(values, metadata=digests))
    data.train, data.validation = (rows.with_columns(reference=values[name]) for name, rows in parts.items())


def _compute_reference(rows: TokenizedDataset, model: Any, collator: Collator, logger: Any) -> np.ndarray:
    device = next(p.device for p in model.parameters() if p.requires_grad)
    recovery = OomRecovery(collator, device, logger, any_failed=failure_check(model))
    where = "reference log-probabilities"
    logps = score_in_parts(score_row_logps, where, model, rows, build_sharder(model, collator), recovery)
    values = np.full((len(rows), max(map(len, logps), default=1)), np.nan)
    for row, own in zip(values, logps, strict=True):
        row[: len(own)] = own
    return values


def _load_reference(run: RunDir, digests: dict[str, str]) -> dict[str, np.ndarray] | None:
    """Return the values of the run folder; None if there are none. Raise RunError if they are those of other rows."""
    if not run.reference_file.is_file():
        return None
    with translate_os_errors(run.path), safe_open(run.reference_file, framework="numpy") as file:
        if file.metadata() != digests:
            raise RunError(
                f"{run.reference_file} has the log-probabilities of other rows: the data has changed since",
                "the rows that the run was started with",
                "put the old rows back, or start again with another --out",
            )
        return {name: file.get_tensor(name) for name in digests}
