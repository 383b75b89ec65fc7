"""The loss and the accuracy of supervised rows, each row by itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.data.collator import Collator
from ..core.data.example_types import Batch, Example
from ..core.kernels.cross_entropy import compute_target_nlls_and_hits
from ..core.training.loss import get_head_and_supervised_hidden_states, score_examples_by_number


class RowScore(NamedTuple):
    """One row: summed −log p of its supervised tokens, how many are the model's likeliest token, and their number."""

    nats: float
    hits: int
    tokens: int


def score_supervised_rows(model: Any, examples: Sequence[Example], collator: Collator) -> list[RowScore]:
    """Return the score of each row, in the order given; arguments as for `score_examples_by_number`."""

    def measure(batch: Batch) -> Tensor:
        values = torch.stack([v.double() for v in _compute_token_nll_and_accuracy(model, batch)])
        rows = values.split(batch["row_targets"], dim=1)
        return torch.stack([torch.stack([*row.sum(1), row.new_tensor(row.shape[1])]) for row in rows])

    scores = score_examples_by_number(model, examples, collator, measure)
    return [RowScore(scores[i][0], int(scores[i][1]), int(scores[i][2])) for i in range(len(examples))]


def _compute_token_nll_and_accuracy(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return `compute_supervised_token_nll` and whether each token is the likeliest, both `(K,)`; has no gradient."""
    head, h = get_head_and_supervised_hidden_states(model, batch)
    if head is None:
        return compute_target_nlls_and_hits(h, lambda logits: logits, batch["targets"], h.shape[-1])
    return head.compute_target_nlls_and_hits(h, batch["targets"])
