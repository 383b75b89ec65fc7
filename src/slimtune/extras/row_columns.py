"""Which columns of a record a format reads: renamed and left out ones, the format of a file, unused columns."""

import contextlib
import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core.data.messages import RowError
from ..core.data.rows import ROW_FORMATS, InvalidRow, Record, Row, RowFormat
from ..errors import DataError, UsageError, format_names, suggest
from .column_guesses import (
    list_hinted_roles,
    make_column_flags_and_doubt,
    suggest_format_by_column_names,
)
from .message_parsing import parse_list_or_json_array


@cache
def load_row_formats() -> dict[str, RowFormat]:
    """Return all formats by name."""
    return ROW_FORMATS.load_all()


def parse_row_or_error(record: Record, format_name: str, line: int, file: str | None = None) -> Row | InvalidRow:
    """Return a record as a row of a format, or what is wrong with it."""
    try:
        known = load_row_formats()[format_name]
        for column in known.required:
            if column not in record:
                present = f"(keys here: {format_names(record) or 'none'})"
                raise RowError(f"has no {column!r}{suggest(column, record)} {present}", "missing-column")
        return Row(line=line, file=file, **known.read(record))
    except RowError as error:
        return InvalidRow(line, str(error), error.code, file, error.hint)


MOST_HINTED_FORMATS = 2  # that a task takes, if a hint names the columns of the first; cross-entropy takes many
_RATED = "rows that it rates low would be learned like the others"
_MEDIA = "only text is learned"
_TREE = "each row is one message of a conversation, not a text of its own"
_CONTEXT = "the model would not read it"
COLUMN_MEANINGS = {
    **dict.fromkeys(("label", "labels", "score", "scores", "rating", "ratings", "reward", "rewards"), _RATED),
    **dict.fromkeys(("weight", "weights"), "every row would count the same"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("role", "parent_id"), _TREE),
    **dict.fromkeys(("chosen", "rejected"), "preference pairs have it"),
    **dict.fromkeys(("system", "system_prompt", "tools", "functions", "history", "context", "documents"), _CONTEXT),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "the model would not learn it"),
}
"""Columns without which a row means something else, and what would happen to the rows without them."""


@dataclass(frozen=True)
class ColumnMapping:
    """How the columns of a file are read: renamed (role → column) and left out (a column, or `messages.key`)."""

    columns_by_role: Mapping[str, str]
    ignored_columns: Collection[str] = ()

    def apply(self, record: Record) -> Record:
        """Return a record with its columns renamed; one that already has a role's name is dropped."""
        if not self.columns_by_role and not self.ignored_columns:
            return record
        taken = {*self.columns_by_role, *self.columns_by_role.values(), *self.ignored_columns}
        rest = {k: v for k, v in record.items() if k not in taken}
        chosen = rest | {role: record[column] for role, column in self.columns_by_role.items() if column in record}
        for name in self.ignored_columns:
            column, dot, key = name.partition(".")
            if dot and column in chosen:
                with contextlib.suppress(RowError):  # `parse_row_or_error` says it
                    chosen[column] = [_drop_key(turn, key) for turn in parse_list_or_json_array(chosen[column], column)]
        return chosen

    def use_file_names(self, cause: str) -> str:
        """Return what is wrong with a row with the file's own names of its columns."""
        for role, column in self.columns_by_role.items():
            if cause.startswith(f"{role}["):  # messages[3] has …
                cause = column + cause.removeprefix(role)
            cause = cause.replace(repr(role), repr(column))
        return cause

    def find_unused(self, present: Iterable[str], format: str) -> tuple[str, ...]:
        """Return those of a record's columns that a format does not use and that are not left out by name."""
        known = load_row_formats()[format]
        if known.takes_all_columns:
            return ()
        used = {self.columns_by_role.get(role, role) for role in (*known.required, *known.optional)}
        return tuple(column for column in present if column not in used and column not in self.ignored_columns)


def _drop_key(turn: Any, key: str) -> Any:
    """Return a message without a key; role and content stay, and the name of a tool that returned a result."""
    if not isinstance(turn, dict) or key in ("role", "content"):
        return turn
    if turn.get("role") == "tool" and key in ("name", "tool_call_id"):
        return turn
    return {k: v for k, v in turn.items() if k != key}


def describe_missing_column_effect(column: str, format_name: str, format_is_given: bool) -> str:
    """Return how rows of a format change without a column; empty: it is metadata.

    `format_is_given`: the format was named, not recognized from the columns.
    """
    name = column.casefold()
    partner = (
        not format_is_given
        and format_name in load_row_formats()
        and name in load_row_formats()[format_name].partner_columns
    )
    return COLUMN_MEANINGS.get(name, "") or ("it seems to belong to each text" if partner else "")


def require_known_format_and_roles(format_name: str | None, columns_by_role: Mapping[str, str]) -> None:
    """Raise UsageError for an unknown format, or for a role of `--column` that the format does not have."""
    known = load_row_formats()
    if format_name is not None and format_name not in known:
        problem = f"there is no data format {format_name!r}{suggest(format_name, known)}"
        raise UsageError(problem, f"one of {format_names(known)}", "see docs/data.md")
    formats = known.values() if format_name is None else [known[format_name]]
    roles = list(dict.fromkeys(column for f in formats for column in (*f.required, *f.optional)))
    for role, column in columns_by_role.items():
        if role not in roles:
            owner = f"the format {format_name}" if format_name else "any format"
            problem = f"--column {role}={column}: {role!r} is not a column of {owner}{suggest(role, roles)}"
            raise UsageError(problem, f"ROLE=COLUMN, with a role of {format_names(roles, most=20)}")


def detect_row_format_name(
    path: Path,
    records: Iterable[Record],
    column_mapping: ColumnMapping,
    format: str | None = None,
    task_formats: Sequence[str] = (),
) -> str:
    """Return the format of a file from its first records; if it is given, only its columns are checked.

    `task_formats` are those that a task takes; if they are few, a hint names the columns of the first.

    Raise UsageError if no record has a renamed column (role → column), DataError if no format fits, several do, or no
    record has the columns of the given one.
    """
    records = list(records)
    present = list(dict.fromkeys(key for record in records for key in record))
    for role, column in column_mapping.columns_by_role.items():
        if column not in present:
            problem = f"--column {role}={column}: {path} has no column {column!r}{suggest(column, present)}"
            raise UsageError(problem, f"one of {format_names(present)}")
    known = load_row_formats()
    found_columns, read = present, [*map(column_mapping.apply, records)]
    present = list(dict.fromkeys(key for record in read for key in record))
    if format is not None:
        if not known[format].fits(present):
            raise _make_missing_columns_error(path, format, records, column_mapping)
        return format
    file_records, records = records, read
    fitting = [name for name, f in known.items() if not f.by_name_only and f.fits(present)]
    named = set(column_mapping.columns_by_role)  # a role that the user names is not left unread
    reading_all = [n for n, f in known.items() if f.fits(present) and named <= {*f.required, *f.optional}]
    if named and not set(fitting) & set(reading_all):
        fitting = reading_all or fitting
    if len(fitting) > 1:  # a misspelled column in one row is the fault of that row, which reading names
        most = [n for n in fitting if 2 * sum(known[n].fits(list(record)) for record in records) > len(records)]
        fitting = most or fitting
    if len(fitting) == 2 and "text" in fitting:  # Alpaca's own rows: the text repeats the other columns
        (other,) = set(fitting) - {"text"}
        if all(_is_rendering(record, other) for record in records):
            return other
    if len(fitting) == 1:
        return fitting[0]
    columns_of_formats = "; ".join(f"{name}: {f}" for name, f in known.items())
    expected = f"the columns of one format ({columns_of_formats})"
    if fitting:
        problem = f"{path} may be {' or '.join(fitting)}: its rows have {format_names(present)}"
        raise DataError(problem, expected, f"--format {fitting[0]}, or another of them")
    hinted_format = task_formats[0] if 0 < len(task_formats) <= MOST_HINTED_FORMATS else None
    flags, misspelled = _suggest_flags(present) if hinted_format is None else ([], [])
    if hinted_format is not None:
        columns_of_formats = "; ".join(f"{name}: {known[name]}" for name in task_formats)
        expected = f"rows of the task ({columns_of_formats})"
    hints = "".join(f"; did you mean {role!r} for {column!r}?" for role, column in misspelled)
    problem = f"{path} has no known format: its rows have {format_names(found_columns) or 'no columns'}{hints}"
    hint = f"try {', or '.join(flags)}" if flags else _make_format_hint(hinted_format, file_records, column_mapping)
    if hinted_format is None and not flags:
        by_name = (name for name, f in known.items() if f.by_name_only and f.fits(present))
        hint += "".join(f"; or --format {name}, whose columns they have" for name in by_name)
    raise DataError(problem, expected, hint)


def _make_format_hint(format: str | None, records: list[Record], mapping: ColumnMapping) -> str:
    """Return flags with which a file has a format: the given one, or the one that fits the names of its columns."""
    roles = {name: list_hinted_roles(name, f.required) for name, f in load_row_formats().items()}
    chosen = format or suggest_format_by_column_names(roles, records) or "instruction"
    flags, unsure = _make_flags(chosen, records, mapping)
    named = f"--format {chosen} " if format is None else ""
    others = "; conversations: --column messages=COLUMN" if format is None and "COLUMN" in flags else ""
    return f"try {named}{flags}{f' ({unsure})' * bool(unsure)}{others}"


def _make_flags(format: str, records: list[Record], mapping: ColumnMapping) -> tuple[str, str]:
    """Return the flags for a format's columns, those that are given among them, and what is unsure about them."""
    roles = list_hinted_roles(format, load_row_formats()[format].required)
    given = {role: column for role, column in mapping.columns_by_role.items() if role in roles}
    rest = [{k: v for k, v in r.items() if k not in (*given.values(), *mapping.ignored_columns)} for r in records]
    flags, unsure = make_column_flags_and_doubt(format, [role for role in roles if role not in given], rest)
    kept = [f"--column {shlex.quote(f'{role}={column}')}" for role, column in given.items()]
    return " ".join([*kept, *([flags] if flags else [])]), unsure


def _make_missing_columns_error(path: Path, format: str, records: list[Record], mapping: ColumnMapping) -> DataError:
    """Return the error for a file no row of which has the columns of the format that it is to be read as."""
    known = load_row_formats()[format]
    columns = list(dict.fromkeys(key for record in records for key in record))
    present = {*columns, *mapping.columns_by_role}
    missing = [repr(column) for column in known.required if column not in present]
    if known.one_of and present.isdisjoint(known.one_of):
        missing.append(" or ".join(map(repr, known.one_of)))
    problem = f"{path} has no column {', '.join(missing)}: its rows have {format_names(columns) or 'no columns'}"
    flags, unsure = _make_flags(format, records, mapping)
    return DataError(
        problem, f"rows of the format {format}: {known}", f"name its columns: {flags}{f' ({unsure})' * bool(unsure)}"
    )


def _suggest_flags(present: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return flags with which rows of these columns have a format, and columns that are misspelled (role, column)."""
    names = {column.casefold(): column for column in present}
    formats = load_row_formats().values()
    synonyms = {role: others for f in formats for role, others in f.synonyms.items()}
    flags: list[str] = []
    misspelled: list[tuple[str, str]] = []
    for name, f in load_row_formats().items():
        if f.one_of:
            continue
        found: dict[str, str] = {}
        for role in (*f.required, *f.optional):
            known = next((n for n in (role, *synonyms.get(role, ())) if n in names), None)
            if known is not None:
                found[role] = names[known]
            elif close := difflib.get_close_matches(role, names, 1, 0.8):
                found[role] = names[close[0]]
                misspelled.append((role, found[role]))
        if f.is_suggested and not f.by_name_only and set(f.required) <= set(found):
            pairs = [f"{role}={column}" for role, column in found.items() if role != column]
            note = f" ({f.note})" if f.note else ""
            flags.append(" ".join([f"--format {name}", *(f"--column {shlex.quote(pair)}" for pair in pairs)]) + note)
    return flags, list(dict.fromkeys(misspelled))


def _is_rendering(record: Record, format: str) -> bool:
    """Return whether the `text` of a record contains every text of its row in another format."""
    row, text = parse_row_or_error(record, format, 1), record.get("text")
    if isinstance(row, InvalidRow) or not isinstance(text, str):
        return False
    texts = [row.prompt or "", row.completion or "", *(m["content"] for m in row.messages)]
    parts = [part.strip() for whole in texts for part in whole.split("\n\n")]  # an input stands apart in `text`
    return any(parts) and all(part in text for part in parts)
