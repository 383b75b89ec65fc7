"""Evaluation of reward models: how often the chosen answer has the higher reward. The baseline is chance."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..train_step.loss import score_objective
from .base import Evaluation, RowFigures
from .classification import describe_accuracy, list_reasons_not_better
from .statistics import make_fields


class RewardEvaluation(Evaluation):
    """Compares the rewards of the two answers of each pair."""

    def measure(self) -> tuple[dict[str, Any], RowFigures]:
        scores = score_objective(self.model, self.examples, self.collator, self.objective)
        losses, chosen, rejected = np.array([scores[i] for i in range(len(self.examples))]).T
        accuracy = self.compare(chosen > rejected, np.full(len(chosen), 0.5))
        margin = self.compare(chosen, rejected)
        result = describe_accuracy(self, losses, accuracy, "chance") | {
            **make_fields(margin=margin.difference),
            "chosen_reward": margin.first.value,
            "rejected_reward": margin.second.value,
        }
        figures = [
            {"line": line, "chosen": float(c), "rejected": float(r)}
            for line, c, r in zip(self.examples.lines, chosen, rejected, strict=True)
        ]
        return result, figures

    @staticmethod
    def list_reasons_not_passed(result: Mapping[str, Any]) -> list[str]:
        return list_reasons_not_better(result, "chance")
