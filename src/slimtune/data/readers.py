"""Streaming readers: one function per kind of file, which yields `(line, record)` or an `InvalidRow`.

A reader continues after an invalid line, and has little of the file in memory. They exist because the readers of
`datasets` and Arrow name no line for a malformed row and stop at the first one.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from .formats import InvalidRow
from .messages import json_type

Located = tuple[int, dict[str, Any]] | InvalidRow
"""A record with its line or item number, or what is wrong there."""
JSON_CHUNK = 1 << 20  # characters of a JSON array read at once
TABLE_BATCH = 1024  # records of a Parquet file or dataset read at once
_WRONG_BYTE = re.compile("[\udc80-\udcff]")


def shorten(value: str, limit: int = 80) -> str:
    """Return a text, or its first `limit` characters and its length if it is longer."""
    value = value.strip()
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value)} characters)"


def _open_text(path: Path, newline: str = "\n") -> IO[str]:
    """Open a text file; a byte that is not UTF-8 becomes a surrogate, so that the reader names its line and goes on."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _check_utf8(line: int, text: str) -> InvalidRow | None:
    if text.isascii() or not (wrong := _WRONG_BYTE.search(text)):
        return None
    shown = shorten(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    return InvalidRow(line, f"is not UTF-8 at character {wrong.start() + 1}: {shown}", "not-utf8")


def _check_object(line: int, value: Any) -> Located:
    if isinstance(value, dict):
        return line, value
    shown = shorten(json.dumps(value, ensure_ascii=False))
    return InvalidRow(line, f"is not a JSON object but {json_type(value)}: {shown}", "not-an-object")


def describe_json_error(error: Exception) -> str:
    """Return why a text does not parse as JSON, with the column if it is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"does not parse as JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return f"does not parse as JSON ({error})"


def read_jsonl(path: Path) -> Iterator[Located]:
    """Read one JSON object per line; blank lines are skipped."""
    with _open_text(path) as file:
        for line, text in enumerate(file, start=1):
            if text.isspace():
                continue
            if invalid := _check_utf8(line, text):
                yield invalid
                continue
            try:
                yield _check_object(line, json.loads(text))
            except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
                yield InvalidRow(line, f"{describe_json_error(error)}: {shorten(text)}", "bad-json")


def read_json(path: Path) -> Iterator[Located]:
    """Read an array of objects item by item, or the file as JSONL if it does not begin with `[`.

    Nothing is read after an item that does not parse, because the begin of the next one is unknown.
    """
    with _open_text(path) as file:
        text = file.read(JSON_CHUNK)
        while text.isspace():
            text = file.read(JSON_CHUNK)
        text = text.lstrip()
        if not text.startswith("["):
            yield from read_jsonl(path)
            return
        decode, between_items = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n,]*")
        item, at = 1, 1
        while True:
            at += len(between_items.match(text, at)[0])  # type: ignore[index]  # it always matches
            if text.startswith("]", at):
                if rest := text[at + 1 :].strip() or file.read(JSON_CHUNK).strip():
                    yield InvalidRow(item, f"follows the end of the array: {shorten(rest)}", "bad-json")
                return
            try:
                value, at = decode(text, at)
            except (ValueError, RecursionError) as error:
                # Perhaps the item is not complete. The text doubles, so that a long item is parsed only a few times.
                if more := file.read(max(JSON_CHUNK, len(text) - at)):
                    text, at = text[at:] + more, 0
                    continue
                cause = f"does not parse as JSON ({getattr(error, 'msg', error)}); the rest of the file is not read: "
                yield InvalidRow(item, cause + (shorten(text[at:]) or "the array has no end"), "bad-json")
                return
            yield _check_object(item, value)
            item += 1


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Located]:
    """Read a table with a header; the line is the one on which a record begins. Raise DataError for a wrong header."""
    csv.field_size_limit(2**31 - 1)
    header: list[str] = []
    with _open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield InvalidRow(line, f"does not parse as CSV ({error}); the rest of the file is not read", "bad-csv")
                return
            if cells is None:
                return
            if not cells:
                continue
            if not header:
                header = cells
                _check_header(path, header, delimiter)
            elif len(cells) != len(header):
                cause = f"has {len(cells)} cells, and the header names {len(header)} columns"
                yield InvalidRow(line, cause, "bad-csv")
            else:
                yield _check_utf8(line, delimiter.join(cells)) or (line, dict(zip(header, cells, strict=True)))


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    others = [d for d in (",", ";", "\t", "|") if d != delimiter and d in header[0]]
    if len(header) == 1 and others:
        problem = f"its header is one column, {shorten(header[0])!r}: the delimiter seems to be {others[0]!r}"
        hint = "write it with that delimiter (.csv: a comma, .tsv: a tab)"
        raise DataError(f"{path}: {problem}", f"cells separated by {delimiter!r}", hint)
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: its header names {twice[0]!r} twice", "each column once", "rename one of them")


def read_paragraphs(path: Path) -> Iterator[Located]:
    """Read a text file: each paragraph between blank lines is a record with the column `text`."""
    with _open_text(path) as file:
        for blank, numbered in itertools.groupby(enumerate(file, start=1), lambda item: item[1].isspace()):
            if not blank:
                numbers, lines = zip(*numbered, strict=True)
                text = "".join(lines).rstrip("\r\n")
                yield _check_utf8(numbers[0], text) or (numbers[0], {"text": text})


def read_parquet(path: Path) -> Iterator[Located]:
    """Read a Parquet file; raise DataError if it is not one, or is incomplete."""
    from pyarrow import ArrowException  # 50 MB that the other readers do not need
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=TABLE_BATCH))
            yield from _number_records(record for batch in batches for record in batch)
    except ArrowException as error:
        problem = f"{path} is not a Parquet file, or is incomplete: {str(error).splitlines()[0]}"
        raise DataError(problem, "a complete Parquet file") from error


def read_hf_dataset(dataset: Any) -> Iterator[Located]:
    """Read a `datasets.Dataset`."""
    batches = dataset.iter(batch_size=TABLE_BATCH)
    rows = ((batch, values) for batch in batches for values in zip(*batch.values(), strict=True))
    return _number_records(dict(zip(batch, values, strict=True)) for batch, values in rows)


def _number_records(records: Iterator[dict[str, Any]]) -> Iterator[Located]:
    return ((item, _drop_nulls(record)) for item, record in enumerate(records, start=1))


def _drop_nulls(value: Any) -> Any:
    """Return a record without null keys: in an Arrow table all records have the same keys, and null means absent."""
    if isinstance(value, dict):
        return {k: _drop_nulls(v) for k, v in value.items() if v is not None}
    return [_drop_nulls(v) for v in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".txt": read_paragraphs,
}
