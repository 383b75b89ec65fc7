"""Classifiers (accuracy, macro-F1, the confusion table) and reward models (accuracy on pairs) against a baseline.

A new head has learned nothing in the base, so the tuned model is not compared with it: a classifier has to beat the
most frequent class of the evaluated rows, a reward model chance.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.training.loss import compute_row_logits, score_examples_by_number, score_examples_by_objective
from ..objectives.classification import compute_weighted_label_losses
from .eval_result import (
    BaselineComparisonMeasures,
    ClassificationEvalResult,
    ClassificationMeasures,
    ClassScore,
    RewardEvalResult,
    RewardModelMeasures,
)
from .model_comparison import ModelComparison, RowFigures
from .statistics import PairedEstimate, compute_f1, estimate_macro_f1_with_interval


class ClassifierEvaluator(ModelComparison[ClassificationMeasures]):
    """Compares the predicted classes of rows with `label` (see `Classification`)."""

    result_type = ClassificationEvalResult

    def measure(self) -> tuple[ClassificationMeasures, RowFigures]:
        assert self.classes is not None
        names, multi_label = self.classes.names, self.classes.multi_label
        scores = score_examples_by_number(self.model, self.examples, self.collator, partial(_score_classes, self.model))
        values = np.array([scores[i] for i in range(len(self.examples))])
        logits, losses = values[:, :-1], values[:, -1]
        labels = np.array([e["label"] for e in self.examples])
        one_hot = np.eye(len(names), dtype=np.int64)
        actual = labels if multi_label else one_hot[labels]
        predicted = (logits > 0).astype(np.int64) if multi_label else one_hot[logits.argmax(1)]
        sets, frequency = np.unique(actual, axis=0, return_counts=True)
        frequent = sets[frequency.argmax()]
        accuracy = self.compare((actual == predicted).all(1), (actual == frequent).all(1))
        by_group = [np.zeros((self.groups.max() + 1, len(names)), np.int64) for _ in range(3)]
        for total, each in zip(by_group, (actual * predicted, actual, predicted), strict=True):
            np.add.at(total, self.groups, each)
        f1 = estimate_macro_f1_with_interval(*by_group, draws=self.draws, seed=self.seed)
        hits, positives, chosen = (total.sum(0) for total in by_group)

        def name_set(row: np.ndarray) -> str:
            return ", ".join(name for name, is_one in zip(names, row, strict=True) if is_one) or "none"

        measures = ClassificationMeasures(
            **vars(_measure_against_baseline(self, losses, accuracy, name_set(frequent))),
            macro_f1=f1,
            classes=[
                ClassScore(
                    name=name,
                    rows=int(positives[i]),
                    precision=float(hits[i] / chosen[i]) if chosen[i] else 0.0,
                    recall=float(hits[i] / positives[i]) if positives[i] else 0.0,
                    f1=float(compute_f1(hits[i], positives[i], chosen[i])),
                )
                for i, name in enumerate(names)
            ],
            confusion=None if multi_label else (actual.T @ predicted).tolist(),
        )
        figures = [
            {"line": line, "label": name_set(a), "predicted": name_set(p)}
            for line, a, p in zip(self.examples.lines, actual, predicted, strict=True)
        ]
        return measures, figures

    @staticmethod
    def list_reasons_not_better(measures: ClassificationMeasures) -> list[str]:
        return _list_reasons_not_above_baseline(measures, f"always answering {measures.baseline!r}")


def _measure_against_baseline(
    comparison: ModelComparison[Any], losses: np.ndarray, accuracy: PairedEstimate, baseline: str
) -> BaselineComparisonMeasures:
    """Return numbers of rows, mean loss, and accuracy beside a baseline's (the second one that was compared)."""
    return BaselineComparisonMeasures(
        rows=len(comparison.examples),
        different_rows=len(np.unique(comparison.groups)),
        loss=float(losses.mean()),
        accuracy=accuracy.first,
        accuracy_gain=accuracy.difference,
        baseline=baseline,
        baseline_accuracy=accuracy.second.value,
    )


def _score_classes(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the logits of each row and its unweighted loss [N, classes + 1]."""
    logits = compute_row_logits(model, batch)
    losses = compute_weighted_label_losses(logits, {**batch, "label_weight": batch["label_weight"] * 0 + 1}).view(
        len(logits), -1
    )
    return torch.cat([logits, losses.mean(1, keepdim=True)], dim=1).double()


def _list_reasons_not_above_baseline(measures: BaselineComparisonMeasures, baseline: str) -> list[str]:
    """Return why the accuracy is not better than that of a baseline, one sentence; empty if it is."""
    low, high = measures.accuracy_gain.ci95
    if low > 0:
        return []
    return [f"it is not shown to be better than {baseline}: its accuracy is higher by {low:.3f} to {high:.3f}"]


class RewardModelEvaluator(ModelComparison[RewardModelMeasures]):
    """Compares the rewards of the two answers of each pair."""

    result_type = RewardEvalResult

    def measure(self) -> tuple[RewardModelMeasures, RowFigures]:
        scores = score_examples_by_objective(self.model, self.examples, self.collator, self.objective)
        losses, chosen, rejected = np.array([scores[i] for i in range(len(self.examples))]).T
        accuracy = self.compare(chosen > rejected, np.full(len(chosen), 0.5))
        margin = self.compare(chosen, rejected)
        measures = RewardModelMeasures(
            **vars(_measure_against_baseline(self, losses, accuracy, "chance")),
            margin=margin.difference,
            chosen_reward=margin.first.value,
            rejected_reward=margin.second.value,
        )
        figures = [
            {"line": line, "chosen": float(c), "rejected": float(r)}
            for line, c, r in zip(self.examples.lines, chosen, rejected, strict=True)
        ]
        return measures, figures

    @staticmethod
    def list_reasons_not_better(measures: RewardModelMeasures) -> list[str]:
        return _list_reasons_not_above_baseline(measures, "chance")
