"""A batch of a file's rows, tokenized and looked at, in any process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..formats import Row
from ..records import InvalidRow
from ..tokenize import tokenize_rows
from .batch_stats import BatchStats, ValidationSettings


@dataclass(frozen=True)
class BatchValidator:
    """Looks at a batch of a file; is sent to other processes."""

    tokenizer: Any
    lens: ValidationSettings
    train_on: str

    def __call__(self, batch: tuple[Row | InvalidRow, ...]) -> BatchStats:
        """Look at rows, and at what was refused before it was a row."""
        rows = [_one_side(row) for row in batch if isinstance(row, Row)]
        made = tokenize_rows(rows, self.tokenizer, train_on=self.train_on)
        pairs = [(row, one if isinstance(one, InvalidRow) else one[1]) for row, one in zip(rows, made, strict=True)]
        return self.lens(pairs, [row for row in batch if isinstance(row, InvalidRow)])


def _one_side(row: Row) -> Row:
    """Return a preference pair as a row of its better answer."""
    if row.chosen is None:
        return row
    if isinstance(row.chosen, str):
        return dataclasses.replace(row, chosen=None, prompt=row.prompt, completion=row.chosen)
    return dataclasses.replace(row, chosen=None, messages=[*row.messages, *row.chosen])
