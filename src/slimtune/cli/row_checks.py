"""Checks of rows that need no tokenizer: wrong rows are answered before torch is imported and a base is loaded."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.config.schema import DataSettings
    from ..core.training.objective import Objective

CHECKED_ROWS = 10_000
"""Rows that are checked here, in about a second; all are checked when they are tokenized."""


def require_valid_first_rows(data: DataSettings, objective: Objective, files: Sequence[Path | None] = ()) -> None:
    """Raise unless an objective takes the format of files of rows, and their first rows are valid.

    The files are by default those of training and validation; datasets of the Hub and empty files are left out. A base
    is not needed for that, and loading one takes long. All rows are checked when they are tokenized.
    """
    from ..core.data.rows import InvalidRow
    from ..core.training.objective import open_rows_for_objective

    for file in files or (data.train, data.validation):
        if file is None or not os.path.exists(file) or (os.path.isfile(file) and not os.path.getsize(file)):
            continue
        rows = open_rows_for_objective(file, data, objective)
        if any(isinstance(row, InvalidRow) for row in itertools.islice(rows, CHECKED_ROWS)):
            deque(rows.require_valid_rows(), maxlen=0)


def has_valid_first_row(data: DataSettings) -> bool:
    """Return whether one of the first training rows is valid.

    An error is raised where the format of training or validation rows is not known.
    """
    from ..core.data.rows import InvalidRow
    from ..extras.row_files import open_rows

    opened = [
        open_rows(file, format=data.format, columns=data.columns, ignore_columns=data.ignore_columns)
        for file in (data.train, data.validation)
        if file is not None
    ]
    return any(not isinstance(row, InvalidRow) for row in itertools.islice(opened[0], CHECKED_ROWS))
