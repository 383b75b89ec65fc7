"""Rows as training examples, and a report of what became of each: none is cut or dropped unsaid.

An example is `{"input_ids": [L], "labels": [L], "line": int}`; a label is its token's id where the assistant speaks and
-100 elsewhere. A first token is never counted as learned: nothing stands before it to predict it from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimtune.data.chat import Encoded, Rendered, ends_turn, render, supervised, tokenize
from slimtune.data.read import Faults, Row
from slimtune.errors import DataError, UsageError, listed, nearest
from slimtune.units import count_text

Example = dict[str, Any]
TOO_LONG = ("error", "drop", "truncate")
IGNORED = -100
_BATCH = 512


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
        parts.append(f"{count_text(self.tokens)} tokens, {count_text(self.supervised_tokens)} learned ({share})")
        parts.append(f"longest row {self.longest}")
        if self.unended:
            parts.append(f"{self.unended} of them end without an end-of-turn token")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, int]:
        """Return the report as JSON takes it."""
        return asdict(self)


def encode_rows(
    rows: list[Row], tokenizer: Any, *, max_seq_len: int, too_long: str = "drop", path: str | Path
) -> tuple[list[Example], RowReport]:
    """Return the rows as examples, in their order, and the report.

    Args:
        rows: chat rows as `read_rows` gives them.
        tokenizer: a fast tokenizer with a chat template.
        max_seq_len: most tokens of a row (≥ 2).
        too_long: what happens to longer rows: "error", "drop" or "truncate".
        path: the file the rows came from, for messages.

    Raises:
        UsageError: an unknown `too_long`, or a `max_seq_len` under 2.
        DataError: the template refuses rows, rows are too long under "error", none is left, or some have nothing to
            learn.
        ModelError: no chat template, or one that hides the assistant's turns.
    """
    if too_long not in TOO_LONG:
        raise UsageError(f"too_long is {too_long!r}{nearest(too_long, TOO_LONG)}", wanted=listed(TOO_LONG))
    if max_seq_len < 2:
        raise UsageError(f"max_seq_len is {max_seq_len}", wanted="2 tokens or more: one to read, one to say")
    encoded = _encoded(rows, tokenizer, path)
    long = [row for row, one in zip(rows, encoded, strict=True) if len(one.input_ids) > max_seq_len]
    longest = max((len(one.input_ids) for one in encoded), default=0)
    if long and too_long == "error":
        raise _too_long(path, long, longest, max_seq_len)
    examples: list[Example] = []
    mute: list[int] = []
    unended = 0
    for row, one in zip(rows, encoded, strict=True):
        if len(one.input_ids) > max_seq_len and too_long == "drop":
            continue
        example = _example(row, one, max_seq_len)
        examples.append(example)
        if not _learned(example):
            mute.append(row.line)
        unended += not _ended(tokenizer, one)
    if mute:
        raise _mute(path, mute, max_seq_len, cut=bool(long) and too_long == "truncate")
    if not examples:
        raise _none_left(path, len(rows), longest, max_seq_len)
    return examples, RowReport(
        rows=len(rows),
        kept=len(examples),
        dropped=len(rows) - len(examples),
        truncated=len(long) if too_long == "truncate" else 0,
        tokens=sum(len(e["input_ids"]) for e in examples),
        supervised_tokens=sum(_learned(e) for e in examples),
        longest=longest,
        max_seq_len=max_seq_len,
        unended=unended,
    )


def _encoded(rows: list[Row], tokenizer: Any, path: str | Path) -> list[Encoded]:
    rendered: list[Rendered] = []
    faults = Faults(path, fix="change these rows, or give another template (data.chat_template)")
    for row in rows:
        try:
            rendered.append(render(tokenizer, row.messages))
        except DataError as fault:
            faults.add(row.line, fault.got)
            if faults.full:
                break
    faults.check()
    encoded: list[Encoded] = []
    for at in range(0, len(rendered), _BATCH):
        some = rendered[at : at + _BATCH]
        ids, offsets = tokenize(tokenizer, [one.text for one in some])
        encoded += [Encoded(i, supervised(one, o)) for one, i, o in zip(some, ids, offsets, strict=True)]
    return encoded


def _example(row: Row, one: Encoded, most: int) -> Example:
    labels = [t if said else IGNORED for t, said in zip(one.input_ids, one.supervised, strict=True)]
    return {"input_ids": one.input_ids[:most], "labels": labels[:most], "line": row.line}


def _learned(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"][1:])


def _ended(tokenizer: Any, one: Encoded) -> bool:
    last = next((t for t, said in zip(one.input_ids[::-1], one.supervised[::-1], strict=True) if said), None)
    return last is None or ends_turn(tokenizer, last)


def _lines(lines: list[int], most: int = 12) -> str:
    more = f", … ({len(lines) - most} more)" if len(lines) > most else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:most]))}{more}"


def _too_long(path: str | Path, long: list[Row], longest: int, most: int) -> DataError:
    return DataError(
        f"{path}: longer than {most} tokens: {_lines([r.line for r in long])}; the longest has {longest}",
        wanted=f"rows of at most max_seq_len = {most} tokens",
        fix=f"--max-seq-len {longest}, or --too-long drop or truncate",
    )


def _none_left(path: str | Path, rows: int, longest: int, most: int) -> DataError:
    return DataError(
        f"{path}: all {rows} rows were dropped: each is longer than {most} tokens (the longest has {longest})"
        if rows
        else f"{path}: there is no row",
        wanted="at least one row to learn from",
        fix=f"--max-seq-len {longest}, or --too-long truncate" if rows else "",
    )


def _mute(path: str | Path, lines: list[int], most: int, *, cut: bool) -> DataError:
    return DataError(
        f"{path}: no token to learn in {_lines(lines)}",
        wanted=f"an assistant's token within the first {most}" if cut else "an assistant's token after the first one",
        fix="a larger --max-seq-len, or --too-long drop" if cut else "remove these rows",
    )
