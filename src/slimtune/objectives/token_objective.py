"""What objectives have in common whose loss is a mean over the learned tokens of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.sequences import IGNORE_INDEX
from ..core.training.objective import Batch, Objective, sum_targets_by_row

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class TokenObjective(Objective):
    """An objective with a value in nats for each learned token, such as −log p; the loss is their mean in a step."""

    measures: ClassVar[tuple[str, ...]] = ("nats", "tokens")

    def count_items(self, examples: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of learned tokens."""
        return sum(label != IGNORE_INDEX for e in examples for label in e["labels"][1:])

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed values of the micro-batch, divided by the step's learned tokens."""
        return values.sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the summed values and the learned tokens of each row."""
        import torch

        tokens = torch.tensor(batch["row_targets"], dtype=torch.float64, device=values.device)
        return torch.stack([sum_targets_by_row(values.double(), batch), tokens], dim=1)

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the mean value of a learned token, in nats."""
        nats, tokens = scores.T.tolist()
        return {"loss": sum(nats) / max(1, sum(tokens))}
