"""The outputs of a sequence classifier: the names of its classes, or one reward."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ClassLabels:
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
    def from_config(cls, config: Mapping) -> "ClassLabels":
        """Return the classes of a config that `config` wrote, or of any sequence classifier."""
        names = tuple(name for _, name in sorted((int(i), str(n)) for i, n in config["id2label"].items()))
        if len(names) == 1 and config.get("problem_type") is None:
            return cls()
        return cls(names, config.get("problem_type") == "multi_label_classification")
