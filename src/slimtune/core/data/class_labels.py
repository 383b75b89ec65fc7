"""The classes of a data set: their names become ids, which the collator turns into tensors."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DataError, format_names, nearest
from ...extras.row_formats import sort_labels
from .tokenize import format_lines
from .tokenized_dataset import TokenizedDataset


@dataclass(frozen=True)
class Classes:
    """The outputs of a sequence classifier, as its config has them.

    `multi_label` says whether a row may have any number of classes. No name: one output, a reward.
    """

    names: tuple[str, ...] = ()
    multi_label: bool = False

    @property
    def config(self) -> dict:
        """The fields of a transformers config."""
        names = self.names or ("reward",)
        kind = "multi_label_classification" if self.multi_label else "single_label_classification"
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            **({"problem_type": kind} if self.names else {}),
        }

    @classmethod
    def from_config(cls, config: Mapping) -> "Classes":
        """Return the classes of a config that `config` wrote, or of any sequence classifier."""
        names = tuple(name for _, name in sorted((int(i), str(n)) for i, n in config["id2label"].items()))
        if len(names) == 1 and config.get("problem_type") is None:
            return cls()
        return cls(names, config.get("problem_type") == "multi_label_classification")


def find_classes(train: TokenizedDataset) -> Classes:
    """Return the classes of training rows; a row without a class, or with several, makes them multi-label.

    Raises:
        DataError: all rows have the same single class.
    """
    rows = train.classes
    classes = Classes(tuple(sort_labels(n for names in rows for n in names)), any(len(names) != 1 for names in rows))
    if not classes.multi_label and len(classes.names) < 2:
        raise DataError(
            f"every training row has the label {classes.names[0]!r}", "rows of two classes or more", "add other rows"
        )
    return classes


def encode_classes(
    rows: TokenizedDataset, classes: Classes, weights: Mapping[str, float], path: object
) -> TokenizedDataset:
    """Return rows with `label`, the id of the class, or 0 and 1 for each class, and with `label_weight`.

    Raises:
        DataError: a row has a label that no class has, or several where each has one; the message names its line.
    """
    ids = {name: i for i, name in enumerate(classes.names)}
    found = rows.classes
    require_known_labels(zip(rows.lines, found, strict=True), classes, path)
    values = np.array([weights[name] for name in classes.names])
    if classes.multi_label:
        label = np.zeros((len(found), len(ids)), np.int64)
        for row, names in enumerate(found):
            label[row, [ids[n] for n in names]] = 1
        return rows.with_columns(label=label, label_weight=np.broadcast_to(values, label.shape))
    if several := [line for line, names in zip(rows.lines, found, strict=True) if len(names) != 1]:
        raise DataError(f"{path}: not one label in {format_lines(several)}", "one label a row, as in the training rows")
    label = np.array([ids[names[0]] for names in found], np.int64)
    return rows.with_columns(label=label, label_weight=values[label])


def require_known_labels(rows: Iterable[tuple[int, Iterable[str]]], classes: Classes, path: object) -> None:
    """Raise DataError if a row, given as its line and its labels, has a label that no class has."""
    unknown = [(line, name) for line, names in rows for name in names if name not in classes.names]
    if unknown:
        strange, lines = sort_labels(n for _, n in unknown), list(dict.fromkeys(line for line, _ in unknown))
        raise DataError(
            f"{path}: {format_names(strange)} is a label of no training row"
            f"{nearest(strange[0], classes.names)}: {format_lines(lines)}",
            f"a label of the training rows: {format_names(classes.names)}",
            "correct the label, or train on rows of this class: a class seen only here cannot be learned",
        )


def encode_goodness(rows: TokenizedDataset) -> TokenizedDataset:
    """Return rows with `label`: whether the answer is good."""
    return rows.with_columns(label=np.array([names == [str(True)] for names in rows.classes], bool))


def count_classes(rows: TokenizedDataset) -> dict[str, int]:
    """Return how many rows have each class."""
    return dict(Counter(name for names in rows.classes for name in names))


def check_class_names(given: Sequence[str], classes: Classes, where: str) -> None:
    """Raise DataError if a name, such as one of `class_weights`, is no class."""
    if unknown := [name for name in given if name not in classes.names]:
        problem = f"{where} names {format_names(unknown)}, which no training row has"
        raise DataError(f"{problem}{nearest(unknown[0], classes.names)}", f"one of {format_names(classes.names)}")
