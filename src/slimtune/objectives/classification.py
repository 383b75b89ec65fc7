"""Classification: texts with labels, by the logits of a head on each row's last token.

    one label     loss = Σ w(y) · cross-entropy(logits, y) / Σ w(y)
    any number    loss = Σ over classes of binary cross-entropy / (rows · classes), positives weighted by w

Both sums go over the whole optimizer step, so that with equal weights the loss is that of transformers'
`ForSequenceClassification`. w are `class_weights`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapters.config_fields import setting
from ..core.training.objective import Batch, Objective


@dataclass
class Classification(Objective):
    """Cross-entropy of classes. Examples have `label`, an id [] or 0 and 1 for each class [C], and `label_weight`."""

    name: ClassVar[str] = "classification"
    summary: ClassVar[str] = "the classes of labelled texts, by a head on the last token"
    formats: ClassVar[tuple[str, ...]] = ("classification",)
    task_type: ClassVar[Literal["CAUSAL_LM", "SEQ_CLS"]] = "SEQ_CLS"
    measures: ClassVar[tuple[str, ...]] = ("nats", "weight", "correct")

    class_weights: Literal["balanced"] | dict[str, float] | None = setting(
        None,
        "weight of each class in the loss: balanced (the rarer, the heavier) or weights by label; null: all are equal",
        ge=0,
    )

    def count_items(self, examples: Sequence[Mapping[str, Any]]) -> float:
        """Return the summed weights of the labels; of several labels a row the number of rows and classes."""
        if not examples or isinstance(examples[0]["label"], list):
            return sum(len(e["label"]) for e in examples)
        return max(sum(e["label_weight"] for e in examples), 1e-12)

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        return label_losses(values, batch).sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return loss, weight, and whether the prediction is right, for each row; all classes have to be right."""
        losses, labels = label_losses(values, batch).double(), batch["label"]
        if labels.dim() == 2:
            right = ((values > 0) == (labels > 0)).all(1)
            return torch.stack([losses.sum(1), torch.full_like(losses[:, 0], labels.shape[1]), right.double()], 1)
        weights = batch["label_weight"].double().to(losses.device)
        return torch.stack([losses, weights, (values.argmax(1) == labels).double()], 1)

    def summarize(self, scores: np.ndarray) -> dict[str, float]:
        """Return the loss and the accuracy."""
        nats, weights, right = scores.T
        return {"loss": float(nats.sum() / max(weights.sum(), 1e-12)), "accuracy": float(right.mean())}

    def compute_class_weights(self, counts: Mapping[str, int], rows: int, multi_label: bool) -> dict[str, float]:
        """Return the weight of each class from its training rows; balanced ones are scikit-learn's.

        For several labels a row it is the weight of positives, balanced: negatives / positives.
        """
        if self.class_weights is None:
            return dict.fromkeys(counts, 1.0)
        if self.class_weights == "balanced" and multi_label:
            return {name: (rows - n) / n for name, n in counts.items()}
        if self.class_weights == "balanced":
            return {name: rows / (len(counts) * n) for name, n in counts.items()}
        return {name: float(self.class_weights.get(name, 1.0)) for name in counts}


def label_losses(values: Tensor, batch: Batch) -> Tensor:
    """Return the weighted loss of each row [N], or of each of its classes [N, C], from logits [N, C]."""
    labels, weights = batch["label"], batch["label_weight"].to(values.dtype)
    if labels.dim() == 2:
        targets = labels.to(values.dtype)
        # weights apply to the positives alone, like `pos_weight`
        return F.binary_cross_entropy_with_logits(
            values, targets, torch.where(labels > 0, weights, 1.0), reduction="none"
        )
    return F.cross_entropy(values, labels, reduction="none") * weights
