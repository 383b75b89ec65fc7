"""Rows of a file, in constant memory, every fault with its line.

    open_rows   a file that yields a `Row` or a `Refusal` for each record, any number of times
    read_rows   all its rows at once, or one error that names the first faults

What a person typed (the path) is a usage error; what stands in the file is a data error. Up to ten faults are
collected and reported together, so a file is not repaired one run at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import parts
from .formats import FORMATS, Row, read_record, recognised, renamed, require_columns, require_known
from .messages import RowError
from .records import InvalidRow

__all__ = ["InvalidRow", "Row", "RowErrors", "RowFile", "open_rows", "read_rows"]

MAX_ERRORS = 10
FIRST = 20
"""Records by which a format is recognised."""
SHAPE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


class RowErrors:
    """Collects faults of one file; `check` raises them all as one error."""

    def __init__(self, path: str | Path, expected: str = "", hint: str = "") -> None:
        self.path, self.expected, self.hint = Path(path), expected, hint
        self.found: list[str] = []

    def add(self, line: int, what: str, file: str | None = None) -> None:
        """Keep one fault of a line."""
        self.found.append(f"{self.path / file if file else self.path}:{line}: {what}")

    @property
    def full(self) -> bool:
        """Whether as many faults are kept as one message shows."""
        return len(self.found) >= MAX_ERRORS

    def check(self) -> None:
        """Raise what was found.

        Raises:
            DataError: at least one fault was added.
        """
        if self.found:
            got = list(self.found)
            if self.full:
                got.append(f"(the first {MAX_ERRORS} faults; the rest of the file was not checked)")
            raise DataError("\n".join(got), expected=self.expected, hint=self.hint)


class RowFile:
    """The rows of a file, a folder or a dataset; made by `open_rows`.

    Args:
        path: as it was given.
        format: a name of `FORMATS`; "unknown" where no record can be read.

    Iterating yields `Row | Refusal` in file order, each time from the beginning, with little of the file in memory.
    """

    def __init__(self, path: Path, form: str, columns: Mapping[str, str], found: Any) -> None:
        self.path, self.format, self._columns, self._parts = path, form, columns, found

    def __iter__(self) -> Iterator[Row | InvalidRow]:
        for file, read in self._parts:
            for found in read():
                yield self._row(found, file)

    def rows(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: at the end of the file, or where ten rows were faulty: they are named with file and line.
        """
        faults = self._faults()
        for row in self:
            if isinstance(row, Row):
                yield row
                continue
            faults.add(row.line, row.cause, row.file)
            if faults.full:
                break
        faults.check()

    def _faults(self) -> RowErrors:
        wanted = f"one JSON object per line: {SHAPE}"
        if self.format not in ("chat", "unknown") or self.path.suffix != ".jsonl":
            wanted = f"rows of the format {self.format}: {', '.join(FORMATS.get(self.format, FORMATS['chat']).needs)}"
        return RowErrors(self.path, wanted, "repair or remove these lines")

    def _row(self, found: Any, file: str | None) -> Row | InvalidRow:
        if isinstance(found, InvalidRow):
            return InvalidRow(found.line, found.cause, found.code, file)
        line, record = found
        try:
            return read_record(renamed(record, self._columns) if self._columns else record, self.format, line, file)
        except RowError as fault:
            return InvalidRow(line, str(fault), fault.code, file)


def open_rows(path: str | Path, *, format: str | None = None, columns: Mapping[str, str] | None = None) -> RowFile:
    """Open a file of rows, its format recognised from the columns of its first rows.

    Args:
        path: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of such files, a folder that `datasets`
            saved, or a dataset's id.
        format: one of `FORMATS`; None: it is recognised.
        columns: what the format calls a column → what the file calls it.

    Raises:
        UsageError: there is no such file, it cannot be read, an unknown format, or a mapped column that is not there.
        DataError: the file is empty, its format is not plain, or files of a folder are of several formats.
    """
    path, columns = Path(path), dict(columns or {})
    require_known(format, columns)
    found = parts(path)
    forms: dict[str, str | None] = {}
    for file, read in found:
        if records := list(itertools.islice(_records(read()), FIRST)):
            where = path / file if file else path
            require_columns(where, records, columns)
            forms.setdefault(format or recognised(where, records, columns), file)
    if not forms and not any(True for _, read in found for _ in read()):
        raise DataError(f"{path} is empty: it holds no row", expected=f"one JSON object per line: {SHAPE}")
    if len(forms) > 1:
        (one, first), (other, second) = list(forms.items())[:2]
        raise DataError(
            f"{path} holds files of several formats: {first} is {one}, {second} is {other}",
            "files of one format",
            "name one file, or move the others away",
        )
    return RowFile(path, next(iter(forms), format or "unknown"), columns, found)


def read_rows(path: str | Path, *, format: str | None = None, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read every row of a file; see `open_rows`.

    Raises:
        UsageError: as `open_rows`.
        DataError: as `open_rows`, or some rows are faulty (the first ten are named with file and line).
    """
    return list(open_rows(path, format=format, columns=columns).rows())


def _records(found: Iterator[Any]) -> Iterator[dict[str, Any]]:
    return (record for one in found if not isinstance(one, InvalidRow) for record in [one[1]])
