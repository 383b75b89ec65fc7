"""Opening a data set: a file, a folder of files or a dataset of the Hub, as rows with their file and line.

.jsonl .ndjson   one JSON object a line                .csv .tsv   a header, then one record a row
.json            an array of objects, or as .jsonl     .parquet    one record a row
.txt .md         paragraphs between blank lines; the whole file with the format "document", which .md must be given
a folder         such files of one kind, in the order of their names
a folder saved by `datasets`, or the id of a dataset   org/name[/config][:split]; the split is train by default

A wrong path is a usage error, wrong contents are a data error. Up to ten invalid rows are reported at once, so that
nobody repairs a file one run at a time.
"""

import dataclasses
import itertools
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..core.adapters.config_fields import FieldError
from ..core.config.recipe_loading import DATA_FILES
from ..core.data.rows import ROW_READERS, FileTypeReader, InvalidRow, Located, Row, RowErrorCollector, RowIterable
from ..core.foundation.chat_rendering import CHAT_TEMPLATES
from ..core.foundation.files import parse_hub_dataset_id_or_none
from ..core.foundation.formatting import truncate_noting_length
from ..errors import DataError, UsageError, format_names, suggest
from .row_columns import (
    ColumnMapping,
    describe_missing_column_effect,
    detect_row_format_name,
    load_row_formats,
    parse_row_or_error,
    require_known_format_and_roles,
)
from .row_formats.text_chats import convert_text_row_to_chat, is_prompt_with_answer_texts
from .row_readers import SUFFIX_HINTS, TEXT_HINT, iterate_hf_dataset_records

DETECTION_ROWS = 20  # records from which a format is recognized
CHAT_EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values that a row may have in a column without having the column
MAX_COLUMN_SETS = 1000  # sets of columns, and unused columns, that are remembered
SPLITS = {"train": "train", "training": "train", "valid": "validation", "validation": "validation", "val": "validation",
          "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip
Part = tuple[str | None, Callable[[], Iterator[Located]]]
"""One file of a data set: its name (None if it is the only one), and a function that reads it from the start."""


@dataclass
class UnusedColumn:
    """A column that the format of a file does not use, and the rows that have a value in it."""

    name: str
    effect_of_missing: str  # how the rows change without it; empty: it is metadata
    row_count: int = 0
    line: int = 0  # the first of them
    file: str | None = None


class RowFileReader(RowIterable):
    """The rows of a file, a folder or a dataset; made by `open_rows`.

    Iterating yields `Row | InvalidRow` in the order of the file, each time from the start, in constant memory.
    Its properties are known after an iteration.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        column_mapping: ColumnMapping,
        files_with_readers: list[Part],
        format_is_given: bool,
        split_special_tokens: bool = True,
        apply_chat_template: bool = True,
    ) -> None:
        self.path, self.format, self._choice, self._parts = path, format, column_mapping, files_with_readers
        self._given, self._split_special_tokens = format_is_given, split_special_tokens
        self._apply_chat_template = apply_chat_template
        self.texts_as_chats = 0
        self.ignored_columns = sorted(column_mapping.ignored_columns)
        self._has_text = _is_text_file(Path(files_with_readers[0][0] or path))
        self._used: dict[str, None] = {}
        self._unused: dict[str, UnusedColumn] = {}

    def __iter__(self) -> Iterator[Row | InvalidRow]:
        used: dict[str, None] = {}
        unused: dict[str, UnusedColumn] = {}
        self._used, self._unused = used, unused
        self.texts_as_chats = 0  # rows whose prompt and answers are texts and were read as a chat
        unused_of: dict[tuple[str, ...], list[UnusedColumn]] = {}  # most records have the same columns
        for number, (file, read) in enumerate(self._parts, 1):
            for found in read():
                if isinstance(found, InvalidRow):
                    yield dataclasses.replace(found, file=file)
                    continue
                line, record = found
                if self.rows_are_text_files:
                    line = number
                if (columns := unused_of.get(present := tuple(record))) is None:
                    names = self._choice.find_unused(present, self.format)
                    for name in names:
                        loss = describe_missing_column_effect(name, self.format, self._given)
                        if loss or len(unused) < MAX_COLUMN_SETS:
                            unused.setdefault(name, UnusedColumn(name, loss, 0, line, file))
                    used |= dict.fromkeys(c for c in present if c not in names)
                    columns = [unused[name] for name in names if name in unused]
                    if len(unused_of) < MAX_COLUMN_SETS:
                        unused_of[present] = columns
                for column in columns:
                    if record[column.name] not in EMPTY:
                        if not column.row_count:
                            column.line, column.file = line, file
                        column.row_count += 1
                renamed = self._choice.apply(record)
                row = parse_row_or_error(renamed, self.format, line, file)
                if self._apply_chat_template and isinstance(row, Row) and is_prompt_with_answer_texts(row, renamed):
                    row = convert_text_row_to_chat(row)
                    self.texts_as_chats += 1
                if self._choice.columns_by_role and isinstance(row, InvalidRow):
                    row = dataclasses.replace(row, cause=self._choice.use_file_names(row.cause))
                if not self._split_special_tokens and isinstance(row, Row):
                    row = dataclasses.replace(row, special_tokens_as_text=False)
                yield row

    @property
    def columns(self) -> list[str]:
        """The columns that are used."""
        return [column for column in self._used if column not in self._choice.ignored_columns]

    @property
    def missing_ignored_columns(self) -> list[str]:
        """The columns that are to be left out and that no row has."""
        return [name for name in self.ignored_columns if "." not in name and name not in self._used]

    @property
    def unused_columns(self) -> list[UnusedColumn]:
        """The columns that are not used and have a value in some row."""
        return [column for column in self._unused.values() if column.row_count]

    @property
    def lossy_columns(self) -> list[UnusedColumn]:
        """The unused columns without which rows mean something else."""
        return [column for column in self.unused_columns if column.effect_of_missing]

    @property
    def has_paragraphs(self) -> bool:
        """Whether the rows are the paragraphs of text files."""
        return self._has_text and self.format != "document"

    @property
    def rows_are_text_files(self) -> bool:
        """Whether each row is a whole text file; its line is the number of the file in its folder, from 1."""
        return self._has_text and self.format == "document"

    def find_file(self, line: int) -> str:
        """Return the name of the file in a folder that is the row with this line; empty: it is not a whole file."""
        return self._parts[line - 1][0] or "" if self.rows_are_text_files else ""

    def require_used_columns(self) -> None:
        """Raise DataError for unused columns without which rows mean something else; after an iteration."""
        if columns := self.lossy_columns:
            known = load_row_formats()[self.format]
            expected = f"columns of the format {self.format}: {', '.join((*known.required, *known.optional))}"
            effect = describe_effect_of_ignoring_columns(columns)
            problem = f"rows have a column that is not used and changes what they mean: {effect}"
            raise DataError(f"{self.path}: {problem}", expected, make_unused_column_hint(columns))

    def create_error_collector(self) -> RowErrorCollector:
        """Return an empty collection of errors that says what the rows should look like."""
        if self.format in ("chat", "unknown"):
            return RowErrorCollector(self.path, f"rows like {CHAT_EXAMPLE}", "repair or remove these rows")
        expected = f"rows of the format {self.format}: {load_row_formats()[self.format]}"
        return RowErrorCollector(self.path, expected, "repair or remove these rows")


def describe_effect_of_ignoring_columns(unused_columns: Collection[UnusedColumn]) -> str:
    """Return how rows change without columns: `'label': rows that it rates low would be …`."""
    losses = dict.fromkeys(column.effect_of_missing for column in unused_columns)
    return "; ".join(
        f"{format_names(c.name for c in unused_columns if c.effect_of_missing == loss)}: {loss}" for loss in losses
    )


def make_unused_column_hint(columns: Collection[UnusedColumn]) -> str:
    """Return what to do about unused columns without which rows mean something else."""
    names = [column.name for column in columns]
    flags = " ".join(f"--ignore-columns {shlex.quote(name)}" for name in names)
    is_label = any(column.name.casefold() in ("label", "labels") for column in columns)
    uses = {
        "it is the class of each row": "--format classification (--task classification in training)",
        "it says whether the answer is good": "--format unpaired-preference (--task kto in training)",
    }
    use = "".join(f"if {meaning}: {flags}; " for meaning, flags in uses.items()) * is_label
    return f"{use}use it by another --format or --column, or leave it out: {flags} (data.ignore_columns in a recipe)"


def open_rows(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
    split_special_tokens: bool = True,
    apply_chat_template: bool = True,
    expected_formats: Sequence[str] = (),
) -> RowFileReader:
    """Open a data set, see the module; its format is recognized from the columns of its first rows, if it is not given.

    `columns` maps the format's name of a column to the file's name of it. `ignore_columns` are left out, as if the rows
    did not have them; `messages.key` leaves a key out of messages. `split_special_tokens` says whether special tokens
    typed in a document are ordinary text, `apply_chat_template` whether the prompts and answers of pairs, lists and
    ratings that are texts become a chat. `expected_formats` are those that a task takes, for the hint of an error.

    Raises:
        UsageError: the file does not exist or cannot be read, the format is unknown, or a renamed column is missing.
        DataError: the file is empty, its format is unclear, or the files of a folder have several formats.
    """
    path, choice = Path(path), ColumnMapping(dict(columns or {}), frozenset(ignore_columns))
    require_known_format_and_roles(format, choice.columns_by_role)
    parts = list_dataset_file_names_with_readers(path, format)
    if format is None and Path(parts[0][0] or path).suffix.lower() == ".md":
        hint = "--format document learns from each file as a whole; --format text makes each paragraph a row"
        raise UsageError(f"{path} is Markdown, whose parts are no rows of their own", "a format for it", hint)
    formats: dict[str, str | None] = {}
    empty = True
    for file, read in parts:
        valid = (found[1] for found in read() if not isinstance(found, InvalidRow))
        if records := list(itertools.islice(valid, DETECTION_ROWS)):
            where = path / file if file else path
            formats.setdefault(detect_row_format_name(where, records, choice, format, expected_formats), file)
        empty = empty and not records and not any(True for _ in read())
    if empty:
        raise DataError(f"{path} is empty: it has no row", f"rows like {CHAT_EXAMPLE}")
    if len(formats) > 1:
        (one, first), (other, second) = list(formats.items())[:2]
        problem = f"{path} has files of several formats: {first} is {one}, {second} is {other}"
        raise DataError(problem, "files of one format", "name one file, or move the others to another folder")
    return RowFileReader(
        path,
        next(iter(formats), format or "unknown"),
        choice,
        parts,
        format is not None,
        split_special_tokens,
        apply_chat_template,
    )


def read_rows(path: str | Path, **options: Any) -> list[Row]:
    """Return all rows of a data set; arguments and errors: `open_rows` and `RowFileReader.require_valid_rows`."""
    return list(open_rows(path, **options).require_valid_rows())


def list_dataset_file_names_with_readers(path: Path, row_format: str | None = None) -> list[Part]:
    """Return the name and the reader of each file of a data set; raise UsageError if there is none."""
    if os.path.isfile(path):  # False for a name that no file system has, where Path.is_file may raise
        return [(None, _make_reader(path, row_format))]
    if os.path.isdir(path):
        return _find_folder_parts(path, row_format)
    if (dataset := parse_hub_dataset_id_or_none(path)) is not None:
        return [(None, partial(_read_hub_dataset, *dataset))]
    expected = f"a file of rows ({', '.join(ROW_READERS.names())}), a folder, or a dataset's id"
    if os.path.exists(path):
        raise UsageError(f"{path} is a pipe or a device, which cannot be read twice", expected, "write it to a file")
    has_folder = os.path.isdir(path.parent)
    names = sorted(p.name for p in path.parent.iterdir()) if has_folder else []
    missing_folder = "" if has_folder else f" (there is no folder {path.parent} either)"
    raise UsageError(f"no such file: {path}{missing_folder}{suggest(path.name, names)}", expected)


def _find_folder_parts(path: Path, format: str | None) -> list[Part]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        hint = f"name it: {path / (splits or ['train'])[0]}"
        raise UsageError(f"{path} contains the splits {format_names(splits)}", "one of them", hint)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [(None, partial(_read_saved_dataset, path))]
    found = path.rglob("*") if format == "document" else path.iterdir()
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
    files = sorted(p for p in visible if p.suffix.lower() in ROW_READERS.names())
    whole = format == "document" and all(map(_is_text_file, files))
    if not whole:  # a README beside the rows is none of them
        files = [f for f in files if f.suffix.lower() != ".md"] or files
    names = format_names(f.name for f in files)
    if special := [f.name for f in files if not f.is_file()]:
        problem = f"{path} contains {format_names(special)}, which can be read as no file"
        raise UsageError(problem, "regular files of rows", "remove it: a folder, a pipe or a broken link")
    if not files:
        contents = format_names(sorted(p.name for p in path.iterdir())) or "nothing"
        raise UsageError(
            f"{path} is a folder without a file of rows; it contains {contents}", ", ".join(ROW_READERS.names())
        )
    if len({f.suffix.lower() for f in files}) > 1 and not whole:
        hint = "name one of its files, or move the others to another folder"
        raise UsageError(f"{path} contains several kinds of files: {names}", "files of one kind", hint)
    first_words = {re.split(r"[-_.\d]", f.stem.lower())[0] for f in files}
    if len({SPLITS[word] for word in first_words if word in SPLITS}) > 1 and not whole:
        hint = f"name one of its files: {files[-1]}"
        raise UsageError(f"{path} contains several splits: {names}", "training rows apart from test rows", hint)
    return [(str(f.relative_to(path)), _make_reader(f, format)) for f in files]


@cache
def _load_readers() -> dict[str, FileTypeReader]:
    return ROW_READERS.load_all()


def _is_text_file(path: Path) -> bool:
    reader = _load_readers().get(path.suffix.lower())
    return reader is not None and reader.read_whole_file is not None


def _make_reader(path: Path, format: str | None) -> Callable[[], Iterator[Located]]:
    suffix, readers = path.suffix.lower(), _load_readers()
    if suffix not in readers:
        problem = f"{path} has the unknown suffix {suffix!r}{suggest(suffix, readers)}"
        hint = SUFFIX_HINTS.get(suffix, TEXT_HINT).format(name=shlex.quote(path.name), stem=path.stem)
        raise UsageError(problem, f"a file of rows: {', '.join(readers)}", hint)
    whole = readers[suffix].read_whole_file if format == "document" else None
    read_file = whole or readers[suffix].read_records

    def read() -> Iterator[Located]:
        try:
            if path.stat().st_size:  # an empty file is not opened: those of /proc wait for ever
                yield from read_file(path)
        except OSError as error:
            problem = f"{path} cannot be read: {error.strerror or error}"
            raise UsageError(problem, hint="check its permissions") from error

    return read


def _read_saved_dataset(path: Path) -> Iterator[Located]:
    from datasets import load_from_disk  # importing it takes seconds, and most data sets are files

    try:
        return iterate_hf_dataset_records(load_from_disk(str(path)))
    except Exception as error:  # damaged files of a saved data set raise anything
        if getattr(error, "errno", None):
            raise
        cause = (str(error) or repr(error)).splitlines()[0]
        raise DataError(f"{path} is damaged: {cause}", "a folder that `save_to_disk` of `datasets` wrote") from error


def _read_hub_dataset(name: str, config: str | None, split: str) -> Iterator[Located]:
    from datasets import load_dataset

    try:
        return iterate_hf_dataset_records(load_dataset(name, config, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        reason = truncate_noting_length(str(error), 300)
        problem = f"there is no file {name!r}, and it cannot be loaded from the Hub: {reason}"
        expected = "a file, a folder, or a dataset as org/name, org/name:split or org/name/config:split"
        raise UsageError(problem, expected, "check the name and the connection") from error


def list_missing_data_file_errors(recipe_tree: Mapping[str, Any]) -> list[FieldError]:
    """Return the errors for the files of a recipe's `data` that do not exist; the Hub's datasets are not looked up."""
    errors = []
    data = recipe_tree.get("data", {})
    for name in DATA_FILES:
        if not isinstance(given := data.get(name), str | Path) or not str(given):
            continue
        path, is_rows = Path(given), name not in ("general_text", "chat_template")
        known = CHAT_TEMPLATES.names() if name == "chat_template" else ()
        if str(path) in known or path.is_file() or (is_rows and (path.is_dir() or parse_hub_dataset_id_or_none(path))):
            continue
        names = [*known, *(p.name for p in path.parent.iterdir())] if path.parent.is_dir() else known
        errors.append(FieldError(f"data.{name}", f"there is no file {str(path)!r}{suggest(path.name, names)}"))
    return errors
