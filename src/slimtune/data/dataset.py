"""Rows as training examples, and a report of what became of each: none is cut or dropped unsaid.

    Row ─ rendered ─ tokenized ─ masked ─▶ Encoded ─ cut, dropped or kept ─▶ Block ─ written ─▶ Examples

An example is `{"input_ids": [L], "labels": [L], "line": int}`; a label is its token's id where the assistant speaks and
-100 elsewhere. A first token is never counted as learned: nothing stands before it to predict it from. Rows go through
in batches, over several processes where there are many, and come to lie outside memory (store.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError, UsageError, format_names, nearest
from ..utils.formatting import format_count
from .formats import Row
from .read import MAX_ERRORS, RowErrors, RowFile
from .store import Example, Examples, Writer
from .tokenize import BatchTokenizer, EncodedBatch, Pair, batched
from .workers import in_order

__all__ = ["TOO_LONG", "TRAIN_ON", "Example", "Examples", "RowReport", "tokenize_dataset"]

TOO_LONG = ("error", "drop", "truncate")
TRAIN_ON = ("assistant", "last_assistant")


class Watch(Protocol):
    """Sees rows as they are encoded: `look` at a batch, wherever that is done; `add` what it gave, in order."""

    @property
    def look(self) -> Callable[[Sequence[Pair]], Any]:
        """What looks; can be sent to another process."""

    def add(self, seen: Any, /) -> None:
        """Take what a look gave."""


@dataclass(frozen=True)
class RowReport:
    """What became of a file's rows. Lengths and counts are in tokens; `longest` is before any cut.

    `unended` counts kept rows whose last turn is not closed by a special token: a model trained on them alone does not
    learn to stop.
    """

    rows: int
    kept: int
    dropped: int
    truncated: int
    tokens: int
    supervised_tokens: int
    longest: int
    max_seq_len: int
    unended: int = 0

    def text(self) -> str:
        """Return the report as one line."""
        share = f"{100 * self.supervised_tokens / self.tokens:.0f} %" if self.tokens else "0 %"
        parts = [f"{self.kept} of {self.rows} rows"]
        if self.dropped:
            parts.append(f"{self.dropped} dropped (longer than {self.max_seq_len} tokens)")
        if self.truncated:
            parts.append(f"{self.truncated} cut at {self.max_seq_len} tokens")
        parts.append(f"{format_count(self.tokens)} tokens, {format_count(self.supervised_tokens)} learned ({share})")
        parts.append(f"longest row {self.longest}")
        if self.unended:
            parts.append(f"{self.unended} of them end without an end-of-turn token")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, int]:
        """Return the report as JSON takes it."""
        return asdict(self)


def tokenize_dataset(
    rows: RowFile | Iterable[Row],
    tokenizer: Any,
    *,
    max_seq_len: int,
    on_overlong: str = "drop",
    train_on: str = "assistant",
    path: str | Path,
    processes: int = 1,
    watch: Watch | None = None,
) -> tuple[Examples, RowReport]:
    """Return the rows as examples, in their order, and the report.

    Args:
        rows: what `open_rows` or `read_rows` give.
        tokenizer: a fast tokenizer, with a chat template where rows are conversations.
        max_seq_len: most tokens of a row (≥ 2).
        on_overlong: what happens to longer rows: "error", "drop" or "truncate".
        train_on: "assistant" (every assistant turn) or "last_assistant" (the last one of each row).
        path: the file the rows came from, for messages.
        processes: how many encode at once; with more than one, a script of your own has to guard what it runs by
            `if __name__ == "__main__":`.
        watch: sees every batch too, in the process that encodes it.

    Raises:
        UsageError: an unknown `on_overlong` or `train_on`, or a `max_seq_len` under 2.
        DataError: rows are faulty, the template refuses some, rows are too long under "error", none is left, or some
            have nothing to learn.
        ModelError: no chat template, or one that hides the assistant's turns.
    """
    if on_overlong not in TOO_LONG:
        raise UsageError(
            f"on_overlong is {on_overlong!r}{nearest(on_overlong, TOO_LONG)}", expected=format_names(TOO_LONG)
        )
    if train_on not in TRAIN_ON:
        raise UsageError(f"train_on is {train_on!r}{nearest(train_on, TRAIN_ON)}", expected=format_names(TRAIN_ON))
    if max_seq_len < 2:
        raise UsageError(f"max_seq_len is {max_seq_len}", expected="2 tokens or more: one to read, one to say")
    if isinstance(rows, RowFile) and rows.format == "preference":
        raise _preference(path)
    sound = rows.rows() if isinstance(rows, RowFile) else rows
    refused = RowErrors(path, hint="change these rows, or give another template (data.chat_template)")
    encoder = BatchTokenizer(tokenizer, max_seq_len, on_overlong, train_on, None if watch is None else watch.look)
    examples, sums = _written(in_order(encoder, batched(sound), processes), refused, watch)
    refused.check()
    if sums.long and on_overlong == "error":
        raise _too_long(path, sums.long, sums.longest, max_seq_len)
    if sums.mute:
        raise _mute(path, sums.mute, max_seq_len, cut=bool(sums.long) and on_overlong == "truncate")
    if not sums.kept:
        raise _none_left(path, sums.rows, sums.longest, max_seq_len)
    return examples, RowReport(
        rows=sums.rows,
        kept=sums.kept,
        dropped=sums.rows - sums.kept,
        truncated=len(sums.long) if on_overlong == "truncate" else 0,
        tokens=sums.tokens,
        supervised_tokens=sums.learned,
        longest=sums.longest,
        max_seq_len=max_seq_len,
        unended=sums.unended,
    )


@dataclass
class _Sums:
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    unended: int = 0
    long: list[int] = field(default_factory=list)
    mute: list[int] = field(default_factory=list)

    def add(self, block: EncodedBatch) -> None:
        self.rows += block.rows
        self.kept += len(block.lengths)
        self.tokens += len(block.coded)
        self.learned += block.learned
        self.longest = max(self.longest, block.longest)
        self.unended += block.unended
        self.long += block.long
        self.mute += block.mute


def _written(blocks: Iterable[EncodedBatch], refused: RowErrors, watch: Watch | None) -> tuple[Examples, _Sums]:
    """Write the blocks and add up what they hold, until as many rows are refused as one message shows."""
    sums = _Sums()
    with Writer() as writer:
        for block in blocks:
            writer.add(block.coded, block.lengths, block.lines)
            sums.add(block)
            if watch is not None:
                watch.add(block.seen)
            for one in block.refused[: MAX_ERRORS - len(refused.found)]:
                refused.add(one.line, one.cause, one.file)
            if refused.full:
                break
        return writer.done(), sums


def _lines(lines: list[int], most: int = 12) -> str:
    more = f", … ({len(lines) - most} more)" if len(lines) > most else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:most]))}{more}"


def _too_long(path: str | Path, long: list[int], longest: int, most: int) -> DataError:
    return DataError(
        f"{path}: longer than {most} tokens: {_lines(long)}; the longest has {longest}",
        expected=f"rows of at most max_seq_len = {most} tokens",
        hint=f"--max-seq-len {longest}, or --too-long drop or truncate",
    )


def _none_left(path: str | Path, rows: int, longest: int, most: int) -> DataError:
    return DataError(
        f"{path}: all {rows} rows were dropped: each is longer than {most} tokens (the longest has {longest})"
        if rows
        else f"{path}: there is no row",
        expected="at least one row to learn from",
        hint=f"--max-seq-len {longest}, or --too-long truncate" if rows else "",
    )


def _mute(path: str | Path, lines: list[int], most: int, *, cut: bool) -> DataError:
    return DataError(
        f"{path}: no token to learn in {_lines(lines)}",
        expected=f"an assistant's token within the first {most}" if cut else "an assistant's token after the first one",
        hint="a larger --max-seq-len, or --too-long drop" if cut else "remove these rows",
    )


def _preference(path: str | Path) -> DataError:
    return DataError(
        f"{path} holds preference pairs (chosen, rejected), which nothing trains on yet",
        "rows of another format: chat, instruction, sharegpt, prompt-completion or text",
        "to learn the better answers, write them as prompt-completion: --format prompt-completion --column "
        "completion=chosen",
    )
