"""Chat rows from a JSONL file: one line, one conversation, every fault with its line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

What a person typed (the path) is a usage error; what stands in the file is a data error. Up to ten faults are
collected and reported together, so a file is not repaired one run at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import DataError, UsageError, listed, nearest

ROLES = ("system", "user", "assistant", "tool")
MOST_FAULTS = 10
SHAPE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


@dataclass(frozen=True)
class Row:
    """One conversation: `messages` as `{"role", "content"}` dicts, and the line (from 1) it stands on."""

    messages: list[dict[str, str]]
    line: int


class Faults:
    """Collects faults of one file; `check` raises them all as one error."""

    def __init__(self, path: str | Path, wanted: str = "", fix: str = "") -> None:
        self.path, self.wanted, self.fix = path, wanted, fix
        self.found: list[str] = []

    def add(self, line: int, what: str) -> None:
        """Keep one fault of a line."""
        self.found.append(f"{self.path}:{line}: {what}")

    @property
    def full(self) -> bool:
        """Whether as many faults are kept as one message shows."""
        return len(self.found) >= MOST_FAULTS

    def check(self) -> None:
        """Raise what was found.

        Raises:
            DataError: at least one fault was added.
        """
        if self.found:
            got = list(self.found)
            if self.full:
                got.append(f"(the first {MOST_FAULTS} faults; the rest of the file was not checked)")
            raise DataError("\n".join(got), wanted=self.wanted, fix=self.fix)


def read_rows(path: str | Path) -> list[Row]:
    """Read every row of a JSONL file of chat rows; empty lines are passed over, keys beside `messages` are not used.

    Raises:
        UsageError: there is no such file, it is a folder, or it cannot be read.
        DataError: the file is empty, or some rows are faulty (the first ten are named with file and line).
    """
    path = Path(path)
    faults = Faults(path, wanted=f"one JSON object per line: {SHAPE}", fix="repair or remove these lines")
    rows: list[Row] = []
    for number, raw in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            rows.append(Row(_messages(_parsed(raw)), number))
        except ValueError as fault:
            faults.add(number, str(fault))
            if faults.full:
                break
    faults.check()
    if not rows:
        raise DataError(f"{path} is empty: it holds no row", wanted=f"one JSON object per line: {SHAPE}")
    return rows


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        where = "" if folder.is_dir() else f" (there is no folder {folder} either)"
        got = f"no such file: {path}{where}{nearest(path.name, names)}"
        raise UsageError(got, wanted="a JSONL file of chat rows", fix="check the path given for the data") from None
    except IsADirectoryError:
        files = sorted(p.name for p in path.glob("*.jsonl"))
        fix = f"name one of its files: {listed(files)}" if files else "name a file"
        raise UsageError(f"{path} is a folder", wanted="a JSONL file of chat rows", fix=fix) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", fix="check its permissions") from error


def _parsed(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}: {_short(raw.decode('utf-8', 'replace'))}") from None
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"does not parse as JSON{where}: {_short(text)}") from None


def _messages(row: Any) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        raise ValueError(f"is not a JSON object but {_kind(row)}: {_short(json.dumps(row, ensure_ascii=False))}")
    if "messages" not in row:
        raise ValueError(f"has no 'messages'{nearest('messages', row)} (keys here: {listed(row) or 'none'})")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"'messages' is not a list but {_kind(messages)}")
    checked = [_message(message, i) for i, message in enumerate(messages)]
    if not any(m["role"] == "assistant" for m in checked):
        roles = listed(m["role"] for m in checked) or "none"
        raise ValueError(f"has no assistant turn, so there is nothing to learn (roles here: {roles})")
    return checked


def _message(message: Any, i: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"messages[{i}] is not an object but {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"messages[{i}] has no {key!r}{nearest(key, message)}")
        if not isinstance(message[key], str):
            raise ValueError(f"messages[{i}].{key} is not a string but {_kind(message[key])}")
    # An unknown key would never reach the model, or change what the template makes of the turn: neither silently.
    if unknown := [key for key in message if key not in ("role", "content") and message[key] is not None]:
        raise ValueError(f"messages[{i}] has keys that are not used: {listed(unknown)} (known: 'role', 'content')")
    role = message["role"]
    if role not in ROLES:
        raise ValueError(f"messages[{i}] has the unknown role {role!r}{nearest(role, ROLES)} (known: {listed(ROLES)})")
    if not message["content"].strip():
        raise ValueError(f"messages[{i}] ({role}) has empty content")
    if any("\ud800" <= c <= "\udfff" for c in message["content"]):
        raise ValueError(f"messages[{i}] ({role}) holds half of a character (a lone \\ud8xx or \\udcxx escape)")
    return {"role": role, "content": message["content"]}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(text: str, most: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
