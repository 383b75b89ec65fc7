"""Classification: texts with labels, by the logits of a head on each row's last token.

    one label     loss = Σ w(y) · cross-entropy(logits, y) / Σ w(y)
    any number    loss = Σ over classes of binary cross-entropy / (rows · classes), positives weighted by w

Both sums go over the whole optimizer step, so that with equal weights the loss is that of transformers'
`ForSequenceClassification`. w are `class_weights`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..core.adapters.config_fields import config_field
from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.training.objective import Batch, Objective
from ..errors import DataError, format_names, suggest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.config import Recipe
    from ..core.data.class_labels import ClassLabels
    from ..core.training.datasets import RunDatasets


@dataclass
class Classification(Objective):
    """Cross-entropy of classes. Examples have `label`, an id [] or 0 and 1 for each class [C], and `label_weight`."""

    name: ClassVar[str] = "classification"
    summary: ClassVar[str] = "the classes of labelled texts, by a head on the last token"
    formats: ClassVar[tuple[str, ...]] = ("classification",)
    task_type: ClassVar[Literal["CAUSAL_LM", "SEQ_CLS"]] = "SEQ_CLS"
    measures: ClassVar[tuple[str, ...]] = ("nats", "weight", "correct")

    class_weights: Literal["balanced"] | dict[str, float] | None = config_field(
        None,
        "weight of each class in the loss: balanced (the rarer, the heavier) or weights by label",
        when_null="all are equal",
        ge=0,
    )

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        """Return the rows with the ids and weights of their classes.

        Raises:
            DataError: there is one class only, a class has no training row, or `class_weights` names no class.
        """
        from ..core.data.rows import Row
        from ..core.training.objective import open_rows_for_objective

        data, rows = recipe.data, datasets.train
        classes = _find_classes(rows)
        given = self.class_weights if isinstance(self.class_weights, dict) else {}
        if unknown := [name for name in given if name not in classes.names]:
            problem = f"task.class_weights names {format_names(unknown)}, which no training row has"
            raise DataError(f"{problem}{suggest(unknown[0], classes.names)}", f"one of {format_names(classes.names)}")
        if data.test is not None and data.test.exists():  # read later, when a class that is missing is too late
            test = open_rows_for_objective(data.test, data, self)
            labels = [(r.line, r.labels or ()) for r in test if isinstance(r, Row)]
            _require_known_labels(labels, classes, data.test)
            _require_single_labels(labels, classes, data.test)
        counts = dict(Counter(name for names in rows.classes for name in names))
        weights = self.compute_class_weights(counts, len(rows), classes.multi_label)
        if not any(weights.values()):
            problem = "task.class_weights are 0 for all classes, so that nothing would be learned"
            raise DataError(problem, "a weight above 0 for some class", "leave out class_weights: all count alike")
        return replace(
            datasets,
            classes=classes,
            train=_encode_classes(rows, classes, weights, data.train),
            validation=_encode_classes(datasets.validation, classes, weights, data.validation or data.train),
            test=_encode_classes(datasets.test, classes, weights, data.test or data.train),
        )

    def prepare_rows(
        self, rows: TokenizedDataset, classes: ClassLabels | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return rows to evaluate with the ids of their classes, if these are given; they all count alike."""
        if classes is None:
            return rows
        return _encode_classes(rows, classes, dict.fromkeys(classes.names, 1.0), path)

    def count_items(self, examples: Sequence[Mapping[str, Any]]) -> float:
        """Return the summed weights of the labels; of several labels a row the number of rows and classes."""
        if not examples or isinstance(examples[0]["label"], list):
            return sum(len(e["label"]) for e in examples)
        return max(sum(e["label_weight"] for e in examples), 1e-12)

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        return compute_weighted_label_losses(values, batch).sum() / num_items

    def score(self, values: Tensor, batch: Batch) -> Tensor:
        """Return loss, weight, and whether the prediction is right, for each row; all classes have to be right."""
        import torch

        losses, labels = compute_weighted_label_losses(values, batch).double(), batch["label"]
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


def compute_weighted_label_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the weighted loss of each row [N], or of each of its classes [N, C], from logits [N, C]."""
    import torch
    import torch.nn.functional as F

    labels, weights = batch["label"], batch["label_weight"].to(logits.dtype)
    if labels.dim() == 2:
        targets = labels.to(logits.dtype)
        # weights apply to the positives alone, like `pos_weight`
        return F.binary_cross_entropy_with_logits(
            logits, targets, torch.where(labels > 0, weights, 1.0), reduction="none"
        )
    return F.cross_entropy(logits, labels, reduction="none") * weights


# --- labels as numbers -----------------------------------------------------------------------------------------------


def _find_classes(train: TokenizedDataset) -> ClassLabels:
    """Return the classes of training rows; a row without a class, or with several, makes them multi-label.

    Raises:
        DataError: all rows have the same single class.
    """
    from ..core.data.class_labels import ClassLabels
    from ..extras.row_formats.classification import sort_class_names

    rows = train.classes
    classes = ClassLabels(
        tuple(sort_class_names(n for names in rows for n in names)), any(len(names) != 1 for names in rows)
    )
    if not classes.multi_label and len(classes.names) < 2:
        raise DataError(
            f"every training row has the label {classes.names[0]!r}", "rows of two classes or more", "add other rows"
        )
    return classes


def _encode_classes(
    rows: TokenizedDataset, classes: ClassLabels, weights: Mapping[str, float], path: object
) -> TokenizedDataset:
    """Return rows with `label`, the id of the class, or 0 and 1 for each class, and with `label_weight`.

    Raises:
        DataError: a row has a label that no class has, or several where each has one; the message names its line.
    """
    import numpy as np

    ids = {name: i for i, name in enumerate(classes.names)}
    found = rows.classes
    _require_known_labels(zip(rows.lines, found, strict=True), classes, path)
    values = np.array([weights[name] for name in classes.names])
    if classes.multi_label:
        label = np.zeros((len(found), len(ids)), np.int64)
        for row, names in enumerate(found):
            label[row, [ids[n] for n in names]] = 1
        return rows.with_columns(label=label, label_weight=np.broadcast_to(values, label.shape))
    _require_single_labels(zip(rows.lines, found, strict=True), classes, path)
    label = np.array([ids[names[0]] for names in found], np.int64)
    return rows.with_columns(label=label, label_weight=values[label])


def _require_single_labels(rows: Iterable[tuple[int, Sequence[str]]], classes: ClassLabels, path: object) -> None:
    """Raise DataError if a row, given as its line and its labels, has not one label, and each training row has one."""
    from ..core.data.tokenize import format_line_numbers

    several = [] if classes.multi_label else [line for line, names in rows if len(names) != 1]
    if several:
        problem = f"{path}: not one label in {format_line_numbers(several)}"
        raise DataError(problem, "one label a row, as in the training rows")


def _require_known_labels(rows: Iterable[tuple[int, Iterable[str]]], classes: ClassLabels, path: object) -> None:
    """Raise DataError if a row, given as its line and its labels, has a label that no class has."""
    from ..core.data.tokenize import format_line_numbers
    from ..extras.row_formats.classification import describe_lookalike_label, sort_class_names

    unknown = [(line, name) for line, names in rows for name in names if name not in classes.names]
    if unknown:
        strange, lines = sort_class_names(n for _, n in unknown), list(dict.fromkeys(line for line, _ in unknown))
        like = describe_lookalike_label(strange[0], classes.names)
        near = f" ({like})" if like else suggest(strange[0], classes.names)
        raise DataError(
            f"{path}: {format_names(strange)} is a label of no training row{near}: {format_line_numbers(lines)}",
            f"a label of the training rows: {format_names(classes.names)}",
            "correct the label, or train on rows of this class: a class seen only here cannot be learned",
        )
