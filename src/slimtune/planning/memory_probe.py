"""Run the longest micro-batch once before training, and compare the memory it takes with the plan."""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from ..core.attention.attention_functions import using_packed_attention
from ..core.data.collator import Collator, Example
from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.foundation import distributed
from ..core.foundation.device import count_peak_memory, reset_peak_memory
from ..core.foundation.files import write_json
from ..core.foundation.formatting import format_bytes
from ..core.kernels.dropout import preserve_rng_state
from ..core.training.loss import forward_backward, move_batch_to_device
from ..core.training.prepared_run import MemoryEstimate, PreparedRun, get_planned_reserved_bytes_range
from ..objectives.policy_objective import PolicyObjective
from ..objectives.teacher_objective import TeacherObjective
from .packed_lengths import count_tokens_with_shared_prompt


def probe_memory_and_write_plan(prepared: PreparedRun, plan: MemoryEstimate, resident_at_start: int) -> None:
    """Run the longest micro-batch once; say what memory it takes, and write it with the plan into plan.json.

    The bytes are the most in use at once: reserved by the GPU's allocator, or resident in this process. What the
    process had resident at the start of the run beyond Python and its libraries (a notebook's other model) is no part
    of the run.
    """
    collator, device, limit = prepared.collator, prepared.device, prepared.collator.max_tokens
    rows = pick_longest_rows_for_micro_batch(prepared.data.train, collator, prepared.settings.rows_per_step)
    if isinstance(prepared.objective, PolicyObjective | TeacherObjective):
        rows = prepared.objective.make_longest_examples(rows)
    tokens, used = prepared.recovery.run_in_micro_batches(
        "the longest micro-batch, run before the first step",
        rows,
        lambda: probe_longest_micro_batch_tokens_and_memory(prepared, rows),
        lambda: None,
    )
    others = 0 if device.type == "cuda" else max(0, resident_at_start - int(plan.runtime_bytes.high))
    used -= others
    low, high = get_planned_reserved_bytes_range(plan, device)
    # The first optimizer step creates the optimizer's state, after this. For a micro-batch that is smaller than what
    # was planned the lower bound does not apply.
    low = low - plan.parts["optimizer"] if collator.max_tokens == limit else 0
    line = f"the longest micro-batch, {tokens} tokens, takes {format_bytes(used)}; {format_bytes(low)} to "
    line += f"{format_bytes(high)} were planned"
    # The run may use memory again that others have freed, so that less is counted than it takes.
    as_planned = used <= high and (low <= used or others > 0)
    prepared.logger.say(line if as_planned else f"{line}: the plan is off, please report it with the run's plan.json")
    if distributed.is_main_process():
        probe = {"tokens": tokens, "bytes": used, "low": low, "high": high, "as_planned": as_planned}
        write_json(prepared.run.plan_file, {"plan": plan, "probe": probe})


def pick_longest_rows_for_micro_batch(dataset: TokenizedDataset, collator: Collator, max_rows: int) -> list[Example]:
    """Return rows, no more than a step has, that fill one micro-batch.

    The longest rows together may be divided into micro-batches of half the limit, which other rows of a step exceed.
    So rows are added, the longest first, while one micro-batch holds all. Few sets are tried, because rows are sorted:
    the first one that fits is searched by halves, and how many of those behind it fit, too.
    """
    lengths = dataset.lengths
    if collator.share_prefix:
        lengths = np.array([*map(count_tokens_with_shared_prompt, dataset.example_lengths)])
    order = np.argsort(-lengths, kind="stable").tolist()
    most = min(filter(None, (max_rows, collator.max_rows, len(order))))
    limit = collator.max_tokens or math.inf

    def fits(numbers: list[int]) -> bool:
        return len(numbers) == 1 or collator.count_tokens([dataset[i] for i in numbers]) <= limit

    chosen: list[int] = []
    at = 0
    while len(chosen) < most:
        at = bisect_left(range(len(order)), True, lo=at, key=lambda i: fits([*chosen, order[i]]))
        if at == len(order):
            break
        ends = range(at + 1, min(at + most - len(chosen), len(order)) + 1)
        run = bisect_left(ends, True, key=lambda end: not fits([*chosen, *order[at:end]]))
        chosen += order[at : at + run]
        at += run
    return [dataset[i] for i in chosen]


def probe_longest_micro_batch_tokens_and_memory(prepared: PreparedRun, rows: Sequence[Example]) -> tuple[int, int]:
    """Run the longest micro-batch of some rows, forward and backward; return its tokens and the most bytes in use.

    Nothing is left of it, even if it runs out of memory: gradients are dropped, random number generators are restored,
    no weight changes.
    """
    model, was_training = prepared.model, prepared.model.training
    rows = prepared.objective.prepare_step(rows, prepared.score_rows)
    micro_batch = max(prepared.collator.make_micro_batches(rows), key=lambda batch: batch["input_ids"].numel())
    model.train()
    reset_peak_memory(prepared.device)
    try:
        with preserve_rng_state(prepared.device), using_packed_attention(model):
            forward_backward(
                model,
                [move_batch_to_device(micro_batch, prepared.device)],
                objective=prepared.objective,
                num_items=prepared.objective.count_items(rows),
            )
    finally:
        model.zero_grad()
        model.train(was_training)
    return micro_batch["input_ids"].numel(), count_peak_memory(prepared.device, reserved=True)
