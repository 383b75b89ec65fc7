"""The rows of a run: read, tokenized and reported on, and split into training, validation and test rows."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import DataError
from ..config import Recipe
from ..config.schema import DataSettings
from ..data.class_labels import ClassLabels
from ..data.example_lengths import ExampleLength
from ..data.row_observer import DATA_REPORTS, RowFindingsSummary, TokenizedBatchObserver
from ..data.rows import RowIterable
from ..data.tokenize import TokenizationStats, tokenize_dataset
from ..data.tokenized_dataset import RankedAnswerSelection, TokenizedDataset
from ..foundation import distributed
from ..foundation.cpu import count_usable_cpus
from ..models.quantization import require_bitsandbytes_installed
from .base_model import load_base_tokenizer
from .objective import Objective, open_rows_for_objective


@dataclass
class RunDatasets:
    """The tokenized rows of a run, how many were kept, and the reports of `slimtune data`, by "train" and "validation".

    Without a validation file, its rows are split from the training rows and have no report; so are the test rows.
    Documents are cut into windows here, and are split whole.
    """

    train: TokenizedDataset
    validation: TokenizedDataset
    test: TokenizedDataset
    train_stats: TokenizationStats
    validation_stats: TokenizationStats | None
    data_reports: dict[str, RowFindingsSummary | None]
    classes: ClassLabels | None = None  # of a sequence classifier

    def lengths(self) -> list[ExampleLength]:
        """Return the length of each example, training examples first."""
        return [*self.train.example_lengths, *self.validation.example_lengths]


class _ObservedRows(NamedTuple):
    """The rows of a file, tokenized, and what watched them."""

    file: RowIterable
    dataset: TokenizedDataset
    stats: TokenizationStats
    observer: TokenizedBatchObserver


@distributed.raises_on_all_ranks
def load_training_datasets(recipe: Recipe, force: bool) -> RunDatasets:
    """Check that the recipe's packages are there, and load its rows as they are trained on.

    Raises:
        DataError: there is no row, or the data report found errors, unless `force`.
    """
    if recipe.model.quantization is not None:
        require_bitsandbytes_installed(f"model.quantization {recipe.model.quantization}")
    if recipe.train.optimizer == "adamw-8bit":
        require_bitsandbytes_installed("train.optimizer adamw-8bit")
    data = tokenize_recipe_datasets(recipe, load_base_tokenizer(recipe.model, recipe.data.chat_template))
    for report in data.data_reports.values():
        if report is not None and not force:
            report.require_no_errors()
    if not data.train:
        raise DataError(f"{recipe.data.train} leaves no row to train on", "at least one row")
    if recipe.data.format in recipe.objective().named_formats:  # of pairs, cross-entropy learns the chosen answers
        train, validation = (RankedAnswerSelection(rows, (0,)) for rows in (data.train, data.validation))
        return dataclasses.replace(data, train=train, validation=validation)
    return data


def tokenize_recipe_datasets(recipe: Recipe, tokenizer: Any) -> RunDatasets:
    """Read, tokenize and report on the training and validation rows of a recipe, and prepare them for its objective.

    Raises:
        DataError: rows cannot be read or tokenized, or the objective cannot learn from them.
    """
    data, objective, name, seed = recipe.data, recipe.objective(), recipe.model.name, recipe.train.seed

    def read(path: Path, like: TokenizedBatchObserver | None = None) -> _ObservedRows:
        rows = open_rows_for_objective(path, data, objective)
        observer = DATA_REPORTS.load("rows")(
            tokenizer,
            rows,
            max_seq_len=data.max_seq_len,
            on_overlong=data.on_overlong,
            rows_per_step=recipe.train.rows_per_step,
            compared_with=like,
        )
        return _ObservedRows(rows, *_tokenize(rows, data, tokenizer, observer), observer)

    own = read(data.train)
    other: _ObservedRows | None = None
    reports: dict[str, RowFindingsSummary | None] = {"validation": None}
    # The text of a row decides, by its hash, whether it is set aside for `slimtune eval`: rows with the same text stay
    # together, and neither the seed nor the base changes which rows these are.
    rows, hashes = own.dataset, own.observer.kept_hashes()
    count = round(len(rows) * data.test_fraction)
    held_out = hashes <= np.sort(hashes)[count - 1] if count else np.zeros(len(rows), bool)
    train, test = rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
    if data.validation is not None:
        other = read(data.validation, own.observer)
        validation, compared = other.dataset, (str(data.validation), other.observer)
        reports = {
            "train": own.observer.finish(file=data.train, model=name, validation=compared),
            "validation": other.observer.finish(file=data.validation, model=name),
        }
    else:
        count = round((len(train) + len(test)) * data.validation_fraction)
        train, validation = _split_validation_rows(train, count, seed)
        reports = {"train": own.observer.finish(file=data.train, model=name), **reports}
    recipe.method_config().check_rows(train)
    datasets = RunDatasets(
        train=_cut_documents(own.file, train, data, tokenizer, seed),
        validation=_cut_documents((other or own).file, validation, data, tokenizer),
        test=_cut_documents(own.file, test, data, tokenizer),
        train_stats=own.stats,
        validation_stats=None if other is None else other.stats,
        data_reports=reports,
    )
    return objective.prepare_datasets(datasets, recipe, tokenizer)


def load_eval_dataset_and_stats(
    path: Path, data: DataSettings, objective: Objective, tokenizer: Any, class_labels: ClassLabels | None = None
) -> tuple[TokenizedDataset, TokenizationStats]:
    """Read and tokenize rows for evaluation, with a run's length policy; `class_labels` are those of a classifier."""
    rows = open_rows_for_objective(path, data, objective)
    dataset, stats = _tokenize(rows, data, tokenizer)
    dataset = objective.prepare_rows(dataset, class_labels, path)
    return _cut_documents(rows, dataset, data, tokenizer), stats


def _tokenize(
    rows: RowIterable, data: DataSettings, tokenizer: Any, observer: TokenizedBatchObserver | None = None
) -> tuple[TokenizedDataset, TokenizationStats]:
    return tokenize_dataset(
        rows,
        tokenizer,
        max_seq_len=data.max_seq_len,
        on_overlong=data.on_overlong,
        train_on=data.train_on,
        source_path=rows.path,
        processes=max(1, count_usable_cpus() // distributed.local_world_size()),
        observer=observer,
    )


def _cut_documents(
    rows: RowIterable, dataset: TokenizedDataset, data: DataSettings, tokenizer: Any, seed: int | None = None
) -> TokenizedDataset:
    """Return the windows of documents, of rows of another format the rows; with a seed, epochs have other cuts."""
    return dataset if rows.window_cutter is None else rows.window_cutter(dataset, data.max_seq_len, tokenizer, seed)


def _split_validation_rows(rows: TokenizedDataset, count: int, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
    """Return the rows to train on and `count` rows for validation, drawn by the seed; none if no row would be left."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held_out = np.zeros(len(rows), bool)
    held_out[order[: count if count < len(rows) else 0].numpy()] = True
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))
