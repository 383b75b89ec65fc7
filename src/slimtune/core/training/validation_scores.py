"""Scoring rows without gradient in the middle of a run: each process scores a part of them, memory is recovered."""

from collections.abc import Callable, Sequence
from typing import Any

from ..adapters.architectures import get_text_config
from ..data.collator import Collator, Example
from ..data.step_sharding import DataParallelSharder
from ..foundation import distributed
from .oom_recovery import OomRecovery


def make_data_parallel_sharder(model: Any, collator: Collator) -> DataParallelSharder:
    """Return what divides rows over the processes of this run."""
    width = getattr(get_text_config(model), "hidden_size", 1024)
    return DataParallelSharder(collator, width, distributed.world_size(), distributed.rank())


def score_across_processes(
    score_rows: Callable[..., dict[int, list[float]]],
    label: str,
    model: Any,
    rows: Sequence[Example],
    sharder: DataParallelSharder,
    recovery: OomRecovery,
    score_all_here: bool = False,
) -> list[list[float]]:
    """Return the scores of all rows, in their order, in every process.

    Args:
        score_rows: `score_row_logps_by_example_index`, or another function with its arguments.
        label: what is done, for messages about memory.
        model: the model.
        rows: the examples, the same in every process.
        sharder: chooses the part of this process.
        recovery: repeats the work in smaller micro-batches when memory runs out.
        score_all_here: this process scores all rows.
    """

    def work() -> dict[int, list[float]]:
        def group_rows(some: Sequence[Example]) -> list[list[int]]:
            return sharder.collator.group_rows(some) if score_all_here else sharder.assign_groups(some)[0]

        return score_rows(model, rows, sharder.collator, divide_into_micro_batches=group_rows)

    part = recovery.run_in_micro_batches(label, rows, work, lambda: None, grad=False)
    parts = [part] if score_all_here else distributed.all_gather_object(part)
    found = {i: scores for some in parts for i, scores in some.items()}
    return [found[i] for i in range(len(rows))]
