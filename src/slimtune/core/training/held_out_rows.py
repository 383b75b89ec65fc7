"""The rows that a run sets aside, which `slimtune eval` measures on without a file of others. It imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import DataSettings, Recipe

if TYPE_CHECKING:
    from .datasets import RunDatasets

MIN_EVAL_ROWS = 6
"""Fewer held-out rows cannot show anything at 95 %: five rows all improve by chance in 1 of 32 cases."""


def find_test_or_validation_split(data: DataSettings) -> str | None:
    """Return the rows that `slimtune eval` can measure on without a file: "test", else "validation", or None."""
    if data.test is not None or data.test_fraction > 0:
        return "test"
    return "validation" if data.validation is not None or data.validation_fraction > 0 else None


def count_rows_split_off_for_eval(recipe: Recipe, datasets: RunDatasets) -> int | None:
    """Return how many rows `slimtune eval` measures on without a file; None if it has none, or reads a file of them."""
    split = find_test_or_validation_split(recipe.data)
    return None if split is None or getattr(recipe.data, split) is not None else len(getattr(datasets, split).documents)
