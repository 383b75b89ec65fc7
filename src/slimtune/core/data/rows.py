"""Rows, and what the core asks of the parts that make them: a format of records, a reader of files, a source of rows.

A format and a reader are one entry of a registry each; `slimtune/parts.py` names them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ..foundation.registry import Registry
from .messages import Messages

if TYPE_CHECKING:
    from .tokenized_dataset import TokenizedDataset

Record = Mapping[str, Any]
Fields = dict[str, Any]  # of a `Row`
MAX_ERRORS = 10  # invalid rows that one error message names


@dataclass(frozen=True)
class Row:
    """One row: a conversation, a text, or a prompt with its answers."""

    messages: Messages  # the conversation, or what a pair's answers share as their prompt; empty for a row of texts
    line: int  # in the file (JSONL, CSV, text), or the number of the item, from 1
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the functions that the assistant may call
    learned: tuple[bool, ...] | None = None  # for each message whether it is learned; None: every assistant turn is
    prompt: str | None = None  # the text before the completion; it is not learned
    completion: str | None = None  # the text that is learned
    chosen: Messages | str | None = None  # the better answer of a preference pair
    rejected: Messages | str | None = None
    answers: tuple[Messages | str, ...] | None = None  # of a ranked list, the best first
    scores: tuple[float, ...] | None = None  # of the answers, higher is better
    is_good: bool | None = None  # whether the answer is good, by its label; None: it has no label
    labels: tuple[str, ...] | None = None  # the classes that the messages, or the prompt, belong to: one, or any number
    is_prompt: bool = False  # whether the messages, or the prompt, are to be answered; `labels` are its record as JSON
    file: str | None = None  # its name, if rows come from several
    special_tokens_as_text: bool = False  # whether special tokens typed in its text are ordinary text
    findings: tuple[tuple[str, str], ...] = ()  # what its format found: codes of the data report, with an example

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of its labels: its classes, or "True" for a good answer, "False" for a bad one; None: no label."""
        return self.labels if self.is_good is None else (str(self.is_good),)


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used: what is wrong, and the kind of error in kebab case; `line` and `file` as for `Row`."""

    line: int
    cause: str
    code: str
    file: str | None = None
    hint: str = ""  # what to do, if it is more than to repair or remove the row


def split_preference_into_rows(row: Row) -> list[Row]:
    """Return the answers of a preference pair, or of a ranked list, as rows, the best first; any other row as it is.

    Only what follows the prompt is learned.
    """
    answers = row.answers
    if row.chosen is not None and row.rejected is not None:
        answers = (row.chosen, row.rejected)
    if answers is None:
        return [row]
    single = replace(row, chosen=None, rejected=None, answers=None, scores=None)
    texts = [answer for answer in answers if isinstance(answer, str)]
    if not row.messages and len(texts) == len(answers):
        return [replace(single, prompt=row.prompt or "", completion=text) for text in texts]
    chats = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]
    learned = [(False,) * len(row.messages) + tuple(m["role"] == "assistant" for m in chat) for chat in chats]
    return [replace(single, messages=[*row.messages, *c], learned=mask) for c, mask in zip(chats, learned, strict=True)]


@dataclass(frozen=True)
class RowFormat:
    """A format of records: its columns, and the function that turns a record into the fields of a `Row`.

    `read` raises `RowError`. A format that is not `by_name_only` is recognized by its columns.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Fields]
    one_of: tuple[str, ...] = ()  # of these optional columns rows have one
    takes_all_columns: bool = False  # none is unused: its rewards may need any
    by_name_only: bool = False  # other formats have the same columns, so that it must be named
    is_suggested: bool = True  # for a file whose columns have other names
    note: str = ""  # what such a suggestion says about it
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other names that people give to a column
    partner_columns: tuple[str, ...] = ()  # that belong to its rows, unless it is named
    window_cutter: "Callable[[TokenizedDataset, int, Any, int | None], TokenizedDataset] | None" = None
    """Cuts tokenized rows of any length into windows: rows, most tokens, tokenizer, seed of the cuts (None: fixed)."""

    def __str__(self) -> str:
        return ", ".join([*self.required, *([" or ".join(self.one_of)] if self.one_of else [])])

    def fits(self, present: Collection[str]) -> bool:
        """Return whether these columns are those of the format."""
        return set(self.required) <= set(present) and (not self.one_of or not set(self.one_of).isdisjoint(present))


Located = tuple[int, dict[str, Any]] | InvalidRow
"""A record with its line or item number, or what is wrong there."""


@dataclass(frozen=True)
class FileTypeReader:
    """Reads files of one suffix, record by record; it goes on after an invalid one. `read` raises OSError, DataError.

    `read_whole_file` reads the whole file as one record with the column `text`; None: files of this kind are no texts.
    """

    read_records: Callable[[Path], Iterator[Located]]
    read_whole_file: Callable[[Path], Iterator[Located]] | None = None


class RowErrorCollector:
    """Collects the errors of one file; `check` raises them as one error."""

    def __init__(self, path: str | Path, expected: str = "", hint: str = "") -> None:
        self.path, self.expected, self.hint = Path(path), expected, hint
        self.messages: list[str] = []

    def add(self, line: int, cause: str, file: str | None = None, hint: str = "") -> None:
        self.messages.append(f"{self.path / file if file else self.path}:{line}: {cause}")
        self.hint = hint or self.hint

    @property
    def full(self) -> bool:
        """Whether there are as many errors as one message names."""
        return len(self.messages) >= MAX_ERRORS

    def check(self) -> None:
        """Raise DataError if there is any error."""
        if self.messages:
            rest = [f"(the first {MAX_ERRORS} errors; the rest was not checked)"] if self.full else []
            raise DataError("\n".join([*self.messages, *rest]), self.expected, self.hint)


class RowIterable(ABC):
    """The rows of a data set, in order, from the start in each iteration.

    `format` is a name of `ROW_FORMATS`, or "unknown" if no record can be read.
    """

    path: Path
    format: str

    @abstractmethod
    def __iter__(self) -> Iterator[Row | InvalidRow]: ...

    @abstractmethod
    def create_error_collector(self) -> RowErrorCollector:
        """Return an empty collection of errors that says what the rows should look like."""

    @abstractmethod
    def require_used_columns(self) -> None:
        """Raise DataError for columns without which rows mean something else; after an iteration."""

    def require_valid_rows(self) -> Iterator[Row]:
        """Yield the rows; at the end, or after ten invalid ones, raise DataError that names them with file and line."""
        errors = self.create_error_collector()
        for row in self:
            if isinstance(row, Row):
                yield row
            else:
                errors.add(row.line, row.cause, row.file, row.hint)
            if errors.full:
                break
        errors.check()
        self.require_used_columns()

    @property
    def window_cutter(self) -> "Callable[[TokenizedDataset, int, Any, int | None], TokenizedDataset] | None":
        """How rows of any length become windows (see `RowFormat`); None: a row is an example."""
        return ROW_FORMATS.load(self.format).window_cutter if self.format in ROW_FORMATS.names() else None


ROW_FORMATS: Registry[RowFormat] = Registry("slimtune.row_formats", "data format")
ROW_READERS: Registry[FileTypeReader] = Registry("slimtune.row_readers", "kind of file")  # by suffix: ".jsonl"
ROW_SOURCES: Registry[Callable[..., RowIterable]] = Registry("slimtune.row_sources", "source of rows")
"""Functions that open a data set: `load("files")(path, format=None, columns={}, ignore_columns=())`.

They raise UsageError for a file, a format or a column that does not exist, and DataError for unclear or empty contents.
"""
