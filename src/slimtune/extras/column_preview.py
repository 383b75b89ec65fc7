"""What the columns of a file of rows hold, for a form that asks for them: the first rows, and a guess of the roles.

`python -m slimtune.extras.column_preview FILE` prints a `ColumnPreview` as JSON. It is a process of its own, so that a
damaged file takes no server with it, and starts in a fraction of a second: it imports no torch.
"""

import itertools
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.data.rows import InvalidRow, Record
from ..core.foundation.files import to_json
from ..errors import DataError, SlimtuneError
from .column_guesses import guess_columns_and_whether_by_order, list_hinted_roles, suggest_format_by_column_names
from .row_columns import ColumnMapping, detect_row_format_name, load_row_formats
from .row_files import DETECTION_ROWS, list_dataset_file_names_with_readers

SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_CHARACTERS = 3, 200, 200
COUNTED_ROWS, COUNTED_SECONDS = 100_000, 3
"""Where the count of rows stops: a form has to answer soon."""


@dataclass(frozen=True)
class ColumnPreview:
    """The columns of a file of rows."""

    columns: list[str] = field(default_factory=list)
    """Their names, in the order of the file."""
    records: list[dict[str, str]] = field(default_factory=list)
    """The first rows: the beginning of each value as text, by column."""
    rows: int = 0
    """Rows that were counted."""
    has_more_rows: bool = False
    """Whether counting stopped before the end of the file."""
    format: str | None = None
    """The format that the columns have as they are named; None: none, or several."""
    suggested_format: str | None = None
    """The format that the columns are meant for, by their names; None: not known."""
    guesses: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each format, the column of each role that can be guessed."""
    unsure: list[str] = field(default_factory=list)
    """Formats in which only the order of the columns says which answer is the better one."""
    error: str = ""
    """Why nothing can be read; empty: something can."""


def read_column_preview(path: Path) -> ColumnPreview:
    """Return what the columns of a file or a folder of rows hold; an error is part of the answer."""
    try:
        return _read(path)
    except (SlimtuneError, OSError) as e:
        return ColumnPreview(error=getattr(e, "message", str(e)))


def _read(path: Path) -> ColumnPreview:
    parts = list_dataset_file_names_with_readers(path)
    stop = time.monotonic() + COUNTED_SECONDS
    records: list[Record] = []
    error, rows, has_more = "", 0, False
    for found in itertools.chain.from_iterable(read() for _, read in parts):
        has_more = rows == COUNTED_ROWS or (rows > DETECTION_ROWS and time.monotonic() > stop)
        if has_more:
            break
        rows += 1
        if isinstance(found, InvalidRow):
            error = error or f"line {found.line}: {found.cause}"
        elif len(records) < DETECTION_ROWS:
            records.append(found[1])
    if not records:
        return ColumnPreview(rows=rows, error=error or f"{path.name} has no rows: choose another file")
    columns = list(dict.fromkeys(str(name) for record in records for name in record))
    formats = load_row_formats()
    roles = {name: list_hinted_roles(name, f.required) for name, f in formats.items()}
    guesses, unsure = {}, []
    for name, row_format in formats.items():
        guess, is_order_guessed = guess_columns_and_whether_by_order(
            roles[name], records, ratings=name == "unpaired-preference"
        )
        names = {column.casefold(): column for column in columns if column not in guess.values()}
        exact = {role: names[role] for role in (*row_format.required, *row_format.optional) if role in names}
        guesses[name] = exact | guess
        unsure += [name] * is_order_guessed
    return ColumnPreview(
        columns=columns,
        records=[_shorten(record) for record in records[:SHOWN_ROWS]],
        rows=rows,
        has_more_rows=has_more,
        format=_detect(path, records),
        suggested_format="document" if path.suffix.lower() == ".md" else suggest_format_by_column_names(roles, records),
        guesses=guesses,
        unsure=unsure,
    )


def _detect(path: Path, records: list[Record]) -> str | None:
    if path.suffix.lower() == ".md":  # whose parts are no rows by themselves
        return None
    try:
        return detect_row_format_name(path, records, ColumnMapping({}))
    except DataError:
        return None


def _shorten(record: Mapping[str, Any]) -> dict[str, str]:
    shown = itertools.islice(record.items(), SHOWN_COLUMNS)
    texts = {str(k): v if isinstance(v, str) else "" if v is None else to_json(v) for k, v in shown}
    return {k: v[:SHOWN_CHARACTERS] + "…" * (len(v) > SHOWN_CHARACTERS) for k, v in texts.items()}


if __name__ == "__main__":
    print(to_json(read_column_preview(Path(sys.argv[1]))))
