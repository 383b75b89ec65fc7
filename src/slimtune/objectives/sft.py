"""Supervised fine-tuning: cross-entropy of the answers.

loss = Σ −log p(token) / number of supervised tokens, both over the whole optimizer step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.sequences import IGNORE_INDEX
from ..core.training.objective import Batch, Objective, sum_targets_by_row

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass
class SFT(Objective):
    """Cross-entropy of the supervised tokens, of preference pairs those of the chosen answers; it has no settings."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "answers, by cross-entropy (supervised fine-tuning)"
    formats: ClassVar[tuple[str, ...]] = ("chat", "instruction", "sharegpt", "prompt-completion", "text", "document")
    named_formats: ClassVar[tuple[str, ...]] = ("preference",)
    measures: ClassVar[tuple[str, ...]] = ("nats", "tokens")

    def count_items(self, examples: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of supervised tokens."""
        return sum(label != IGNORE_INDEX for e in examples for label in e["labels"][1:])

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed −log p of the micro-batch, divided by the step's supervised tokens."""
        return values.sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the summed −log p and the supervised tokens of each row."""
        import torch

        tokens = torch.tensor(batch["row_targets"], dtype=torch.float64, device=values.device)
        return torch.stack([sum_targets_by_row(values.double(), batch), tokens], dim=1)

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the mean −log p per supervised token, in nats."""
        nats, tokens = scores.T.tolist()
        return {"loss": sum(nats) / max(1, sum(tokens))}
