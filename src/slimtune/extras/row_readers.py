"""Streaming readers: one function per kind of file, which yields `(line, record)` or an `InvalidRow`.

A reader continues after an invalid line, and has little of the file in memory. They exist because the readers of
`datasets` and Arrow name no line for a malformed row and stop at the first one.
"""

import contextlib
import csv
import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..core.data.messages import RowError
from ..core.data.rows import FileTypeReader, InvalidRow, Located, Record
from ..core.foundation.formatting import truncate_noting_length
from ..errors import DataError, format_names
from .message_parsing import STRICT_JSON, decode_json_without_duplicate_keys, get_json_type_name

JSON_CHUNK = 1 << 20  # characters of a JSON array read at once
TABLE_BATCH = 4  # records of a Parquet file or dataset read at once; a few bytes of a file can be 1 GB of records
MAX_ROW = 10_000_000
"""Most characters of a row. The longest contexts take fewer; a row of 60 million would take gigabytes to tokenize."""
MAX_COLUMNS = 10_000
_TOO_LONG = f"is longer than {MAX_ROW:,} characters"
_ENCODINGS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_WRONG_BYTE = re.compile("[\udc80-\udcff]")


def _open_text(path: Path, newline: str = "\n") -> IO[str]:
    """Open a text file; a byte that is not UTF-8 becomes a surrogate, so that the reader names its line and goes on.

    Raise DataError for UTF-16 and UTF-32: with their mark at the begin, or with a zero byte in the first character.
    """
    with open(path, "rb") as file:
        begin = file.read(4)
    other = next((name for mark, name in _ENCODINGS.items() if begin.startswith(mark)), None)
    if other or b"\0" in begin:
        other = other or ("UTF-32" if begin.count(0) > 2 else "UTF-16")
        hint = f"convert it: iconv -f {other} -t UTF-8 {shlex.quote(path.name)} > utf8{path.suffix}"
        raise DataError(f"{path} is {other} text", "UTF-8", hint)
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _read_lines(file: IO[str]) -> Iterator[str | None]:
    """Yield the lines of a file, and None for each that is longer than a row may be, whose rest is skipped."""
    read = partial(file.readline, MAX_ROW)
    for text in iter(read, ""):
        if len(text) < MAX_ROW or text[-1] == "\n":
            yield text
        else:
            while (rest := read()) and rest[-1] != "\n":
                pass
            yield None


def _check_utf8(path: Path, line: int, text: str) -> InvalidRow | None:
    if text.isascii() or not (wrong := _WRONG_BYTE.search(text)):
        return None
    shown = truncate_noting_length(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    convert = f"iconv -f CP1252 -t UTF-8 {shlex.quote(path.name)} > utf8{path.suffix}"
    hint = f"save the file as UTF-8 (in Excel: CSV UTF-8), or convert it; from Windows: {convert}"
    return InvalidRow(line, f"is not UTF-8 at character {wrong.start() + 1}: {shown}", "not-utf8", hint=hint)


def _check_object(line: int, value: Any) -> Located:
    if isinstance(value, dict):
        return line, value
    shown = truncate_noting_length(json.dumps(value, ensure_ascii=False))
    return InvalidRow(line, f"is not a JSON object but {get_json_type_name(value)}: {shown}", "not-an-object")


def _describe_json_error(error: Exception) -> str:
    """Return why a text does not parse as JSON, with the column if it is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"does not parse as JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return f"does not parse as JSON ({'nested too deep' if isinstance(error, RecursionError) else 'a huge number'})"


def _read_jsonl(path: Path) -> Iterator[Located]:
    """Read one JSON object per line; blank lines are skipped."""
    with _open_text(path) as file:
        for line, text in enumerate(_read_lines(file), start=1):
            if text is None:
                yield InvalidRow(line, _TOO_LONG, "too-large")
                continue
            if text.isspace():
                continue
            if invalid := _check_utf8(path, line, text):
                yield invalid
                continue
            try:
                value = decode_json_without_duplicate_keys(text)
                yield (line, value) if type(value) is dict else _check_object(line, value)
            except RowError as error:
                yield InvalidRow(line, str(error), error.code)
            except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
                yield InvalidRow(line, f"{_describe_json_error(error)}: {truncate_noting_length(text)}", "bad-json")


def iterate_json_array_or_jsonl(path: Path) -> Iterator[Located]:
    """Read an array of objects item by item, or the file as JSONL if it does not begin with `[`.

    Nothing is read after an item that does not parse, because the begin of the next one is unknown.
    """
    with _open_text(path) as file:
        text = file.read(JSON_CHUNK)
        while text.isspace():
            text = file.read(JSON_CHUNK)
        text = text.lstrip()
        if not text.startswith("["):
            yield from _read_jsonl(path)
            return
        between_items = re.compile(r"[ \t\r\n,]*")
        item, at = 1, 1
        while True:
            at += len(between_items.match(text, at)[0])  # type: ignore[index]  # it always matches
            if text.startswith("]", at):
                if rest := text[at + 1 :].strip() or file.read(JSON_CHUNK).strip():
                    yield InvalidRow(item, f"follows the end of the array: {truncate_noting_length(rest)}", "bad-json")
                return
            try:
                found, end = _decode_item(item, text, at)
            except (ValueError, RecursionError) as error:
                # Perhaps the item is not complete. The text doubles, so that a long item is parsed only a few times.
                too_long = len(text) - at > MAX_ROW
                if not too_long and (more := file.read(max(JSON_CHUNK, len(text) - at))):
                    text, at = text[at:] + more, 0
                    continue
                cause = _TOO_LONG if too_long else _describe_json_error(error)
                shown = truncate_noting_length(text[at : at + MAX_ROW]) or "the array has no end"
                yield InvalidRow(item, f"{cause}; the rest of the file is not read: {shown}", "bad-json")
                return
            yield found if end - at <= MAX_ROW else InvalidRow(item, _TOO_LONG, "too-large")
            item, at = item + 1, end


def _decode_item(item: int, text: str, at: int) -> tuple[Located, int]:
    """Return an item of a JSON array that begins at a position, and where it ends."""
    try:
        value, end = STRICT_JSON.raw_decode(text, at)
        return _check_object(item, value), end
    except RowError as error:
        return InvalidRow(item, str(error), error.code), json.JSONDecoder().raw_decode(text, at)[1]


def _read_csv(path: Path, delimiter: str | None = None) -> Iterator[Located]:
    """Read a table with a header; the line is the one on which a record begins. Raise DataError for a wrong header.

    Without a `delimiter` it is a comma, or the semicolon if the header has semicolons and no comma: so Excel writes
    CSV in languages whose decimal sign is the comma.
    """
    csv.field_size_limit(MAX_ROW)
    header: list[str] = []
    if delimiter is None:
        with _open_text(path, newline="") as file:
            first = next((text for text in _read_lines(file) if text and not text.isspace()), "")
        delimiter = ";" if ";" in first and "," not in first else ","
    with _open_text(path, newline="") as file:
        rows = csv.reader(_read_csv_lines(file), delimiter=delimiter, strict=True)
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
                if len(cells) > len(header) and delimiter == ",":
                    cause += ': a text with a comma in it needs "quotes" around it'
                yield InvalidRow(line, cause, "bad-csv")
            elif len(text := delimiter.join(cells)) > MAX_ROW:
                yield InvalidRow(line, _TOO_LONG, "too-large")
            else:
                yield _check_utf8(path, line, text) or (line, dict(zip(header, cells, strict=True)))


def _read_csv_lines(file: IO[str]) -> Iterator[str]:
    for text in _read_lines(file):
        if text is None:
            raise csv.Error(f"a line {_TOO_LONG}")
        yield text


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    others = [d for d in (",", ";", "\t", "|") if d != delimiter and d in header[0]]
    if len(header) == 1 and others:
        problem = (
            f"its header is one column, {truncate_noting_length(header[0])!r}: the delimiter seems to be {others[0]!r}"
        )
        suffix = ".tsv" if others[0] == "\t" else ".csv" if delimiter == "\t" and others[0] != "|" else None
        hint = f"rename it to {path.stem}{suffix}" if suffix else "write it with commas between the cells, as .csv"
        raise DataError(f"{path}: {problem}", f"cells separated by {delimiter!r}", hint)
    if len(header) > MAX_COLUMNS:
        problem = f"{path}: its header names {len(header):,} columns: {format_names(header, 3)}"
        raise DataError(problem, f"at most {MAX_COLUMNS:,} columns", "remove the columns that are no text")
    name, count = Counter(header).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{path}: its header names {truncate_noting_length(name)!r} twice", "each column once", "rename one of them"
        )


def _read_paragraphs(path: Path) -> Iterator[Located]:
    """Read a text file: each paragraph between blank lines is a record with the column `text`."""
    with _open_text(path) as file:
        lines = enumerate(_read_lines(file), start=1)
        for blank, numbered in itertools.groupby(lines, lambda item: item[1] is not None and item[1].isspace()):
            if blank:
                continue
            first, size, parts = 0, 0, []
            for line, text in numbered:
                first = first or line
                size += MAX_ROW + 1 if text is None else len(text)
                if text is not None and size <= MAX_ROW:
                    parts.append(text)
            whole = "".join(parts).rstrip("\r\n")
            invalid = InvalidRow(first, _TOO_LONG, "too-large") if size > MAX_ROW else _check_utf8(path, first, whole)
            yield invalid or (first, {"text": whole})


def read_text_file_as_one_row(path: Path) -> Iterator[Located]:
    """Read a whole text file as one record with the column `text`, without blank lines at its begin and end."""
    size, parts = 0, []
    with _open_text(path) as file:
        for line, text in enumerate(_read_lines(file), start=1):
            size += MAX_ROW + 1 if text is None else len(text)
            if text is None or size > MAX_ROW:
                hint = f"split it into files of a folder: split -C 5m --additional-suffix={path.suffix} {path.name}"
                yield InvalidRow(line, f"is a document that {_TOO_LONG}", "too-large", hint=hint)
                return
            if invalid := _check_utf8(path, line, text):
                yield invalid
                return
            parts.append(text)
    whole = "".join(parts).replace("\r\n", "\n").strip("\n")
    yield (1, {"text": whole}) if whole.strip() else InvalidRow(1, "is an empty document", "empty-content")


def _read_parquet(path: Path) -> Iterator[Located]:
    """Read a Parquet file; raise DataError if it is not one, or is incomplete."""
    from pyarrow import ArrowException  # 50 MB that the other readers do not need
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            start = 1
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                # A page is decompressed whole, and may be the whole row group.
                if group.total_byte_size > max(group.num_rows, 32) * MAX_ROW:
                    size = group.total_byte_size // max(group.num_rows, 1)
                    cause = f"is in a row group whose rows take {size:,} bytes each, more than {MAX_ROW:,}"
                    yield from (InvalidRow(start + i, cause, "too-large") for i in range(group.num_rows))
                else:
                    yield from _read_arrow_batches(file.iter_batches(TABLE_BATCH, row_groups=[number]), start)
                start += group.num_rows
    except (ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        problem = f"{path} is not a Parquet file, or is incomplete: {(str(error) or repr(error)).splitlines()[0]}"
        raise DataError(problem, "a complete Parquet file") from error


def iterate_hf_dataset_records(dataset: Any) -> Iterator[Located]:
    """Read a `datasets.Dataset`."""
    return _read_arrow_batches(dataset.with_format("arrow").iter(batch_size=TABLE_BATCH))


def _read_arrow_batches(batches: Iterable[Any], start: int = 1) -> Iterator[Located]:
    """Yield the records of Arrow batches or tables, with their numbers from `start`."""
    from pyarrow import types

    for batch in batches:
        # A dictionary's texts are there once, and count for each row.
        dictionaries = [column for column in batch.columns if types.is_dictionary(column.type)]
        size = batch.nbytes + sum(len(column) * column.nbytes for column in dictionaries)
        records: Iterable[Any] | None = None
        if size <= MAX_ROW:
            with contextlib.suppress(ValueError, OverflowError):  # also UnicodeDecodeError
                records = batch.to_pylist()
        if records is None:
            records = (_read_arrow_row(batch.slice(i, 1), start + i) for i in range(batch.num_rows))
        for item, record in enumerate(records, start):
            yield record if isinstance(record, InvalidRow) else (item, _drop_nulls(record))
        start += batch.num_rows


def _read_arrow_row(row: Any, item: int) -> Record | InvalidRow:
    from pyarrow import types

    record, size = {}, 0
    for name, column in zip(row.schema.names, row.columns, strict=True):
        column = column.dictionary_decode() if types.is_dictionary(column.type) else column
        size += column.nbytes
        if size > MAX_ROW:
            return InvalidRow(item, f"takes more than {MAX_ROW:,} bytes", "too-large")
        try:
            record[name] = column.to_pylist()[0]
        except UnicodeDecodeError:
            return InvalidRow(item, f"is not UTF-8 in the column {truncate_noting_length(name)!r}", "not-utf8")
        except (ValueError, OverflowError) as error:  # a time that Python has no value for
            if not types.is_temporal(column.type):  # no format reads one
                return InvalidRow(
                    item,
                    f"has an unreadable {truncate_noting_length(name)!r}: {truncate_noting_length(str(error))}",
                    "bad-cell",
                )
    return record


def _drop_nulls(value: Any) -> Any:
    """Return a record without null keys: in an Arrow table all records have the same keys, and null means absent."""
    if isinstance(value, dict):
        return {k: _drop_nulls(v) for k, v in value.items() if v is not None}
    return [_drop_nulls(v) for v in value] if isinstance(value, list) else value


JSONL, JSON, PARQUET = (
    FileTypeReader(_read_jsonl),
    FileTypeReader(iterate_json_array_or_jsonl),
    FileTypeReader(_read_parquet),
)
CSV, TSV = FileTypeReader(_read_csv), FileTypeReader(partial(_read_csv, delimiter="\t"))
TEXT = FileTypeReader(_read_paragraphs, read_text_file_as_one_row)
SUFFIX_HINTS = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst"), "decompress it first: gunzip -k {name} (bunzip2, unxz, unzstd)"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z"), "unpack it, and name the file or the folder"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV in UTF-8"),
    **dict.fromkeys((".arrow", ".feather"), "name the folder that `datasets` saved, or write it as .parquet"),
    **dict.fromkeys((".bin", ".pkl", ".pickle", ".pt"), "write it as .jsonl or .parquet: pickles are not read"),
}
"""What to do with files that are often given and cannot be read; any other is text that may be renamed."""
TEXT_HINT = "if it is plain text, copy it to {stem}.txt: each paragraph between blank lines becomes a row"
