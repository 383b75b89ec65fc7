"""Records of one file, one at a time, each with where it stands, for every kind of file.

What cannot be read is a `Refusal` in the record's place, and the rest goes on: which is why `datasets` reads its own
forms alone (of a malformed line it names no number). Whatever a file's size, little of it is in memory.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .messages import kind

CHUNK = 1 << 20
"""Characters of an array that are read at once."""
BATCH = 1024
"""Records of a table that are."""


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used.

    Args:
        line: where it stands: the line, or the number of the item, from 1.
        cause: why, as a person reads it.
        code: the kind of cause, in kebab case.
        file: the name of the file, where rows come from several.
    """

    line: int
    cause: str
    code: str
    file: str | None = None


Found = tuple[int, dict[str, Any]] | InvalidRow
"""A record and where it stands, or what is wrong there."""


def shorten(value: str, most: int = 80) -> str:
    """Return the beginning of a text, with its length where that is not all."""
    value = value.strip()
    return value if len(value) <= most else f"{value[:most]}… ({len(value)} characters)"


def _json_lines(path: Path) -> Iterator[Found]:
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if raw.strip():
                yield _parsed(line, raw)


def _parsed(line: int, raw: bytes) -> Found:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = shorten(raw.decode("utf-8", "replace"))
        return InvalidRow(line, f"is not UTF-8 at byte {error.start}: {seen}", "not-utf8")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        return InvalidRow(line, f"does not parse as JSON{where}: {shorten(text)}", "bad-json")
    return _record(line, value)


def _record(line: int, value: Any) -> Found:
    if isinstance(value, dict):
        return line, value
    said = shorten(json.dumps(value, ensure_ascii=False))
    return InvalidRow(line, f"is not a JSON object but {kind(value)}: {said}", "not-an-object")


def _json(path: Path) -> Iterator[Found]:
    """Read an array item by item: what does not parse ends it, since nothing tells where the next item begins."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(CHUNK)
        while text and not text.strip():
            text = file.read(CHUNK)
        if not text.lstrip().startswith("["):
            yield from _json_lines(path)
            return
        decoder, at, number = json.JSONDecoder(), text.index("[") + 1, 1
        while True:
            at = _after(text, at, " \t\r\n,")
            try:
                if at < len(text) and text[at] == "]":
                    if rest := text[at + 1 :].strip() or file.read(CHUNK).strip():
                        yield InvalidRow(number, f"follows the end of the array: {shorten(rest)}", "bad-json")
                    return
                value, at = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                more = file.read(max(CHUNK, len(text) - at))  # ever more, so that a long item is tried few times
                if more:
                    text, at = text[at:] + more, 0
                    continue
                message = getattr(error, "msg", "too deep")
                where = f"{shorten(text[at:]) or 'the array has no end'}; what follows is not read"
                yield InvalidRow(number, f"does not parse as JSON ({message}): {where}", "bad-json")
                return
            yield _record(number, value)
            number += 1


def _after(text: str, at: int, blank: str) -> int:
    while at < len(text) and text[at] in blank:
        at += 1
    return at


def _table(delimiter: str) -> Callable[[Path], Iterator[Found]]:
    def read(path: Path) -> Iterator[Found]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header: list[str] | None = None
            line = 1
            while True:
                try:
                    cells = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield InvalidRow(line, f"does not parse as CSV ({error}); what follows is not read", "bad-csv")
                    return
                if cells and header is None:
                    header = cells
                    _require_header(path, header, delimiter)
                elif cells and header is not None:
                    yield _cells(line, cells, header)
                line = rows.line_num + 1

    return read


def _require_header(path: Path, header: list[str], delimiter: str) -> None:
    others = [d for d in (",", ";", "\t", "|") if d != delimiter and d in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"{path}: its header is one column, {shorten(header[0])!r}: its cells seem to be parted by {others[0]!r}",
            f"cells parted by {delimiter!r}",
            "write it with that delimiter (.csv: a comma, .tsv: a tab)",
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: its header names {twice[0]!r} twice", "each column once", "rename one of them")


def _cells(line: int, cells: list[str], header: list[str]) -> Found:
    if len(cells) != len(header):
        return InvalidRow(line, f"has {len(cells)} cells, and the header names {len(header)} columns", "bad-csv")
    if any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell):
        return InvalidRow(line, "is not UTF-8", "not-utf8")
    return line, dict(zip(header, cells, strict=True))


def _paragraphs(path: Path) -> Iterator[Found]:
    """Yield the pieces between blank lines, without the end of their last line."""
    with open(path, "rb") as file:
        held: list[bytes] = []
        first = 1
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if raw.strip():
                first = first if held else line
                held.append(raw)
            elif held:
                yield _piece(first, held)
                held = []
        if held:
            yield _piece(first, held)


def _piece(line: int, held: list[bytes]) -> Found:
    raw = b"".join(held).rstrip(b"\r\n")
    try:
        return line, {"text": raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        return InvalidRow(line, f"is not UTF-8 at byte {error.start}", "not-utf8")


def _parquet(path: Path) -> Iterator[Found]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            number = 1
            for batch in file.iter_batches(batch_size=BATCH):
                for number, record in enumerate(batch.to_pylist(), start=number):  # noqa: B020
                    yield number, _without_nulls(record)
                number += 1
    except ArrowException as error:
        raise DataError(
            f"{path} is no Parquet file, or a broken one: {str(error).splitlines()[0]}", "a whole Parquet file"
        ) from error


def read_arrow(data: Any) -> Iterator[Found]:
    """Yield the records of a dataset of `datasets`."""
    number = 1
    for batch in data.iter(batch_size=BATCH):
        for values in zip(*batch.values(), strict=True):
            yield number, _without_nulls(dict(zip(batch, values, strict=True)))
            number += 1


def _without_nulls(value: Any) -> Any:
    """Return a record without the keys that Arrow fills with null: in its tables all records have the same."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _paragraphs,
}
