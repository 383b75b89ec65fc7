"""General text that an adapter is not trained on: it shows how much of the base is lost.

The text is the built-in one (general/text.jsonl: prose, questions and answers, code, twelve languages; 59 KB) or a file
of the user's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DataError, UsageError, nearest
from ..foundation.formatting import shorten_text
from .chat_template import encode_chat
from .collator import IGNORE_INDEX, Example
from .rows import ROW_READERS, InvalidRow, RowErrorCollector

BUILT_IN_TEXT = Path(__file__).parent / "general" / "text.jsonl"
WINDOW = 256
"""Most tokens of a row made of plain text. The rows of one text are few, and an interval needs many."""


class GeneralTextPiece(NamedTuple):
    """A piece of general text."""

    line: int  # in its file
    kind: str  # a label, for figures by kind
    content: str | list[dict[str, str]]  # plain text, or messages


def read_general_text(file: Path) -> list[GeneralTextPiece]:
    """Return the pieces of a file: a `.txt` file is one piece, any other file is read as JSONL.

    Raises:
        UsageError: there is no such file.
        DataError: the file holds no text, or lines that are neither `{"text"}` nor `{"messages"}`.
    """
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UsageError(f"there is no file {str(file)!r}{nearest(file.name, siblings)}", "a .txt or .jsonl file")
    errors = RowErrorCollector(
        file, expected='UTF-8 text; a JSONL file: {"text": "…"} or {"messages": […]} on each line'
    )
    pieces: list[GeneralTextPiece] = []
    reader = ROW_READERS.load(file.suffix if file.suffix == ".txt" else ".jsonl")
    for found in (reader.read_document or reader.read)(file):
        if isinstance(found, InvalidRow):
            errors.add(found.line, found.cause)
        elif (piece := _parse_piece(*found)) is not None:
            pieces.append(piece)
        else:
            errors.add(found[0], f"is neither a text nor messages: {shorten_text(str(found[1]))}")
        if errors.full:
            break
    if not pieces and not errors.messages:
        errors.add(1, "contains no text")
    errors.check()
    return pieces


def _parse_piece(line: int, record: dict[str, Any]) -> GeneralTextPiece | None:
    kind = str(record.get("kind", "text"))
    match record:
        case {"text": str(content)} if content.strip():
            return GeneralTextPiece(line, kind, content)
        case {"messages": [_, *_] as messages}:
            keys = ("role", "content")
            if all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in keys) for m in messages):
                return GeneralTextPiece(line, kind, [{k: m[k] for k in keys} for m in messages])
    return None


def tokenize_general_text(
    pieces: Sequence[GeneralTextPiece], file: Path, tokenizer: Any, max_tokens: int = 2 * WINDOW
) -> list[Example]:
    """Return rows to score, each with its `kind`: every token of a plain text, the assistant's tokens of messages.

    A plain text becomes rows of at most 256 tokens; messages become one row, cut at `max_tokens`.

    Raises:
        DataError: the chat template rejects messages, or there is nothing to predict.
    """
    examples: list[Example] = []
    errors = RowErrorCollector(file, hint="change these lines")
    for line, kind, content in pieces:
        if isinstance(content, str):
            ids = tokenizer(content, verbose=False)["input_ids"]
            length = min(WINDOW, max_tokens)
            rows = [(ids[i : i + length], ids[i : i + length]) for i in range(0, len(ids), length)]
        else:
            try:
                chat = encode_chat(tokenizer, content)
            except DataError as e:
                errors.add(line, e.message)
                continue
            labels = [t if learn else IGNORE_INDEX for t, learn in zip(chat.input_ids, chat.supervised, strict=True)]
            rows = [(chat.input_ids[:max_tokens], labels[:max_tokens])]
        examples += [
            {"input_ids": ids, "labels": labels, "line": line, "kind": kind}
            for ids, labels in rows
            if any(label != IGNORE_INDEX for label in labels[1:])
        ]
    if not examples and not errors.messages:
        errors.add(1, "contains nothing to predict: too little text, or no message of an assistant")
    errors.check()
    return examples


def group_row_numbers_by_kind(rows: Sequence[Example]) -> dict[str, list[int]]:
    """Return the numbers of the rows of each kind, kinds and rows in their order."""
    kinds: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(row["kind"], []).append(number)
    return kinds
