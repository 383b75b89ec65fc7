"""Which rows a run is measured on: the recipe's, those that training set aside, or a file of the user's."""

from __future__ import annotations

from pathlib import Path

from ..config import Recipe
from ..data.dataset import Examples, RowReport
from ..errors import UsageError, format_names, nearest
from ..run_dir import RunDir
from ..setup import TrainedModel, load_datasets, load_eval_dataset

SPLITS = ("test", "validation")


def measured_on(folder: RunDir | None, run: Path, split: str, data: Path | None) -> Path | None:
    """Return the file to measure on; None: the rows that training set aside from its own file.

    Raises:
        UsageError: there is no such split, or the run names no rows for it.
    """
    if data is not None:
        return Path(data)
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}{nearest(split, SPLITS)}", f"one of {format_names(SPLITS)}")
    if folder is None:
        raise UsageError(
            f"{run} is an adapter folder without a recipe, so no held-out rows are known",
            "rows that it was not trained on",
            "--data FILE",
        )
    settings = folder.load_recipe().data
    path = settings.test if split == "test" else settings.validation
    if path is None and split == "validation" and settings.validation_fraction > 0:
        return None
    if path is None:
        there = split == "test" and (settings.validation is not None or settings.validation_fraction > 0)
        raise UsageError(
            f"the recipe of {run} names no {split} rows",
            f"data.{split} in {folder.recipe_file}, or a file",
            f"--data FILE{', or --split validation' if there else ''}",
        )
    return path


def recipe_for(loaded: TrainedModel, run: Path, path: Path | None) -> Recipe:
    """Return the run's recipe, or for an adapter that has none defaults; unpacked: every architecture takes that."""
    return loaded.recipe or Recipe.from_dict(
        {
            "model": loaded.base.source.spec,
            "data": {"train": str(path)},
            "train": {"packing": False},
            "output_dir": str(run),
        }
    )


def held_out_rows(recipe: Recipe, loaded: TrainedModel, path: Path | None) -> tuple[Examples, RowReport]:
    """Return the rows of a file, or with None those that training set aside, and what became of them.

    Raises:
        UsageError: training set none aside.
        DataError: the rows are faulty.
    """
    if path is not None:
        return load_eval_dataset(recipe, loaded.base.tokenizer, path)
    rows = load_datasets(recipe, loaded.base.tokenizer)
    if not rows.validation:
        raise UsageError(
            f"training set no rows aside: {recipe.data.validation_fraction} of {len(rows.train)} rows is none",
            "data.validation in the recipe, or a file",
            "--data FILE",
        )
    return rows.validation, rows.train_report
