"""One training step of several runs: micro-batches of models that share a base are computed in one packed sequence."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.data.example_types import Batch
from ..core.training.loss import compute_supervised_token_nll
from ..core.training.objective import Objective
from .packed_run_adapters import using_packed_adapters

CONCATENATED = ("input_ids", "position_ids")


def forward_backward_packed_runs(
    models: Sequence[Any],
    micro_batches: Sequence[Sequence[Batch]],
    objectives: Sequence[Objective],
    num_items: Sequence[Any],
    max_tokens: int,
) -> list[Tensor]:
    """Run the forward and backward passes of one optimizer step of each run; return the losses, detached.

    The gradients equal those of `forward_backward` of each run alone, up to rounding. Call it inside
    `using_packed_attention(models[0])`.

    Args:
        models: one for each run, as `packing_runs_unsupported_reason_or_empty` allows; gradients are added to
            those they have.
        micro_batches: of each run, on the device, with layouts.
        objectives: what each run minimizes; they take the loss of tokens.
        num_items: `count_items` of each run's step.
        max_tokens: most tokens of a packed sequence; a longer micro-batch is one of its own.
    """
    totals = [torch.zeros((), device=batches[0]["targets"].device) for batches in micro_batches]
    penalties = [m.regularization_loss() if hasattr(m, "regularization_loss") else None for m in models]
    for run, penalty in enumerate(penalties):
        if penalty is not None:
            penalty.backward()
            totals[run] += penalty.detach()
    for group in _group_micro_batches(micro_batches, max_tokens):
        batches = [batch for _, batch in group]
        joint = _concatenate_batches(batches)
        with using_packed_adapters(models, [(run, batch["input_ids"].shape[1]) for run, batch in group]):
            values = compute_supervised_token_nll(models[0], joint).split([len(batch["targets"]) for batch in batches])
            losses = [
                objectives[run].loss(own, batch, num_items[run])
                for own, (run, batch) in zip(values, group, strict=True)
            ]
            torch.stack(losses).sum().backward()
        for loss, (run, _) in zip(losses, group, strict=True):
            totals[run] += loss.detach()
        joint["layout"].clear_cache()
    return totals


def _concatenate_batches(batches: Sequence[Batch]) -> Batch:
    """Return the packed micro-batch of all rows of packed micro-batches, in their order; no prefix is shared anew."""
    layouts, segments = [batch["layout"] for batch in batches], 0
    lengths: list[int] = []
    parents: list[int] = []
    for layout in layouts:
        lengths += layout.lengths
        parents += [parent + segments if parent >= 0 else -1 for parent in layout.parents]
        segments = len(lengths)
    kept, index, tokens, columns = [], [], 0, 0
    for batch in batches:
        kept.append(batch["logits_to_keep"] + tokens)
        index.append(batch["hidden_index"] + columns)
        tokens, columns = tokens + batch["input_ids"].shape[1], columns + len(batch["logits_to_keep"])
    return {
        **{key: torch.cat([batch[key] for batch in batches], 1) for key in CONCATENATED},
        "layout": replace(layouts[0], lengths=tuple(lengths), parents=tuple(parents), _cache={}),
        "logits_to_keep": torch.cat(kept),
        "hidden_index": torch.cat(index),
        "targets": torch.cat([batch["targets"] for batch in batches]),
    }


def _group_micro_batches(
    micro_batches: Sequence[Sequence[Batch]], max_tokens: int
) -> Iterator[list[tuple[int, Batch]]]:
    """Yield groups of `(run, micro-batch)` that one sequence holds: the first of every run, then the second, ..."""
    group: list[tuple[int, Batch]] = []
    tokens = 0
    for number in range(max(map(len, micro_batches))):
        for run, batches in enumerate(micro_batches):
            if number < len(batches):
                size = batches[number]["input_ids"].shape[1]
                if group and tokens + size > max_tokens:
                    yield group
                    group, tokens = [], 0
                group.append((run, batches[number]))
                tokens += size
    if group:
        yield group
