"""Evaluation of models with a head on each row's last token: classes, and rewards of preference pairs.

A new head has learned nothing in the base, so the tuned model is not compared with it: a classifier has to beat the
most frequent class of the evaluated rows, a reward model has to prefer the chosen answer more often than chance.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.collator import Collator
from ..data.labels import Classes
from ..data.tokenized_dataset import TokenizedDataset
from ..objectives.classification import label_losses
from ..objectives.reward import Reward
from ..train_step.loss import row_logits, score_examples, score_objective
from .statistics import bootstrap_macro_f1, compute_f1, paired_bootstrap

MIN_ROWS = 6


def evaluate_classifier(
    model: Any, examples: TokenizedDataset, collator: Collator, classes: Classes, *, draws: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return accuracy, macro-F1, both with 95 % intervals, and the confusion table; and what each row was taken for.

    Args:
        model: the tuned model.
        examples: rows with `label` (see `Classification`).
        collator, classes: of the model.
        draws, seed: of the bootstrap; rows that are equal are drawn together.
    """

    def measure(batch: dict[str, Any]) -> Tensor:
        logits = row_logits(model, batch)
        losses = label_losses(logits, {**batch, "label_weight": batch["label_weight"] * 0 + 1}).view(len(logits), -1)
        return torch.cat([logits, losses.mean(1, keepdim=True)], dim=1).double()

    scores = score_examples(model, examples, collator, measure)
    values = np.array([scores[i] for i in range(len(examples))])
    logits, losses = values[:, :-1], values[:, -1]
    labels = np.array([e["label"] for e in examples])
    count, one_hot = len(classes.names), np.eye(len(classes.names), dtype=np.int64)
    actual = labels if classes.multi_label else one_hot[labels]
    predicted = (logits > 0).astype(np.int64) if classes.multi_label else one_hot[logits.argmax(1)]
    sets, frequency = np.unique(actual, axis=0, return_counts=True)
    frequent = sets[frequency.argmax()]
    right, baseline = (actual == predicted).all(1), (actual == frequent).all(1)

    groups = examples.groups()
    sizes = np.bincount(groups)
    accuracy = paired_bootstrap(
        np.bincount(groups, right).tolist(),
        np.bincount(groups, baseline).tolist(),
        sizes.tolist(),
        draws=draws,
        seed=seed,
    )
    by_group = [np.zeros((len(sizes), count), np.int64) for _ in range(3)]
    for total, each in zip(by_group, (actual * predicted, actual, predicted), strict=True):
        np.add.at(total, groups, each)
    f1 = bootstrap_macro_f1(*by_group, draws=draws, seed=seed)
    hits, positives, chosen = (total.sum(0) for total in by_group)

    def name_set(row: np.ndarray) -> str:
        return ", ".join(name for name, is_one in zip(classes.names, row, strict=True) if is_one) or "none"

    result = {
        "rows": len(examples),
        "different_rows": len(sizes),
        "loss": float(losses.mean()),
        "accuracy": accuracy.base.value,
        "accuracy_ci95": accuracy.base.interval,
        "macro_f1": f1.value,
        "macro_f1_ci95": f1.interval,
        "baseline": name_set(frequent),
        "baseline_accuracy": accuracy.tuned.value,
        "accuracy_gain": accuracy.difference.value,
        "accuracy_gain_ci95": accuracy.difference.interval,
        "classes": [
            {
                "name": name,
                "rows": int(positives[i]),
                "precision": hits[i] / chosen[i] if chosen[i] else 0.0,
                "recall": hits[i] / positives[i] if positives[i] else 0.0,
                "f1": float(compute_f1(hits[i], positives[i], chosen[i])),
            }
            for i, name in enumerate(classes.names)
        ],
        # rows: the label; columns: the prediction
        "confusion": None if classes.multi_label else (actual.T @ predicted).tolist(),
    }
    rows = [
        {"line": e["line"], "label": name_set(a), "predicted": name_set(p)}
        for e, a, p in zip(examples, actual, predicted, strict=True)
    ]
    return result, rows


def evaluate_reward_model(
    model: Any, examples: TokenizedDataset, collator: Collator, objective: Reward, *, draws: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return how often the chosen answer has the higher reward and by how much, with intervals, and all rewards."""
    scores = score_objective(model, examples, collator, objective)
    losses, chosen, rejected = np.array([scores[i] for i in range(len(examples))]).T
    groups = examples.groups()
    sizes = np.bincount(groups).tolist()

    def bootstrap(values: np.ndarray, other: np.ndarray) -> Any:
        sums, others = (np.bincount(groups, v).tolist() for v in (values, other))
        return paired_bootstrap(sums, others, sizes, draws=draws, seed=seed)

    accuracy = bootstrap((chosen > rejected).astype(float), np.full(len(chosen), 0.5))
    margin = bootstrap(chosen, rejected)
    result = {
        "rows": len(examples),
        "different_rows": len(sizes),
        "loss": float(losses.mean()),
        "accuracy": accuracy.base.value,
        "accuracy_ci95": accuracy.base.interval,
        "accuracy_gain": accuracy.difference.value,
        "accuracy_gain_ci95": accuracy.difference.interval,
        "baseline": "chance",
        "baseline_accuracy": 0.5,
        "margin": margin.difference.value,
        "margin_ci95": margin.difference.interval,
        "chosen_reward": margin.base.value,
        "rejected_reward": margin.tuned.value,
    }
    rows = [
        {"line": e["line"], "chosen": float(c), "rejected": float(r)}
        for e, c, r in zip(examples, chosen, rejected, strict=True)
    ]
    return result, rows


def list_reasons_not_better(result: Mapping[str, Any]) -> list[str]:
    """Return why the model is not better than its baseline, one sentence each; empty if it is."""
    if result["different_rows"] < MIN_ROWS:
        return [f"{result['different_rows']} different rows are too few to show anything: {MIN_ROWS} are the least"]
    low, high = result["accuracy_gain_ci95"]
    if low > 0:
        return []
    baseline = "chance" if result["baseline"] == "chance" else f"always answering {result['baseline']!r}"
    return [f"it is not shown to be better than {baseline}: its accuracy is higher by {low:.3f} to {high:.3f}"]
