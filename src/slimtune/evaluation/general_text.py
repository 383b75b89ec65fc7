"""General text that an adapter is not trained on: it shows how much of the base is lost.

The text is the built-in one (general/text.jsonl: prose, questions and answers, code, twelve languages; 59 KB) or a file
of the user's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.config import Recipe
from ..core.data.chat_template import encode_chat_with_train_mask
from ..core.data.collator import IGNORE_INDEX, Example
from ..core.data.rows import ROW_READERS, InvalidRow, RowErrorCollector
from ..core.foundation.formatting import truncate_noting_length
from ..core.models.base_config import get_max_positions
from ..core.training.forgetting_budget import group_row_numbers_by_kind
from ..core.training.loss import count_supervised_targets
from ..errors import DataError, UsageError, suggest

BUILT_IN_TEXT = Path(__file__).parent / "general" / "text.jsonl"
WINDOW = 256
"""Most tokens of a row made of plain text. The rows of one text are few, and an interval needs many."""
GENERAL_TOKENS, TOKENS_OF_A_KIND = 2048, 512
"""Tokens of general text that a run measures, about: in all, and at least of each kind."""


class GeneralTextPiece(NamedTuple):
    """A piece of general text."""

    line: int  # in its file
    kind: str  # a label, for figures by kind
    content: str | list[dict[str, str]]  # plain text, or messages


def read_general_text_pieces(file: Path) -> list[GeneralTextPiece]:
    """Return the pieces of a file: a `.txt` file is one piece, any other file is read as JSONL.

    Raises:
        UsageError: there is no such file.
        DataError: the file holds no text, or lines that are neither `{"text"}` nor `{"messages"}`.
    """
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UsageError(f"there is no file {str(file)!r}{suggest(file.name, siblings)}", "a .txt or .jsonl file")
    errors = RowErrorCollector(
        file, expected='UTF-8 text; a JSONL file: {"text": "…"} or {"messages": […]} on each line'
    )
    pieces: list[GeneralTextPiece] = []
    reader = ROW_READERS.load(file.suffix if file.suffix == ".txt" else ".jsonl")
    for found in (reader.read_whole_file or reader.read_records)(file):
        if isinstance(found, InvalidRow):
            errors.add(found.line, found.cause)
        elif (piece := _parse_piece(*found)) is not None:
            pieces.append(piece)
        else:
            errors.add(found[0], f"is neither a text nor messages: {truncate_noting_length(str(found[1]))}")
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


def build_general_text_examples(
    pieces: Sequence[GeneralTextPiece], file: Path, tokenizer: Any, max_positions: int | None = None
) -> list[Example]:
    """Return rows to score, each with its `kind`: every token of a plain text, the assistant's tokens of messages.

    A plain text becomes rows of at most 256 tokens; messages become one row, cut at 512. A row has at most half
    of the positions of the base; None: it names no limit.

    Raises:
        DataError: the chat template rejects messages, or there is nothing to predict.
    """
    max_tokens = min((max_positions or 4 * WINDOW) // 2, 2 * WINDOW)
    examples: list[Example] = []
    errors = RowErrorCollector(file, hint="change these lines")
    for line, kind, content in pieces:
        if isinstance(content, str):
            ids = tokenizer(content, verbose=False)["input_ids"]
            length = min(WINDOW, max_tokens)
            rows = [(ids[i : i + length], ids[i : i + length]) for i in range(0, len(ids), length)]
        else:
            try:
                chat = encode_chat_with_train_mask(tokenizer, content)
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


@dataclass(frozen=True)
class GeneralTextFile:
    """The text that a run with a forgetting budget is measured on; read by `load_general_text`."""

    file: Path
    pieces: Sequence[GeneralTextPiece]

    def choose_rows(self, recipe: Recipe, tokenizer: Any, model: Any, say: Callable[[str], None]) -> list[Example]:
        """Return rows of the text, taken evenly from each kind of it, that predict about `GENERAL_TOKENS` tokens.

        Args:
            recipe: the run's; if it names neither a budget nor a text, `say` gets the errors, and there are no rows.
            tokenizer: the base's.
            model: the adapted model; a row of general text has half of its positions at most.
            say: shows a sentence.

        Raises:
            DataError: the chat template rejects messages, or there is nothing to predict.
        """
        try:
            return self._choose_rows(tokenizer, model)
        except DataError as error:
            if recipe.train.forgetting_budget != "auto" or recipe.data.general_text is not None:
                raise
            say(f"nothing limits what the run forgets of general text: {error.message}")
            return []

    def _choose_rows(self, tokenizer: Any, model: Any) -> list[Example]:
        rows = build_general_text_examples(self.pieces, self.file, tokenizer, get_max_positions(model.config))
        kinds = group_row_numbers_by_kind(rows)
        wanted = max(GENERAL_TOKENS // len(kinds), TOKENS_OF_A_KIND)
        chosen: list[Example] = []
        for numbers in kinds.values():
            every = max(1, round(sum(count_supervised_targets(rows[i]) for i in numbers) / wanted))
            chosen += [rows[i] for i in numbers[every // 2 :: every]]
        return chosen


def load_general_text(file: Path | None) -> GeneralTextFile:
    """Return the text to measure the forgetting of a run on, from a file or the built-in one."""
    file = file or BUILT_IN_TEXT
    return GeneralTextFile(file, read_general_text_pieces(file))
