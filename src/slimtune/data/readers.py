"""Streaming readers: one function per kind of file, which yields `(line, record)` or an `InvalidRow`.

A reader continues after an invalid line, and has little of the file in memory. They exist because the readers of
`datasets` and Arrow name no line for a malformed row and stop at the first one.
"""

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .formats import InvalidRow
from .messages import json_type

Located = tuple[int, dict[str, Any]] | InvalidRow
"""A record with its line or item number, or what is wrong there."""
JSON_CHUNK = 1 << 20
"""Characters of a JSON array read at once."""
TABLE_BATCH = 1024
"""Records of a Parquet file or dataset read at once."""


def shorten(value: str, limit: int = 80) -> str:
    """Return the beginning of a text, with its length if it is longer than `limit` characters."""
    value = value.strip()
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value)} characters)"


def read_jsonl(path: Path) -> Iterator[Located]:
    """Read one JSON object per line; blank lines are skipped."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if not raw.strip():
                continue
            try:
                text = raw.decode("utf-8")
                yield _require_object(line, json.loads(text))
            except UnicodeDecodeError as error:
                shown = shorten(raw.decode("utf-8", "replace"))
                yield InvalidRow(line, f"is not UTF-8 at byte {error.start}: {shown}", "not-utf8")
            except json.JSONDecodeError as error:
                where = f"({error.msg} at column {error.colno})"
                yield InvalidRow(line, f"does not parse as JSON {where}: {shorten(text)}", "bad-json")
            except RecursionError:
                yield InvalidRow(line, f"does not parse as JSON (too deep): {shorten(text)}", "bad-json")


def _require_object(line: int, value: Any) -> Located:
    if isinstance(value, dict):
        return line, value
    shown = shorten(json.dumps(value, ensure_ascii=False))
    return InvalidRow(line, f"is not a JSON object but {json_type(value)}: {shown}", "not-an-object")


def read_json(path: Path) -> Iterator[Located]:
    """Read an array of objects item by item, or the file as JSONL if it does not begin with `[`.

    Nothing is read after an item that does not parse, because the begin of the next one is unknown.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(JSON_CHUNK)
        while text and not text.strip():
            text = file.read(JSON_CHUNK)
        if not text.lstrip().startswith("["):
            yield from read_jsonl(path)
            return
        decoder, item = json.JSONDecoder(), 1
        text = text.lstrip()[1:]
        at = 0
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text.startswith("]", at):
                if rest := text[at + 1 :].strip() or file.read(JSON_CHUNK).strip():
                    yield InvalidRow(item, f"follows the end of the array: {shorten(rest)}", "bad-json")
                return
            try:
                value, at = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                # Perhaps the item is not complete. The text doubles, so that a long item is parsed only a few times.
                if more := file.read(max(JSON_CHUNK, len(text) - at)):
                    text, at = text[at:] + more, 0
                    continue
                shown = shorten(text[at:]) or "the array has no end"
                cause = f"does not parse as JSON ({getattr(error, 'msg', 'too deep')}): {shown}"
                yield InvalidRow(item, f"{cause}; the rest of the file is not read", "bad-json")
                return
            yield _require_object(item, value)
            item += 1


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Located]:
    """Read a table with a header. The line is the one on which a record begins.

    Raises:
        DataError: the header has one column that contains another delimiter, or a column twice.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                cause = f"does not parse as CSV ({error}); the rest of the file is not read"
                yield InvalidRow(line, cause, "bad-csv")
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
            elif any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell):
                yield InvalidRow(line, "is not UTF-8", "not-utf8")  # surrogates stand for the wrong bytes
            else:
                yield line, dict(zip(header, cells, strict=True))


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    others = [d for d in (",", ";", "\t", "|") if d != delimiter and d in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"{path}: its header is one column, {shorten(header[0])!r}: the delimiter seems to be {others[0]!r}",
            f"cells separated by {delimiter!r}",
            "write it with that delimiter (.csv: a comma, .tsv: a tab)",
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: its header names {twice[0]!r} twice", "each column once", "rename one of them")


def read_tsv(path: Path) -> Iterator[Located]:
    """Read a table with a header and tabs between its cells."""
    return read_csv(path, "\t")


def read_paragraphs(path: Path) -> Iterator[Located]:
    """Read a text file: each paragraph between blank lines is a record with the column `text`."""
    with open(path, "rb") as file:
        lines: list[bytes] = []
        first = 1
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if raw.strip():
                first = first if lines else number
                lines.append(raw)
            elif lines:
                yield _decode_paragraph(first, lines)
                lines = []
        if lines:
            yield _decode_paragraph(first, lines)


def _decode_paragraph(line: int, lines: list[bytes]) -> Located:
    raw = b"".join(lines).rstrip(b"\r\n")
    try:
        return line, {"text": raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        return InvalidRow(line, f"is not UTF-8 at byte {error.start}", "not-utf8")


def read_parquet(path: Path) -> Iterator[Located]:
    """Read a Parquet file.

    Raises:
        DataError: it is not a Parquet file, or is incomplete.
    """
    from pyarrow import ArrowException  # 50 MB that the other readers do not need
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=TABLE_BATCH))
            records = (record for batch in batches for record in batch)
            yield from ((item, _drop_nulls(record)) for item, record in enumerate(records, start=1))
    except ArrowException as error:
        problem = f"{path} is not a Parquet file, or is incomplete: {str(error).splitlines()[0]}"
        raise DataError(problem, "a complete Parquet file") from error


def read_hf_dataset(dataset: Any) -> Iterator[Located]:
    """Read a `datasets.Dataset`."""
    batches = dataset.iter(batch_size=TABLE_BATCH)
    records = (
        dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
    )
    yield from ((item, _drop_nulls(record)) for item, record in enumerate(records, start=1))


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
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_paragraphs,
}
