"""Which columns of a record a format reads: renamed and left out ones, the format of a file, unused columns."""

import contextlib
import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core.data.messages import RowError
from ..core.data.rows import ROW_FORMATS, InvalidRow, Record, Row, RowFormat
from ..errors import DataError, UsageError, format_names, suggest
from .message_parsing import parse_list_or_json_array


@cache
def load_row_formats() -> dict[str, RowFormat]:
    """Return all formats by name."""
    return ROW_FORMATS.load_all()


def parse_row_or_error(record: Record, format: str, line: int, file: str | None = None) -> Row | InvalidRow:
    """Return a record as a row of a format, or what is wrong with it."""
    try:
        known = load_row_formats()[format]
        for column in known.required:
            if column not in record:
                present = f"(keys here: {format_names(record) or 'none'})"
                raise RowError(f"has no {column!r}{suggest(column, record)} {present}", "missing-column")
        return Row(line=line, file=file, **known.read(record))
    except RowError as error:
        return InvalidRow(line, str(error), error.code, file, error.hint)


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

    columns: Mapping[str, str]
    ignored: Collection[str] = ()

    def apply(self, record: Record) -> Record:
        """Return a record with its columns renamed; one that already has a role's name is dropped."""
        if not self.columns and not self.ignored:
            return record
        taken = {*self.columns, *self.columns.values(), *self.ignored}
        rest = {k: v for k, v in record.items() if k not in taken}
        chosen = rest | {role: record[column] for role, column in self.columns.items() if column in record}
        for name in self.ignored:
            column, dot, key = name.partition(".")
            if dot and column in chosen:
                with contextlib.suppress(RowError):  # `parse_row_or_error` says it
                    chosen[column] = [_drop_key(turn, key) for turn in parse_list_or_json_array(chosen[column], column)]
        return chosen

    def find_unused(self, present: Iterable[str], format: str) -> tuple[str, ...]:
        """Return those of a record's columns that a format does not use and that are not left out by name."""
        known = load_row_formats()[format]
        used = {self.columns.get(role, role) for role in (*known.required, *known.optional)}
        return tuple(column for column in present if column not in used and column not in self.ignored)


def _drop_key(turn: Any, key: str) -> Any:
    """Return a message without a key; role and content stay, and the name of a tool that returned a result."""
    if not isinstance(turn, dict) or key in ("role", "content"):
        return turn
    if turn.get("role") == "tool" and key in ("name", "tool_call_id"):
        return turn
    return {k: v for k, v in turn.items() if k != key}


def describe_missing_column_effect(column: str, format: str, format_is_given: bool) -> str:
    """Return how rows of a format change without a column; empty: it is metadata.

    `format_is_given`: the format was named, not recognized from the columns.
    """
    name = column.casefold()
    partner = (
        not format_is_given and format in load_row_formats() and name in load_row_formats()[format].partner_columns
    )
    return COLUMN_MEANINGS.get(name, "") or ("it seems to belong to each text" if partner else "")


def require_known_format_and_roles(format: str | None, columns_by_role: Mapping[str, str]) -> None:
    """Raise UsageError for an unknown format, or for a role of `--column` that the format does not have."""
    known = load_row_formats()
    if format is not None and format not in known:
        problem = f"there is no data format {format!r}{suggest(format, known)}"
        raise UsageError(problem, f"one of {format_names(known)}", "see docs/data.md")
    formats = known.values() if format is None else [known[format]]
    roles = list(dict.fromkeys(column for f in formats for column in (*f.required, *f.optional)))
    for role, column in columns_by_role.items():
        if role not in roles:
            owner = f"the format {format}" if format else "any format"
            problem = f"--column {role}={column}: {role!r} is not a column of {owner}{suggest(role, roles)}"
            raise UsageError(problem, f"ROLE=COLUMN, with a role of {format_names(roles, most=20)}")


def detect_row_format(
    path: Path, records: Iterable[Record], column_mapping: ColumnMapping, format: str | None = None
) -> str:
    """Return the format of a file from its first records; if it is given, only the renamed columns are checked.

    Raise UsageError if no record has a renamed column (role → column), DataError if no format fits, or several do.
    """
    records = list(records)
    present = list(dict.fromkeys(key for record in records for key in record))
    for role, column in column_mapping.columns.items():
        if column not in present:
            problem = f"--column {role}={column}: {path} has no column {column!r}{suggest(column, present)}"
            raise UsageError(problem, f"one of {format_names(present)}")
    if format is not None:
        return format
    records = list(map(column_mapping.apply, records))
    present = list(dict.fromkeys(key for record in records for key in record))
    known = load_row_formats()
    fitting = [name for name, f in known.items() if not f.by_name_only and f.fits(present)]
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
    flags, misspelled = _suggest_flags(present)
    hints = "".join(f"; did you mean {role!r} for {column!r}?" for role, column in misspelled)
    problem = f"{path} has no known format: its rows have {format_names(present) or 'no columns'}{hints}"
    hint = "name its columns: --column messages=COLUMN, or --column instruction=COLUMN --column output=COLUMN …"
    raise DataError(problem, expected, f"try {', or '.join(flags)}" if flags else hint)


def _suggest_flags(present: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return flags with which rows of these columns have a format, and columns that are misspelled (role, column)."""
    names = {column.casefold(): column for column in present}
    formats = load_row_formats().values()
    synonyms = {role: others for f in formats for role, others in f.synonyms.items()}
    flags: list[str] = []
    misspelled: list[tuple[str, str]] = []
    for name, f in load_row_formats().items():
        if f.either:
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
