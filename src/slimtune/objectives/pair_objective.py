"""What objectives on preference pairs and ranked lists have in common: their rows, and losses of pairs of rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.training.objective import Batch, Example, Objective, sum_targets_by_row

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.data.class_labels import ClassLabels
    from ..core.data.tokenized_dataset import TokenizedDataset
    from ..core.training.prepared_run import PreparedRun

RANKED_PAIRS = "pairs of a ranked list: all with different scores, or its best answer against its worst"


def list_preference_pair_indices(row_scores: Sequence[float] | None) -> list[tuple[int, int]]:
    """Return the numbers of the better and of the worse row of each pair of an example.

    Rows with scores are compared each with each, unless two have the same score; without scores there are two rows.
    """
    if row_scores is None:
        return [(0, 1)]
    return [(i, j) for i, score in enumerate(row_scores) for j, other in enumerate(row_scores) if score > other]


@dataclass
class PairObjective(Objective):
    """An objective on preference pairs: the first row of an example is the chosen answer, the second the rejected one.

    Of a ranked list, all pairs of answers with different scores count alike; their rows are computed once. A subclass
    gives `pair_losses`. Its rewards are TRL's: what the model prefers is the answer with the higher one.

    Attributes:
        needs_reference: whether examples need `reference`: log p of each row under the model without the adapter.
    """

    formats: ClassVar[tuple[str, ...]] = ("preference", "ranked-preference")
    rows_per_example: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 0.3
    measures: ClassVar[tuple[str, ...]] = (
        "pairs",
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
    )

    def pair_losses(self, logps: Tensor, tokens: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair [P] and the rewards of its two answers [P, 2].

        The mean of the losses is what a run reports of held-out pairs, and, unless `loss` and `count_items` are
        overridden, what a step learns. They are for a loss with a part that is a mean over tokens (`orpo.py`).

        Args:
            logps: log p of the two answers, summed over their tokens [P, 2].
            tokens: their numbers of tokens [P, 2].
            reference: their log p under the reference [P, 2], if the objective needs it.
        """
        raise NotImplementedError

    def prepare_rows(
        self, rows: TokenizedDataset, classes: ClassLabels | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return ranked lists as pairs of their best and worst answer, if the setting `pairs` says so."""
        from ..core.data.tokenized_dataset import RankedAnswerSelection

        return RankedAnswerSelection(rows, (0, -1)) if getattr(self, "pairs", None) == "best-worst" else rows

    def prepare_run(self, prepared: PreparedRun) -> None:
        if self.needs_reference:
            from .reference_logps import add_reference_logps

            add_reference_logps(prepared)

    def count_items(self, examples: Sequence[Example]) -> Any:
        """Return the number of pairs."""
        return sum(len(list_preference_pair_indices(e.get("row_scores"))) for e in examples)

    def _losses_and_rewards(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
        """Return losses and rewards of all pairs, and the number of pairs of each example."""
        import torch

        ends = list(itertools.accumulate(batch["example_rows"]))
        pairs = [
            [(end - rows + i, end - rows + j) for i, j in list_preference_pair_indices(scores)]
            for end, rows, scores in zip(ends, batch["example_rows"], batch["row_scores"], strict=True)
        ]
        numbers = [row for some in pairs for pair in some for row in pair]

        def take(rows: Tensor) -> Tensor:
            # Indexing would add gradients in another order each time on a GPU.
            each = rows.unbind()
            return torch.stack([each[i] for i in numbers]).view(-1, 2)

        reference = None
        if self.needs_reference:
            parts = zip(batch["reference"], batch["example_rows"], strict=True)
            reference = take(torch.cat([logps[:rows] for logps, rows in parts]).to(values.dtype))
        tokens = torch.tensor(batch["row_targets"], dtype=values.dtype, device=values.device)
        losses, rewards = self.pair_losses(take(-sum_targets_by_row(values, batch)), take(tokens), reference)
        return losses, rewards, [*map(len, pairs)]

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed losses of the micro-batch's pairs, divided by the step's pairs."""
        return self._losses_and_rewards(values, batch)[0].sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the number of pairs of each example, and the sums of their measures."""
        import torch

        losses, rewards, counts = self._losses_and_rewards(values.double(), batch)
        wins = (rewards[:, :1] > rewards[:, 1:]).double()
        pairs = torch.cat([torch.ones_like(wins), losses[:, None], rewards, wins], dim=1)
        return torch.stack([part.sum(0) for part in pairs.split(counts)])

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the means, how often the chosen answer has the higher reward, and by how much on average."""
        pairs, *sums = scores.sum(axis=0).tolist()
        means = {name: total / pairs for name, total in zip(self.measures[1:], sums, strict=True)}
        return means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
