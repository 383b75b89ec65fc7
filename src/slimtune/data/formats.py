"""What a row may look like: six formats, each known by its columns, each brought to one `Row`.

    chat                messages [, tools]
    instruction         instruction, output [, input, system]           → chat
    sharegpt            conversations [, system, tools]                 → chat
    prompt-completion   prompt, completion [, tools]                    two texts, or two lists of messages → chat
    text                text
    preference          chosen, rejected [, prompt, tools]              read and checked; nothing trains on them yet

Other columns of a row are not used. A format is recognised where the first rows have all it needs, and no other does.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError, format_names, nearest
from .messages import Messages, RowError, conversation, from_sharegpt, listing, require_assistant, text


@dataclass(frozen=True)
class Row:
    """One row: a conversation, or texts.

    Args:
        messages: the conversation; empty for a row of texts.
        line: where the row stands in its file: the line (JSONL, CSV, text), or the number of the item, from 1.
        tools: JSON schemas of the functions that the assistant may call.
        learned: for each message whether it is learned; None: each of the assistant's is.
        prompt: what stands before the completion; not learned.
        completion: what is learned of a row of texts: a text's own words.
        chosen: a preference pair's better answer: messages, or a text.
        rejected: its worse one.
        file: the name of the file, where rows come from several.
    """

    messages: Messages
    line: int
    tools: list[dict[str, Any]] | None = None
    learned: tuple[bool, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    chosen: Messages | str | None = None
    rejected: Messages | str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Format:
    """What a row has to have, what it may have, and how it is read: `read(record) -> fields of Row`."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]


def _chat(record: Mapping[str, Any]) -> dict[str, Any]:
    messages, learned = conversation(record["messages"])
    return _talk(messages, learned, record)


def _sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    system = [{"role": "system", "content": s}] if (s := record.get("system")) else []
    messages, learned = conversation([*system, *from_sharegpt(record["conversations"])], "conversations")
    return _talk(messages, learned, record)


def _instruction(record: Mapping[str, Any]) -> dict[str, Any]:
    told, given = text(record["instruction"], "'instruction'"), record.get("input") or ""
    given = text(given, "'input'", empty=True)
    messages = [
        {"role": "user", "content": f"{told}\n\n{given}" if given.strip() else told},
        {"role": "assistant", "content": text(record["output"], "'output'")},
    ]
    if system := record.get("system"):
        messages.insert(0, {"role": "system", "content": text(system, "'system'")})
    return {"messages": messages}


def _prompt_completion(record: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        said = text(completion, "'completion'")
        return {"messages": [], "prompt": text(prompt, "'prompt'", empty=True), "completion": said}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("'prompt' and 'completion' are a text and a list: wanted two texts or two lists", "wrong-type")
    before, _ = conversation(prompt, "prompt", learns=False)
    after, learned = conversation(completion, "completion")
    return _talk(before + after, (False,) * len(before) + learned, record)


def _text(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [], "completion": text(record["text"], "'text'")}


def _preference(record: Mapping[str, Any]) -> dict[str, Any]:
    sides = {name: _answer(record[name], name) for name in ("chosen", "rejected")}
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        before, _ = conversation(prompt, "prompt", learns=False)
        return {"messages": before, "tools": _tools(record), **sides}
    return {"messages": [], "prompt": None if prompt is None else text(prompt, "'prompt'"), **sides}


def _answer(value: Any, name: str) -> Messages | str:
    if isinstance(value, str):
        return text(value, f"{name!r}")
    return conversation(value, name)[0]


def _talk(messages: Messages, learned: tuple[bool, ...], record: Mapping[str, Any]) -> dict[str, Any]:
    require_assistant(messages)
    usual = all(said == (m["role"] == "assistant") for m, said in zip(messages, learned, strict=True))
    return {"messages": messages, "learned": None if usual else learned, "tools": _tools(record)}


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    value = record.get("tools")
    if value is None or value in ("", []):
        return None
    tools = listing(value, "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools[{i}] is not the JSON schema of a function: it has no name", "bad-tool")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


FORMATS = {
    "chat": Format(("messages",), ("tools",), _chat),
    "instruction": Format(("instruction", "output"), ("input", "system"), _instruction),
    "sharegpt": Format(("conversations",), ("system", "tools"), _sharegpt),
    "prompt-completion": Format(("prompt", "completion"), ("tools",), _prompt_completion),
    "text": Format(("text",), (), _text),
    "preference": Format(("chosen", "rejected"), ("prompt", "tools"), _preference),
}
ROLES = tuple(dict.fromkeys(c for f in FORMATS.values() for c in (*f.needs, *f.may)))
"""Every column a format knows: what `--column` names."""


def read_record(record: Any, form: str, line: int, file: str | None = None) -> Row:
    """Return a record as a row of a format.

    Raises:
        RowFault: it does not hold what the format wants.
    """
    form_of = FORMATS[form]
    for column in form_of.needs:
        if column not in record:
            here = format_names(record) or "none"
            raise RowError(f"has no {column!r}{nearest(column, record)} (keys here: {here})", "missing-column")
    return Row(line=line, file=file, **form_of.read(record))


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a record with the columns that `columns` (role → column) names under the names of their roles."""
    moved = {role: record[column] for role, column in columns.items() if column in record}
    gone = {*columns.values(), *columns}
    return {**{k: v for k, v in record.items() if k not in gone}, **moved}


def require_known(form: str | None, columns: Mapping[str, str]) -> None:
    """Raise UsageError for a format or a role of `--column` that there is not."""
    if form is not None and form not in FORMATS:
        raise UsageError(
            f"there is no data format {form!r}{nearest(form, FORMATS)}",
            f"one of {format_names(FORMATS)}",
            "see docs/data.md",
        )
    known = ROLES if form is None else (*FORMATS[form].needs, *FORMATS[form].may)
    if unknown := [role for role in columns if role not in known]:
        of = f"the format {form}" if form else "any format"
        raise UsageError(
            f"--column names {format_names(unknown)}, which is no column of {of}{nearest(unknown[0], known)}",
            f"role=column, a role of {format_names(known, most=20)}",
        )


def require_columns(path: Path, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Raise UsageError where no record has a column that `--column` names."""
    seen = _columns(records)
    for role, column in columns.items():
        if column not in seen:
            raise UsageError(
                f"--column {role}={column}: {path} has no column {column!r}{nearest(column, seen)}",
                f"one of {format_names(seen)}",
            )


def recognised(path: Path, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the format of a file by its first records.

    Raises:
        DataError: no format fits, or several do.
    """
    there = _columns(renamed(record, columns) for record in records)
    fitting = [name for name, form in FORMATS.items() if set(form.needs) <= set(there)]
    if len(fitting) == 1:
        return fitting[0]
    wanted = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
    if fitting:
        got = f"{path} may be {' or '.join(fitting)}: its rows have {format_names(there)}"
        raise DataError(got, f"the columns of one format ({wanted})", f"--format {fitting[0]}, or another of them")
    needed = [column for form in FORMATS.values() for column in form.needs]
    close = [(column, difflib.get_close_matches(column, needed, 1, 0.7)) for column in there]
    hints = "".join(f"; did you mean {found[0]!r} for {column!r}?" for column, found in close if found)
    raise DataError(
        f"{path} is of no known format: its rows have {format_names(there) or 'no columns'}{hints}",
        f"the columns of one format ({wanted})",
        "name its columns: --column messages=COLUMN, or --column instruction=COLUMN --column output=COLUMN …",
    )


def _columns(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))
