"""The report on a data set: the statistics of all batches, and the issues of the whole file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...utils.formatting import format_count
from ..dataset import RowFile, open_rows
from ..formats import InvalidRow, Row
from ..packing import pack_sequences
from ..parallel import batched, cpu_count, parallel_map
from ..tokenize import BATCH_SIZE, BatchTokenizer, RowReport, TokenizedBatch
from .batch_stats import SAMPLES, BatchStats, BatchValidator, find_shared_prefix
from .issues import SHOWN_LINES, IssueCounter
from .near_duplicates import HASHES, SHORT_ANSWER, THRESHOLD, Array, find_near_duplicates, find_repeats

SHOWN_INVALID_ROWS = 100
SAMPLE_CHARACTERS = 1500
HISTOGRAM_BARS = 16
SAME_ANSWER_ROWS = 10
"""Fewest rows with the same answer that are an issue."""
COLUMNS: dict[str, tuple[Any, int]] = {
    "lines": (np.int64, 1),
    "lengths": (np.int64, 1),
    "hashes": (np.uint64, 3),
    "words": (np.uint8, 1),
    "signatures": (np.uint8, 2 * HASHES),
    "comparable": (np.bool_, 1),
}
"""Columns of `BatchStats` that are kept for the whole file: type and width."""


def validate_file(
    path: str | Path,
    tokenizer: Any,
    *,
    model: str,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_seq_len: int = 1024,
    on_overlong: str = "drop",
    train_on: str = "assistant",
    rows_per_step: int = 8,
    validation: str | Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Return the report on a data set, as JSON takes it.

    Args:
        path: a file, a folder or a dataset's id, see `open_rows`.
        tokenizer: of the base that will read the rows.
        model: the base's name.
        format, columns: see `open_rows`.
        max_seq_len: most tokens of a row, from 2.
        on_overlong: what happens to longer ones: "error", "drop" or "truncate".
        train_on: "assistant" (every assistant turn) or "last_assistant" (the last one of each row).
        rows_per_step: rows of an optimizer step, from 1; they are packed together.
        validation: validation rows, which must not be among these.
        processes: how many validate at once; None: as many as there are cores.

    Raises:
        UsageError: the file does not exist, or a setting is out of its range.
        DataError: the file has no known format, or is empty.
        ModelError: no chat template, or one that hides the assistant's turns.
    """
    if max_seq_len < 2 or rows_per_step < 1:
        problem = f"max_seq_len is {max_seq_len}" if max_seq_len < 2 else f"a step of {rows_per_step} rows"
        raise UsageError(problem, "at least 2 tokens, and at least 1 row per step")

    def validate(rows: RowFile, like: DatasetReport | None = None) -> DatasetReport:
        report = DatasetReport(
            tokenizer,
            rows.format,
            max_seq_len=max_seq_len,
            on_overlong=on_overlong,
            rows_per_step=rows_per_step,
            like=like,
        )
        function = BatchTokenizer(tokenizer, max_seq_len, on_overlong, train_on, report.validate)
        batches = batched(map(_with_chosen_answer, rows), BATCH_SIZE)
        for batch in parallel_map(function, batches, cpu_count() if processes is None else processes):
            report.add(batch)
        return report

    rows = open_rows(path, format=format, columns=columns)
    if validation is None:
        return validate(rows).to_dict(file=path, model=model)
    other = open_rows(validation, format=format, columns=columns)
    report = validate(rows)
    return report.to_dict(file=path, model=model, validation=(str(validation), validate(other, report)))


def _with_chosen_answer(row: Row | InvalidRow) -> Row | InvalidRow:
    """Return a preference pair as a row of its better answer, so that its text can be tokenized and validated."""
    if isinstance(row, InvalidRow) or row.chosen is None:
        return row
    if isinstance(row.chosen, str):
        return dataclasses.replace(row, chosen=None, completion=row.chosen)
    return dataclasses.replace(row, chosen=None, messages=[*row.messages, *row.chosen])


class DatasetReport:
    """Collects tokenized batches with `add`, then makes the report with `to_dict`.

    `validate` is the function that computes the statistics of a batch, possibly in another process.

    Args:
        tokenizer: of the base that will read the rows.
        format: of the rows.
        max_seq_len: most tokens of a row.
        on_overlong: what happens to longer ones.
        rows_per_step: rows of an optimizer step.
        like: a report with which this one will be compared.
    """

    def __init__(
        self,
        tokenizer: Any,
        format: str,
        *,
        max_seq_len: int,
        on_overlong: str = "drop",
        rows_per_step: int = 8,
        like: DatasetReport | None = None,
    ) -> None:
        self.start = time.perf_counter()
        self.tokenizer, self.format, self.on_overlong = tokenizer, format, on_overlong
        self.rows_per_step = rows_per_step
        self.validate = BatchValidator.from_tokenizer(tokenizer, max_seq_len)
        if like is not None:
            self.validate.common_trigrams = like.validate.common_trigrams
        self.total = RowReport(max_seq_len)
        self.invalid_count = self.packed_tokens = self.overlong_count = 0
        self.issues = IssueCounter()
        self.invalid: list[InvalidRow] = []
        self.overlong: list[int] = []
        self.prefix: list[int] | None = None
        self.samples: list[tuple[int, list[int], list[bool]]] = []
        self._columns = {name: bytearray() for name in COLUMNS}

    def add(self, batch: TokenizedBatch) -> None:
        """Add the next batch."""
        stats: BatchStats = batch.stats
        self.total.add(batch.report)
        self.invalid_count += len(batch.invalid)
        self.invalid += batch.invalid[: SHOWN_INVALID_ROWS - len(self.invalid)]
        self.overlong_count += len(batch.overlong)
        self.overlong += batch.overlong[: SHOWN_LINES - len(self.overlong)]
        for row in batch.invalid:
            self.issues.add(row.code, [row.line], example=row.cause)
        for code, line, example in stats.issues:
            self.issues.add(code, [line], example=example)
        self.issues.add("no-supervised-token", batch.unsupervised)
        ids = batch.table["input_ids"]
        rows = [row.tolist() for row in np.split(ids.flatten().to_numpy(), ids.offsets.to_numpy()[1:-1])]
        for at in range(0, len(rows), self.rows_per_step):
            self.packed_tokens += len(pack_sequences(rows[at : at + self.rows_per_step]).tokens)
        if stats.prefix is not None:
            self.prefix = stats.prefix if self.prefix is None else find_shared_prefix([self.prefix, stats.prefix])
        self.samples += stats.samples[: SAMPLES - len(self.samples)]
        for name, values in self._columns.items():
            values += getattr(stats, name).tobytes()

    def column(self, name: str) -> Array:
        """Return a column of `COLUMNS` for the whole file, [N] or [N, width]."""
        dtype, width = COLUMNS[name]
        values = np.frombuffer(self._columns[name], dtype)
        return values if width == 1 else values.reshape(-1, width)

    def to_dict(
        self, *, file: str | Path, model: str, validation: tuple[str, DatasetReport] | None = None
    ) -> dict[str, Any]:
        """Return the report, as JSON takes it.

        Args:
            file: the path of the data set.
            model: the base's name.
            validation: path and report of the validation rows, to compare with.
        """
        self._find_similar_rows()
        if validation is not None:
            self._find_overlap(*validation)
        max_seq_len, total = self.total.max_seq_len, self.total
        if self.overlong_count:
            consequence = {"error": "training refuses them", "drop": "left out", "truncate": "truncated at the end"}
            example = f"{max_seq_len} tokens; {consequence[self.on_overlong]}; the longest has {total.longest}"
            self.issues.add("too-long", self.overlong, self.overlong_count, example)
        issues = self.issues.to_list(total.rows, ["too-long"] if self.on_overlong == "error" else [])
        severities = {issue["severity"] for issue in issues}
        prefix = self.prefix or []
        return {
            "file": str(file),
            "format": self.format,
            "model": model,
            "rows": total.rows,
            "invalid_rows": [{"line": r.line, "cause": r.cause, "code": r.code} for r in self.invalid],
            "invalid_count": self.invalid_count,
            "tokens": total.tokens,
            "supervised_tokens": total.supervised_tokens,
            "supervised_share": total.supervised_tokens / total.tokens if total.tokens else 0.0,
            "lengths": _length_statistics(self.column("lengths")),
            "max_seq_len": max_seq_len,
            "overlong": {"rows": self.overlong_count, "lines": self.overlong},
            "shared_prefix": {"tokens": len(prefix), "text": self._decode(prefix)[:SAMPLE_CHARACTERS]},
            "packing": {
                "packed_tokens": self.packed_tokens,
                "saved_share": 1 - self.packed_tokens / total.tokens if total.tokens else 0.0,
            },
            "issues": issues,
            "samples": [self._show_sample(*sample) for sample in self.samples],
            "verdict": "errors" if "error" in severities else "warnings" if issues else "ok",
            "seconds": round(time.perf_counter() - self.start, 3),
        }

    def _find_similar_rows(self) -> None:
        lines, words = self.column("lines"), self.column("words")
        texts, prompts, answers = self.column("hashes").T
        repeated, first = find_repeats(texts)
        self._add_pairs("duplicate", lines[repeated], lines[first])
        comparable = np.flatnonzero(self.column("comparable"))
        near, match = (comparable[rows] for rows in find_near_duplicates(self.column("signatures")))
        new = ~np.isin(near, repeated)
        self._add_pairs("near-duplicate", lines[near[new]], lines[match[new]], f"similarity from {THRESHOLD}: ")
        again, before = find_repeats(prompts)
        other = (answers[again] != answers[before]) & (prompts[again] != 0)
        other &= (words[again] <= SHORT_ANSWER) & (words[before] <= SHORT_ANSWER)
        self._add_pairs("contradiction", lines[again[other]], lines[before[other]])
        # A label or a yes may be the answer of half of the rows, a whole sentence not of a tenth.
        values, first, counts = np.unique(answers, return_index=True, return_counts=True)
        shares = np.where(words[first] > SHORT_ANSWER, 0.1, 0.95)
        for i in np.flatnonzero((counts >= np.maximum(shares * len(answers), SAME_ANSWER_ROWS)) & (values != 0)):
            count, rows = int(counts[i]), np.flatnonzero(answers == values[i])
            different = len(np.unique(prompts[rows]))
            if different >= max(SAME_ANSWER_ROWS, count / 2):
                share = f"{100 * count / len(answers):.0f} % of the rows"
                example = f"one answer to {format_count(different)} prompts, {share}"
                self.issues.add("same-answer", lines[rows[:SHOWN_LINES]].tolist(), count, example)

    def _find_overlap(self, path: str, other: DatasetReport) -> None:
        """Find rows that are validation rows, and invalid validation rows."""
        if other.invalid_count:
            row, invalid_lines = other.invalid[0], [r.line for r in other.invalid]
            example = f"{path}, line {row.line}: {row.cause}"
            self.issues.add("validation-invalid", invalid_lines, other.invalid_count, example)
        lines, other_lines = self.column("lines"), other.column("lines")
        texts, other_texts = self.column("hashes")[:, 0], other.column("hashes")[:, 0]
        order = np.argsort(other_texts, kind="stable")
        same = np.flatnonzero(np.isin(texts, other_texts))
        match = order[np.searchsorted(other_texts[order], texts[same])]
        self._add_pairs("overlap", lines[same], other_lines[match], f"{path}: ", "is")
        near, match = find_near_duplicates(other.column("signatures"), self.column("signatures"))
        rows = np.flatnonzero(self.column("comparable"))[near]
        match = np.flatnonzero(other.column("comparable"))[match]
        new = ~np.isin(rows, same)
        self._add_pairs("near-overlap", lines[rows[new]], other_lines[match[new]], f"{path}: ", "is nearly")

    def _add_pairs(self, code: str, lines: Array, matches: Array, prefix: str = "", relation: str = "as") -> None:
        if len(lines):
            example = f"{prefix}line {lines[0]} {relation} line {matches[0]}"
            self.issues.add(code, lines[:SHOWN_LINES].tolist(), len(lines), example)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _show_sample(self, line: int, ids: list[int], supervised: list[bool]) -> dict[str, Any]:
        """Return the beginning of a row as pieces of text that are supervised or not."""
        pieces: list[dict[str, Any]] = []
        begin, left = 0, SAMPLE_CHARACTERS
        for end in range(1, len(ids) + 1):
            if (end == len(ids) or supervised[end] != supervised[begin]) and left > 0:
                text = self._decode(ids[begin:end])
                shown = text[:left] + "…" * (len(text) > left)
                pieces.append({"text": shown, "supervised": bool(supervised[begin])})
                begin, left = end, left - len(text)
        return {"line": line, "pieces": pieces}


def _length_statistics(lengths: Array) -> dict[str, Any]:
    if not len(lengths):
        return {"min": 0, "median": 0, "p90": 0, "p99": 0, "max": 0, "histogram": []}
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // HISTOGRAM_BARS))
    counts = np.bincount((lengths - low) // width)
    bars = [{"from": low + i * width, "to": low + (i + 1) * width - 1, "rows": int(n)} for i, n in enumerate(counts)]
    median, p90, p99 = (int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99))
    return {"min": low, "median": median, "p90": p90, "p99": p99, "max": high, "histogram": bars}
