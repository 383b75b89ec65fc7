"""What an objective is made of: its settings, the rows it takes, the loss of a micro-batch, and its measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import DataError, format_names
from ..adapters.config_fields import DeclaredSettings
from ..config.objective_registry import list_objectives, load_objective_class
from ..data.example_types import Batch, Example
from ..data.rows import ROW_SOURCES, RowIterable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..config import Recipe
    from ..config.schema import DataSettings
    from ..data.class_labels import ClassLabels
    from ..data.tokenized_dataset import TokenizedDataset
    from .datasets import RunDatasets
    from .prepared_run import PreparedRun


ScoreRows = Callable[[Sequence[Example]], Sequence[Sequence[float]]]
"""Returns the summed log p of each row of some examples, without gradient."""


@dataclass
class Objective(DeclaredSettings):
    """An objective; its fields are its settings, each declared with `adapters.config_fields.config_field`.

    Attributes:
        name: what `task` in a recipe says; the name of the file.
        summary: what it learns from which rows, in a few words.
        formats: the formats of rows (extras/row_formats/) that it takes.
        named_formats: further ones, which it takes only if `data.format` names them.
        rows_per_example: rows of one example, which lie in one micro-batch: 2 for a pair.
        task_type: PEFT's name of the model that is trained, which decides what `loss` and `score` get for each
            micro-batch: "CAUSAL_LM", −log p of each supervised token [K]; "SEQ_CLS", the head's logits of each row
            [R, classes]; both in fp32 or wider.
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
    learning_rate_factor: ClassVar[float] = 1.0
    measures: ClassVar[tuple[str, ...]]

    @classmethod
    def takes_format(cls, name: str) -> bool:
        """Return whether it takes rows of this format, at least if `data.format` names it."""
        return name in (*cls.formats, *cls.named_formats)

    @classmethod
    def set_paths_absolute_in_place(cls, settings: dict[str, Any], folder: Path) -> None:
        """Make the paths in an objective's settings, as a recipe has them, absolute; none, unless overridden.

        Args:
            settings: read from a file or given by flags, and not checked yet.
            folder: what they are relative to; paths that do not exist in it stay as they are.
        """

    def list_plan_notes(self) -> Sequence[str]:
        """Return sentences about work that a plan does not count; none, unless overridden."""
        return ()

    # --- rows: called in this order ---------------------------------------------------------------------------------

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        """Return a run's rows, once they are split, as they are learned: by `prepare_rows`, unless overridden.

        A sequence classifier sets `classes`, too.
        """
        train, validation, test = map(self.prepare_rows, (datasets.train, datasets.validation, datasets.test))
        return replace(datasets, train=train, validation=validation, test=test)

    def prepare_rows(
        self, rows: TokenizedDataset, classes: ClassLabels | None = None, path: Path | None = None
    ) -> TokenizedDataset:
        """Return rows to learn or to evaluate with the columns that the loss needs: as they are, unless overridden.

        Args:
            rows: tokenized examples.
            classes: those of a sequence classifier that is evaluated.
            path: the file of the rows, for error messages.
        """
        return rows

    def require_servers(self, recipe: Recipe, data: RunDatasets) -> None:
        """Raise SlimtuneError if a server that the run needs cannot serve it: nothing, unless overridden.

        Called before the base is loaded, in the main process alone, with the rows that `prepare_datasets` returned.
        """

    def prepare_run(self, prepared: PreparedRun) -> None:
        """Change the rows of a run in `prepared.data` before its first step: nothing, unless overridden.

        Called once the adapter is attached, also when the run is resumed.
        """

    # --- steps ------------------------------------------------------------------------------------------------------

    def prepare_step(self, examples: Sequence[Example], score_rows: ScoreRows) -> Sequence[Example]:
        """Return the examples of a step as they are trained: as they are, unless overridden.

        Called once for all examples of a step, before its first micro-batch: what the loss needs to know of the whole
        step is added here. `score_rows` scores the rows of all processes.
        """
        return examples

    def prepare_evaluation(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return held-out examples, one for each, as they are scored: as they are, unless overridden."""
        return examples

    def measure_steps(self) -> dict[str, float]:
        """Return further measures, for the log, of the steps since the last call; none, unless overridden."""
        return {}

    def compute_values(self, model: Any, batch: Batch) -> Tensor:
        """Return what `loss` and `score` get of a micro-batch: what `task_type` says, unless overridden."""
        from .loss import compute_token_nll_or_row_logits

        return compute_token_nll_or_row_logits(model, batch)

    def count_items(self, examples: Sequence[Example]) -> Any:
        """Return what the loss of a whole step is divided by, from all its examples: their number, unless overridden.

        Several numbers, if parts of the loss are means over different items. Every micro-batch of the step gets them:
        the gradient does not depend on the division into micro-batches.
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


def sum_targets_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Return the sum of the values of each row's supervised tokens [R]; the rows of an example are neighbours."""
    import torch

    # index_add_ would add in another order each time on a GPU.
    return torch.stack([part.sum() for part in values.split(batch["row_targets"])])


def open_rows_for_objective(path: Path, data: DataSettings, objective: Objective) -> RowIterable:
    """Open a data set with the format and the columns of the settings, in a format that the objective takes.

    Raises:
        DataError: the rows have another format; the error names the objectives that take it.
    """
    formats = (data.format,) if data.format in objective.named_formats else objective.formats
    format = data.format or (formats[0] if len(formats) == 1 else None)
    names = ("columns", "ignore_columns", "split_special_tokens", "apply_chat_template")
    options = {name: getattr(data, name) for name in names}
    rows = ROW_SOURCES.load("files")(path, format=format, expected_formats=formats, **options)
    if rows.format not in (*formats, "unknown"):
        tasks = [name for name in list_objectives() if rows.format in load_objective_class(name).formats]
        by_name = rows.format in objective.named_formats
        raise DataError(
            f"{path} has rows of the format {rows.format}, and the task {objective.name} does not learn from them",
            f"rows of {format_names(formats)}",
            " or ".join([f"--task {name}" for name in tasks] + ["--format preference: the chosen answers"] * by_name),
        )
    return rows
