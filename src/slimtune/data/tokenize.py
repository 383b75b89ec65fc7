"""A batch of rows as tokens and masks, and as a block that is cut, counted and ready to be written.

Row ─ rendered ─ tokenized ─ masked ─▶ (Rendered, Encoded) ─ cut, dropped or kept ─▶ Block
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..errors import DataError
from .chat_template import (
    RenderedChat,
    TokenizedRow,
    is_end_of_turn,
    render_chat,
    render_text,
    special_tokens,
    supervised,
    tokenize,
)
from .formats import Row
from .records import InvalidRow

BATCH = 512
R = TypeVar("R")
Pair = tuple[Row, TokenizedRow | InvalidRow]
"""A row and its tokens, or why it has none."""
PREFERENCE = "is a preference pair (chosen, rejected), which nothing trains on yet"


def tokenize_rows(
    rows: Iterable[Row], tokenizer: Any, *, train_on: str = "assistant"
) -> list[tuple[RenderedChat, TokenizedRow] | InvalidRow]:
    """Return each row's text with the spans that are learned, and its tokens with their mask, or why there are none.

    Args:
        rows: a batch; all of it is in memory at once.
        tokenizer: a fast tokenizer, with a chat template where rows are conversations.
        train_on: "assistant" (every assistant turn) or "last_assistant" (the last one of each row).

    Raises:
        ModelError: no chat template, or one that hides the assistant's turns; no end-of-text token for texts.
    """
    rows = list(rows)
    ends = special_tokens(tokenizer)
    drawn = [_rendered(row, tokenizer, train_on, ends) for row in rows]
    ids, offsets = tokenize(tokenizer, [one.text for one in drawn if isinstance(one, RenderedChat)])
    tokens = zip(ids, offsets, strict=True)
    return [
        one if isinstance(one, InvalidRow) else (one, TokenizedRow((t := next(tokens))[0], supervised(one, t[1])))
        for one in drawn
    ]


def batched(rows: Iterable[R], size: int = BATCH) -> Iterator[tuple[R, ...]]:
    """Yield rows in batches, the last one shorter."""
    left = iter(rows)
    return iter(lambda: tuple(itertools.islice(left, size)), ())


@dataclass
class EncodedBatch:
    """A batch of rows, encoded.

    Args:
        coded: int32 [T], the kept rows' tokens as `store` holds them.
        lengths: int64 [n], of each kept row.
        lines: int64 [n].
        rows: rows read.
        learned: supervised tokens that have one before them.
        longest: tokens of the longest row, before any cut.
        unended: kept rows that no special token closes.
        long: lines of rows that are too long.
        mute: lines of kept rows with nothing to learn.
        refused: rows that the template refuses.
        seen: what `look` saw, where there is one.
    """

    coded: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    rows: int
    learned: int = 0
    longest: int = 0
    unended: int = 0
    long: list[int] = field(default_factory=list)
    mute: list[int] = field(default_factory=list)
    refused: list[InvalidRow] = field(default_factory=list)
    seen: Any = None


@dataclass(frozen=True)
class BatchTokenizer:
    """Makes a block of a batch of rows; is sent to other processes."""

    tokenizer: Any
    max_seq_len: int
    on_overlong: str
    train_on: str
    look: Callable[[Sequence[Pair]], Any] | None = None

    def __call__(self, rows: tuple[Row, ...]) -> EncodedBatch:
        """Return the rows as a block."""
        none = np.zeros(0, np.int64)
        block = EncodedBatch(none.astype(np.int32), none, none, len(rows))
        kept: list[np.ndarray] = []
        lines: list[int] = []
        made = tokenize_rows(rows, self.tokenizer, train_on=self.train_on)
        if self.look is not None:
            pairs = zip(rows, made, strict=True)
            block.seen = self.look([(row, one if isinstance(one, InvalidRow) else one[1]) for row, one in pairs])
        for row, one in zip(rows, made, strict=True):
            if isinstance(one, InvalidRow):
                block.refused.append(one)
                continue
            tokens = one[1]
            block.longest = max(block.longest, len(tokens.input_ids))
            if len(tokens.input_ids) > self.max_seq_len:
                block.long.append(row.line)
                if self.on_overlong == "drop":
                    continue
            block.unended += not _ended(self.tokenizer, tokens)
            ids = np.array(tokens.input_ids[: self.max_seq_len], np.int32)
            said = np.array(tokens.supervised[: self.max_seq_len], bool)
            kept.append(np.where(said, ~ids, ids))
            lines.append(row.line)
            learned = int(said[1:].sum())
            block.learned += learned
            if not learned:
                block.mute.append(row.line)
        if kept:
            block.coded = np.concatenate(kept)
            block.lengths = np.array([len(k) for k in kept], np.int64)
            block.lines = np.array(lines, np.int64)
        return block


def _rendered(row: Row, tokenizer: Any, train_on: str, ends: re.Pattern[str]) -> RenderedChat | InvalidRow:
    if row.chosen is not None:
        return InvalidRow(row.line, PREFERENCE, "preference", row.file)
    if row.completion is not None:
        return render_text(tokenizer, row.prompt or "", row.completion)
    try:
        return render_chat(tokenizer, row.messages, row.tools, _learned(row, train_on), ends)
    except DataError as fault:
        code = "template-leaves-out" if "leaves out" in fault.message else "template-refuses"
        return InvalidRow(row.line, fault.message, code, row.file)


def _learned(row: Row, train_on: str) -> tuple[bool, ...] | None:
    """Return for each message whether it is learned; None: each of the assistant's is."""
    if train_on == "assistant":
        return row.learned
    last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
    return tuple(i == last and (row.learned is None or row.learned[i]) for i in range(len(row.messages)))


def _ended(tokenizer: Any, one: TokenizedRow) -> bool:
    last = next((t for t, said in zip(one.input_ids[::-1], one.supervised[::-1], strict=True) if said), None)
    return last is None or is_end_of_turn(tokenizer, last)
