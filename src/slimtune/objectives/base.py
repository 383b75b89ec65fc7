"""What an objective is made of: its settings, the rows it takes, the loss of a micro-batch, and its measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..adapters.config_fields import check_fields

Batch = Mapping[str, Any]
"""A collated micro-batch (data/collator.py)."""
Example = dict[str, Any]
"""A tokenized example (data/tokenized_dataset.py)."""
ScoreRows = Callable[[Sequence[Example]], Sequence[Sequence[float]]]
"""Returns the summed log p of each row of some examples, without gradient."""


@dataclass
class Objective:
    """An objective; its fields are its settings, each declared with `adapters.config_fields.setting`.

    Attributes:
        name: what `task` in a recipe says; the name of the file.
        summary: what it learns from which rows, in a few words.
        formats: the formats of rows (data/formats.py) that it takes.
        rows_per_example: rows of one example, which lie in one micro-batch: 2 for a pair.
        task_type: PEFT's name of the model that is trained, which decides what `loss` and `score` get for each
            micro-batch: "CAUSAL_LM", −log p of each supervised token [K]; "SEQ_CLS", the head's logits of each row
            [R, classes]; both in fp32 or wider.
        needs_reference: whether examples need `reference`: log p of each row under the model without the adapter.
        learning_rate_factor: what the method's default learning rate is multiplied by.
        measures: names of the columns of `score`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    rows_per_example: ClassVar[int] = 1
    task_type: ClassVar[Literal["CAUSAL_LM", "SEQ_CLS"]] = "CAUSAL_LM"
    needs_reference: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 1.0
    measures: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_mismatched_rows(self) -> bool:
        """Whether training rows need a row with their prompt and another answer (data/mismatched_rows.py)."""
        return False

    def prepare_step(self, examples: Sequence[Example], score_rows: ScoreRows) -> Sequence[Example]:
        """Return the examples of a step as they are trained: as they are, unless overridden.

        Called once for all examples of a step, before its first micro-batch: what the loss needs to know of the whole
        step is added here. `score_rows` scores the rows of all processes.
        """
        return examples

    def count_items(self, examples: Sequence[Example]) -> Any:
        """Return what the loss of a whole step is divided by, from all its examples: their number, unless overridden.

        Every micro-batch of the step gets it, so that the gradient does not depend on the division into micro-batches.
        """
        return len(examples)

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return a micro-batch's share of the step's loss, a scalar.

        Args:
            values: what `task_type` says.
            batch: the micro-batch.
            num_items: what `count_items` returned for the whole step.
        """
        raise NotImplementedError

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the measures of each example of a micro-batch, fp64 [N, measures]; has no gradient."""
        raise NotImplementedError

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return `loss` and further measures of a whole data set from the scores of its examples, fp64 [N, measures].

        The names are TRL's (`rewards/accuracies`). Training keeps the checkpoint with the lowest `loss`.
        """
        raise NotImplementedError


def sum_rows(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of the values of each row's supervised tokens [R]; the rows of an example are neighbours."""
    # index_add_ would add in another order each time on a GPU.
    return torch.stack([part.sum() for part in values.split(batch["row_targets"])])


@dataclass
class PairObjective(Objective):
    """An objective on preference pairs: the first row of an example is the chosen answer, the second the rejected one.

    A subclass gives `pair_losses`. Its rewards are TRL's: what the model prefers is the answer with the higher one.
    """

    formats: ClassVar[tuple[str, ...]] = ("preference",)
    rows_per_example: ClassVar[int] = 2
    learning_rate_factor: ClassVar[float] = 0.1
    measures: ClassVar[tuple[str, ...]] = ("loss", "rewards/chosen", "rewards/rejected")

    def pair_losses(self, logps: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair [N] and the rewards of its two answers [N, 2].

        Args:
            logps: log p of the two answers, summed over their tokens [N, 2].
            tokens: their numbers of tokens [N, 2].
            batch: the micro-batch.
        """
        raise NotImplementedError

    def _losses_and_rewards(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor(batch["row_targets"], dtype=values.dtype, device=values.device)
        return self.pair_losses(-sum_rows(values, batch).view(-1, 2), tokens.view(-1, 2), batch)

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed losses of the micro-batch's pairs, divided by the step's pairs."""
        return self._losses_and_rewards(values, batch)[0].sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the loss and the two rewards of each pair."""
        losses, rewards = self._losses_and_rewards(values.double(), batch)
        return torch.cat([losses[:, None], rewards], dim=1)

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the means, how often the chosen answer has the higher reward, and by how much on average."""
        means = dict(zip(self.measures, scores.mean(axis=0).tolist(), strict=True))
        margins = scores[:, 1] - scores[:, 2]
        return means | {"rewards/accuracies": float((margins > 0).mean()), "rewards/margins": float(margins.mean())}
