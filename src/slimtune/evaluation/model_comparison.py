"""What every comparison is made of: rows, the model that scores them with its adapter and without it, and intervals.

Each kind of objective has its comparison, a subclass in a file of its own; `evaluate.py` chooses it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from ..core.data.class_labels import ClassLabels
from ..core.data.collator import Collator, Example
from ..core.data.tokenized_dataset import TokenizedDataset
from ..core.foundation.progress_bars import using_progress_prefix
from ..core.training.held_out_rows import MIN_EVAL_ROWS
from ..core.training.objective import Objective
from ..errors import AdapterError, ModelError, format_names
from .eval_result import EvalMeasures, EvalResult
from .row_scores import RowScore, score_supervised_rows
from .statistics import PairedEstimate, paired_bootstrap

Measures = TypeVar("Measures", bound=EvalMeasures)
RowFigures = list[dict[str, Any]]
"""The figures of each row that `scores-<split>.json` keeps."""


@dataclass(frozen=True)
class ModelComparison(Generic[Measures]):
    """Compares the tuned model with its base, or with a baseline, on the rows of one kind of objective."""

    result_type: ClassVar[type[EvalResult]]
    """The type of the evaluation's result."""

    model: Any
    examples: TokenizedDataset
    collator: Collator
    objective: Objective
    tokenizer: Any
    classes: ClassLabels | None  # of a sequence classifier
    rows_source: object  # that the rows are from, for messages
    draws: int  # of the bootstrap
    seed: int  # of the draws and of the shuffled prompts
    shuffled_prompt_test: bool  # whether answers must depend on their prompts

    def measure(self) -> tuple[Measures, RowFigures]:
        """Return what is measured on the rows, and the figures of each row."""
        raise NotImplementedError

    @staticmethod
    def list_reasons_not_better(measures: Measures) -> list[str]:
        """Return why measures do not show that the tuned model is better, one sentence each; empty if they do."""
        raise NotImplementedError

    @staticmethod
    def list_warnings(measures: Measures) -> list[str]:
        """Return what measures of a model that is better do not show."""
        return []

    @cached_property
    def windows_are_rows(self) -> bool:
        """Whether each window of a document counts as a row."""
        return are_windows_of_few_documents(self.examples)

    @cached_property
    def groups(self) -> np.ndarray:
        """The number of the group of equal rows that each row is in, int64 [N]."""
        if self.windows_are_rows:
            hashes = [hash(tuple(window["input_ids"])) for window in self.examples]
        else:
            hashes = self.examples.documents.hashes()
        return np.unique(hashes, return_inverse=True)[1]

    def compare(self, first: Any, second: Any, sizes: Any = None) -> PairedEstimate:
        """Compare two values of each row [N], per `sizes` [N] (None: per row), by `paired_bootstrap`.

        Rows that are equal are drawn together: drawn apart they would make the intervals too narrow.
        """
        sizes = np.ones(len(self.groups)) if sizes is None else sizes
        sums: Any = [np.bincount(self.groups, values).tolist() for values in (first, second, sizes)]
        return paired_bootstrap(*sums, draws=self.draws, seed=self.seed)

    def score_both(self, rows: Sequence[Example], rows_source: object = None) -> tuple[list[RowScore], list[RowScore]]:
        """Return the scores of rows by the base and by the tuned model.

        Raises:
            AdapterError, ModelError: a loss is NaN or Inf; the message names the rows' lines in `rows_source`.
        """
        with using_progress_prefix("tuned model"):
            tuned = score_supervised_rows(self.model, rows, self.collator)
        with self.model.disable_adapter(), using_progress_prefix("base"):
            base = score_supervised_rows(self.model, rows, self.collator)
        for who, scored, error in (("base", base, ModelError), ("tuned model", tuned, AdapterError)):
            if lines := [e["line"] for e, score in zip(rows, scored, strict=True) if not math.isfinite(score.nats)]:
                raise error(
                    f"the loss of the {who} is NaN or Inf on {len(lines)} of {len(scored)} rows "
                    f"(lines {format_names(lines)} of {rows_source or self.rows_source})",
                    "finite losses",
                    "evaluate in float32, or take an older checkpoint",
                )
        return base, tuned


def are_windows_of_few_documents(examples: TokenizedDataset) -> bool:
    """Return whether rows are windows of documents that are too few for an interval: then each window is a row."""
    documents = examples.documents
    return documents is not examples and len(set(documents.hashes())) < MIN_EVAL_ROWS
