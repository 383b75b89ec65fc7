"""The formats of a row, each recognized by its columns, and how a record of each becomes a `Row`.

A new format is one function here and one entry in `FORMATS`. Columns that no format names are ignored. Preference
pairs are read and validated, but nothing trains on them yet.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError, format_names, nearest
from .messages import (
    Messages,
    RowError,
    check_depth,
    convert_sharegpt,
    parse_messages_and_train_mask,
    require_list,
    require_text,
)

Record = Mapping[str, Any]
Fields = dict[str, Any]  # of a `Row`


@dataclass(frozen=True)
class Row:
    """One row: a conversation, a text, or a prompt with its answers."""

    messages: Messages  # the conversation, or the prompt of a preference pair; empty for a row of texts
    line: int  # in the file (JSONL, CSV, text), or the number of the item, from 1
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the functions that the assistant may call
    learned: tuple[bool, ...] | None = None  # for each message whether it is learned; None: every assistant turn is
    prompt: str | None = None  # the text before the completion; it is not learned
    completion: str | None = None  # the text that is learned
    chosen: Messages | str | None = None  # the better answer of a preference pair
    rejected: Messages | str | None = None
    file: str | None = None  # its name, if rows come from several


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used: what is wrong, and the kind of error in kebab case; `line` and `file` as for `Row`."""

    line: int
    cause: str
    code: str
    file: str | None = None


def _read_chat(record: Record) -> Fields:
    return _chat_fields(record, *parse_messages_and_train_mask(record["messages"]))


def _read_sharegpt(record: Record) -> Fields:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    messages = [*system, *convert_sharegpt(record["conversations"])]
    return _chat_fields(record, *parse_messages_and_train_mask(messages, "conversations"))


def _read_instruction(record: Record) -> Fields:
    instruction = require_text(record["instruction"], "'instruction'")
    given = require_text(record.get("input") or "", "'input'", allow_empty=True)
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction},
        {"role": "assistant", "content": require_text(record["output"], "'output'")},
    ]
    if system := record.get("system"):
        messages.insert(0, {"role": "system", "content": require_text(system, "'system'")})
    return {"messages": messages}


def _read_prompt_completion(record: Record) -> Fields:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        completion = require_text(completion, "'completion'")
        return {"messages": [], "prompt": require_text(prompt, "'prompt'", allow_empty=True), "completion": completion}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("'prompt' and 'completion' are a text and a list: wanted two texts or two lists", "wrong-type")
    before, _ = parse_messages_and_train_mask(prompt, "prompt", require_trained_turn=False)
    after, learned = parse_messages_and_train_mask(completion, "completion")
    return _chat_fields(record, before + after, (False,) * len(before) + learned)


def _read_text(record: Record) -> Fields:
    return {"messages": [], "completion": require_text(record["text"], "'text'")}


def _read_preference(record: Record) -> Fields:
    fields: Fields = {"messages": []}
    for column in ("chosen", "rejected"):
        value, text = record[column], isinstance(record[column], str)
        fields[column] = require_text(value, f"{column!r}") if text else parse_messages_and_train_mask(value, column)[0]
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        fields["messages"], _ = parse_messages_and_train_mask(prompt, "prompt", require_trained_turn=False)
        return fields | {"tools": _read_tools(record)}
    return fields if prompt is None else fields | {"prompt": require_text(prompt, "'prompt'")}


def _chat_fields(record: Record, messages: Messages, learned: tuple[bool, ...]) -> Fields:
    every_turn = tuple(m["role"] == "assistant" for m in messages)
    return {"messages": messages, "learned": None if learned == every_turn else learned, "tools": _read_tools(record)}


def _read_tools(record: Record) -> list[dict[str, Any]] | None:
    value = record.get("tools")
    if value is None or value in ("", []):
        return None
    tools = require_list(value, "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools[{i}] is not the JSON schema of a function: it has no name", "bad-tool")
        check_depth(tool, f"tools[{i}]")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


@dataclass(frozen=True)
class Format:
    """The columns of a format, and the function that turns a record into fields of `Row`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Fields]


FORMATS = {
    "chat": Format(("messages",), ("tools",), _read_chat),
    "instruction": Format(("instruction", "output"), ("input", "system"), _read_instruction),
    "sharegpt": Format(("conversations",), ("system", "tools"), _read_sharegpt),
    "prompt-completion": Format(("prompt", "completion"), ("tools",), _read_prompt_completion),
    "text": Format(("text",), (), _read_text),
    "preference": Format(("chosen", "rejected"), ("prompt", "tools"), _read_preference),
}


def parse_record(record: Record, format: str, line: int, file: str | None = None) -> Row | InvalidRow:
    """Return a record as a row of a format, or what is wrong with it."""
    try:
        for column in FORMATS[format].required:
            if column not in record:
                present = f"(keys here: {format_names(record) or 'none'})"
                raise RowError(f"has no {column!r}{nearest(column, record)} {present}", "missing-column")
        return Row(line=line, file=file, **FORMATS[format].read(record))
    except RowError as error:
        return InvalidRow(line, str(error), error.code, file)


def rename_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """Return a record with its columns renamed (role → column); a column that already has a role's name is dropped."""
    if not columns:
        return record
    rest = {k: v for k, v in record.items() if k not in columns and k not in columns.values()}
    return rest | {role: record[column] for role, column in columns.items() if column in record}


def check_format(format: str | None, columns: Mapping[str, str]) -> None:
    """Raise UsageError for an unknown format, or for a role of `--column` that the format does not have."""
    if format is not None and format not in FORMATS:
        problem = f"there is no data format {format!r}{nearest(format, FORMATS)}"
        raise UsageError(problem, f"one of {format_names(FORMATS)}", "see docs/data.md")
    formats = FORMATS.values() if format is None else [FORMATS[format]]
    roles = list(dict.fromkeys(column for f in formats for column in (*f.required, *f.optional)))
    for role, column in columns.items():
        if role not in roles:
            owner = f"the format {format}" if format else "any format"
            problem = f"--column {role}={column}: {role!r} is not a column of {owner}{nearest(role, roles)}"
            raise UsageError(problem, f"ROLE=COLUMN, with a role of {format_names(roles, most=20)}")


def detect_format(path: Path, records: Iterable[Record], columns: Mapping[str, str], format: str | None = None) -> str:
    """Return the format of a file from its first records; if it is given, only the renamed columns are checked.

    Raise UsageError if no record has a renamed column (role → column), DataError if no format fits, or several do.
    """
    records = list(records)
    present = list(dict.fromkeys(key for record in records for key in record))
    for role, column in columns.items():
        if column not in present:
            problem = f"--column {role}={column}: {path} has no column {column!r}{nearest(column, present)}"
            raise UsageError(problem, f"one of {format_names(present)}")
    if format is not None:
        return format
    present = list(dict.fromkeys(key for record in records for key in rename_columns(record, columns)))
    fitting = [name for name, f in FORMATS.items() if set(f.required) <= set(present)]
    if len(fitting) == 1:
        return fitting[0]
    columns_of_formats = "; ".join(f"{name}: {', '.join(f.required)}" for name, f in FORMATS.items())
    expected = f"the columns of one format ({columns_of_formats})"
    if fitting:
        problem = f"{path} may be {' or '.join(fitting)}: its rows have {format_names(present)}"
        raise DataError(problem, expected, f"--format {fitting[0]}, or another of them")
    required = [column for f in FORMATS.values() for column in f.required]
    close = [(column, difflib.get_close_matches(column, required, 1, 0.7)) for column in present]
    hints = "".join(f"; did you mean {match[0]!r} for {column!r}?" for column, match in close if match)
    problem = f"{path} has no known format: its rows have {format_names(present) or 'no columns'}{hints}"
    hint = "name its columns: --column messages=COLUMN, or --column instruction=COLUMN --column output=COLUMN …"
    raise DataError(problem, expected, hint)
