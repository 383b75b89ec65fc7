"""What an objective is made of: its settings, the rows it takes, the loss of a micro-batch, and its measures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..adapters.config_fields import DeclaredSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..config.schema import DataSettings, TrainSettings
    from ..data.class_labels import Classes
    from ..data.tokenized_dataset import TokenizedDataset
    from .datasets import Datasets


Batch = Mapping[str, Any]
"""A collated micro-batch (core/data/collator.py)."""
Example = dict[str, Any]
"""A tokenized example (core/data/tokenized_dataset.py)."""
ScoreRows = Callable[[Sequence[Example]], Sequence[Sequence[float]]]
"""Returns the summed log p of each row of some examples, without gradient."""


RANKED_PAIRS = "pairs of a ranked list: all with different scores, or its best answer against its worst"


@dataclass
class Objective(DeclaredSettings):
    """An objective; its fields are its settings, each declared with `adapters.config_fields.setting`.

    Attributes:
        name: what `task` in a recipe says; the name of the file.
        summary: what it learns from which rows, in a few words.
        formats: the formats of rows (extras/row_formats/) that it takes.
        named_formats: further ones, which it takes only if `data.format` names them.
        rows_per_example: rows of one example, which lie in one micro-batch: 2 for a pair.
        task_type: PEFT's name of the model that is trained, which decides what `loss` and `score` get for each
            micro-batch: "CAUSAL_LM", −log p of each supervised token [K]; "SEQ_CLS", the head's logits of each row
            [R, classes]; both in fp32 or wider.
        needs_reference: whether examples need `reference`: log p of each row under the model without the adapter.
        learning_rate_factor: what the method's default learning rate is multiplied by.
        measures: names of the columns of `score`.
    """

    yaml_words: ClassVar[bool] = True
    name: ClassVar[str]
    summary: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    named_formats: ClassVar[tuple[str, ...]] = ()
    rows_per_example: ClassVar[int] = 1
    task_type: ClassVar[Literal["CAUSAL_LM", "SEQ_CLS"]] = "CAUSAL_LM"
    needs_reference: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = 1.0
    measures: ClassVar[tuple[str, ...]]

    @classmethod
    def takes_format(cls, name: str) -> bool:
        """Return whether it takes rows of this format, at least if `data.format` names it."""
        return name in (*cls.formats, *cls.named_formats)

    def list_plan_notes(self) -> Sequence[str]:
        """Return sentences about work that a plan does not count; none, unless overridden."""
        return ()

    # --- rows: called in this order ---------------------------------------------------------------------------------

    def prepare_datasets(self, datasets: Datasets, data: DataSettings) -> Datasets:
        """Return a run's rows as they are learned: each part by `prepare_rows`, unless overridden.

        Called once they are split. A sequence classifier sets `classes`, too.
        """
        train, validation, test = map(self.prepare_rows, (datasets.train, datasets.validation, datasets.test))
        return replace(datasets, train=train, validation=validation, test=test)

    def prepare_rows(
        self, rows: TokenizedDataset, classes: Classes | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return rows to learn or to evaluate with the columns that the loss needs: as they are, unless overridden.

        Args:
            rows: tokenized examples.
            classes: those of a sequence classifier that is evaluated.
            path: the file of the rows, for error messages.
        """
        return rows

    def prepare_training_rows(
        self, rows: TokenizedDataset, settings: TrainSettings, data: DataSettings
    ) -> TokenizedDataset:
        """Return training or validation rows as the steps of a run take them: as they are, unless overridden.

        Called before the log-probabilities of the reference are computed.
        """
        return rows

    # --- steps ------------------------------------------------------------------------------------------------------

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
    import torch

    # index_add_ would add in another order each time on a GPU.
    return torch.stack([part.sum() for part in values.split(batch["row_targets"])])


def list_better_and_worse(scores: Sequence[float] | None) -> list[tuple[int, int]]:
    """Return the numbers of the better and of the worse row of each pair of an example.

    Rows with scores are compared each with each, unless two have the same score; without scores there are two rows.
    """
    if scores is None:
        return [(0, 1)]
    return [(i, j) for i, score in enumerate(scores) for j, other in enumerate(scores) if score > other]


@dataclass
class PairObjective(Objective):
    """An objective on preference pairs: the first row of an example is the chosen answer, the second the rejected one.

    Of a ranked list, all pairs of answers with different scores count alike; their rows are computed once. A subclass
    gives `pair_losses`. Its rewards are TRL's: what the model prefers is the answer with the higher one.
    """

    formats: ClassVar[tuple[str, ...]] = ("preference", "ranked-preference")
    rows_per_example: ClassVar[int] = 2
    learning_rate_factor: ClassVar[float] = 0.1
    measures: ClassVar[tuple[str, ...]] = (
        "pairs",
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
    )

    def pair_losses(self, logps: Tensor, tokens: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair [P] and the rewards of its two answers [P, 2].

        Args:
            logps: log p of the two answers, summed over their tokens [P, 2].
            tokens: their numbers of tokens [P, 2].
            reference: their log p under the reference [P, 2], if the objective needs it.
        """
        raise NotImplementedError

    def prepare_rows(
        self, rows: TokenizedDataset, classes: Classes | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return ranked lists as pairs of their best and worst answer, if the setting `pairs` says so."""
        from ..data.tokenized_dataset import AnswerSubset

        return AnswerSubset(rows, (0, -1)) if getattr(self, "pairs", None) == "best-worst" else rows

    def count_items(self, examples: Sequence[Example]) -> Any:
        """Return the number of pairs."""
        return sum(len(list_better_and_worse(e.get("row_scores"))) for e in examples)

    def _losses_and_rewards(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
        """Return losses and rewards of all pairs, and the number of pairs of each example."""
        import torch

        ends = list(itertools.accumulate(batch["example_rows"]))
        pairs = [
            [(end - rows + i, end - rows + j) for i, j in list_better_and_worse(scores)]
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
        losses, rewards = self.pair_losses(take(-sum_rows(values, batch)), take(tokens), reference)
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
