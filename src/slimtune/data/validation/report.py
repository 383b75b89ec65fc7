"""Looks at all batches of a file, added up, and the report made of them."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.formatting import format_count
from ..packing import pack_sequences
from ..records import InvalidRow
from .batch_stats import SAMPLES, BatchStats, ValidationSettings, fit_settings, shared_beginning
from .issues import SHOWN, IssueCounter
from .near_duplicates import HASHES, NEAR, SHORT, Array, near_pairs, repeats

MOST_REFUSED = 100
_MANY = 10
_SHARE = 0.1
_BARS = 16
_SAMPLE_CHARACTERS = 1500


class DatasetReport:
    """What was seen of one file, and the report on it: `survey.add(survey.look(batch))`, then `survey.report(…)`.

    Args:
        tokenizer: of the base that will read the rows.
        max_seq_len, on_overlong: see `Lens`.
        rows_a_step: rows that a step lays together.
        like: a survey to compare with later.

    `format` is that of the rows; who opened the file says it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_seq_len: int,
        on_overlong: str = "drop",
        rows_a_step: int = 8,
        like: DatasetReport | None = None,
    ) -> None:
        self.began = time.perf_counter()
        self.tokenizer = tokenizer
        self.look: ValidationSettings = fit_settings(tokenizer, max_seq_len=max_seq_len, on_overlong=on_overlong)
        self.rows_a_step = rows_a_step
        if like is not None:
            self.look.known = like.look.known
        self.format = ""
        self.rows = self.refused_count = self.laid = 0
        self.tally = IssueCounter()
        self.refused: list[InvalidRow] = []
        self.prefix: list[int] | None = None
        self.samples: list[tuple[int, list[int], list[bool]]] = []
        self._lines, self._lengths, self._learned, self._words = array("q"), array("q"), array("q"), array("B")
        self._keys, self._signatures, self._judged = bytearray(), bytearray(), bytearray()

    def add(self, one: BatchStats) -> None:
        """Add what a look at the next batch gave."""
        self.rows += one.rows
        self.refused_count += len(one.refused)
        self.refused += one.refused[: MOST_REFUSED - len(self.refused)]
        self.laid += self._laid(one)
        for refusal in one.refused:
            self.tally.add(refusal.code, [refusal.line], detail=refusal.cause)
        for code, line, example in one.marks:
            self.tally.add(code, [line], detail=example)
        if one.prefix is not None:
            self.prefix = one.prefix if self.prefix is None else shared_beginning([self.prefix, one.prefix])
        self.samples += one.samples[: SAMPLES - len(self.samples)]
        for kept, new in (
            (self._lines, one.lines), (self._lengths, one.lengths), (self._learned, one.learned),
            (self._words, one.words),
        ):  # fmt: skip
            kept.frombytes(new.tobytes())
        self._keys += one.keys.tobytes()
        self._signatures += one.signatures.tobytes()
        self._judged += one.judged.tobytes()

    def _laid(self, one: BatchStats) -> int:
        """Return a batch's tokens as steps lay them."""
        lengths = np.minimum(one.lengths[one.learned >= 0], self.look.max_seq_len)
        ends = np.cumsum(lengths)
        rows = [one.tokens[end - n : end].tolist() for n, end in zip(lengths, ends, strict=True)]
        step = self.rows_a_step
        return sum(len(pack_sequences(rows[at : at + step]).tokens) for at in range(0, len(rows), step))

    @property
    def lines(self) -> Array:
        """Lines of the rows that have tokens, int64 [N]."""
        return np.frombuffer(self._lines, np.int64)

    @property
    def keys(self) -> Array:
        """Their keys, uint64 [N, 3]."""
        return np.frombuffer(self._keys, np.uint64).reshape(-1, 3)

    @property
    def signatures(self) -> Array:
        """Signatures of the rows that can be judged, uint8 [J, 128]."""
        return np.frombuffer(self._signatures, np.uint8).reshape(-1, 2 * HASHES)

    @property
    def judged(self) -> Array:
        """The rows that can be judged, int64 [J]."""
        return np.flatnonzero(np.frombuffer(self._judged, np.bool_))

    def report(
        self, *, file: str | Path, model: str, validation: tuple[str, DatasetReport] | None = None
    ) -> dict[str, Any]:
        """Return the report, as JSON takes it.

        Args:
            file: the file's path.
            model: the base's name.
            validation: the validation file's path and survey, to be compared with.
        """
        lengths = np.frombuffer(self._lengths, np.int64)
        learned = np.frombuffer(self._learned, np.int64)
        tokens = int(np.minimum(lengths[learned >= 0], self.look.max_seq_len).sum())
        supervised = int(learned[learned >= 0].sum())
        long = self.lines[lengths > self.look.max_seq_len]
        self._compare()
        if len(long):
            self.tally.add("too-long", long[:SHOWN].tolist(), len(long), f"{self.look.max_seq_len} tokens; "
                           f"{_FATE[self.look.on_overlong]}; the longest has {int(lengths.max())}")  # fmt: skip
        if validation is not None:
            self._overlap(*validation)
        if not self.rows:
            self.tally.add("empty-file", [0], detail="the file holds no row")
        always = ("too-long",) if self.look.on_overlong == "error" else ()
        found = self.tally.findings(self.rows, always)
        faulty = any(f.severity == "fault" for f in found)
        prefix = self.prefix or []
        return {
            "file": str(file),
            "format": self.format,
            "model": model,
            "rows": self.rows,
            "refused": [{"line": r.line, "cause": r.cause, "code": r.code} for r in self.refused],
            "refused_count": self.refused_count,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / tokens if tokens else 0.0,
            "lengths": _lengths(lengths),
            "max_seq_len": self.look.max_seq_len,
            "on_overlong": {"rows": len(long), "lines": long[:SHOWN].tolist()},
            "shared_prefix": {"tokens": len(prefix), "text": self._decoded(prefix)[:_SAMPLE_CHARACTERS]},
            "packing": {"laid_tokens": self.laid, "saved_share": 1 - self.laid / tokens if tokens else 0.0},
            "findings": [f.to_dict() for f in found],
            "samples": [self._sample(*sample) for sample in self.samples],
            "verdict": "faulty" if faulty else "warnings" if found else "sound",
            "seconds": round(time.perf_counter() - self.began, 3),
        }

    def _compare(self) -> None:
        """Count rows that are alike."""
        lines, keys, words = self.lines, self.keys, np.frombuffer(self._words, np.uint8)
        whole, prompts, answers = keys.T
        again, first = repeats(whole)
        self._pairs("duplicate", lines[again], lines[first])
        nearly, of = near_pairs(self.signatures)
        nearly, of = self.judged[nearly], self.judged[of]
        new = ~np.isin(nearly, again)
        self._pairs("near-duplicate", lines[nearly[new]], lines[of[new]], f"similarity from {NEAR}")
        asked, before = repeats(prompts)
        other = (answers[asked] != answers[before]) & (prompts[asked] != 0)
        other &= (words[asked] <= SHORT) & (words[before] <= SHORT)
        self._pairs("contradiction", lines[asked[other]], lines[before[other]])
        self._same_answer(answers, prompts, words)

    def _same_answer(self, answers: Array, prompts: Array, words: Array) -> None:
        said, first, counts = np.unique(answers, return_index=True, return_counts=True)
        # A label or a yes may stand in half of the rows; a sentence that does is said by rote.
        least = np.maximum(np.where(words[first] > SHORT, _SHARE, 0.95) * len(answers), _MANY)
        for i in np.flatnonzero((counts >= least) & (said != 0)):
            answer, n = said[i], int(counts[i])
            rows = np.flatnonzero(answers == answer)
            if (asked := len(np.unique(prompts[rows]))) >= max(_MANY, n / 2):
                detail = f"one answer to {format_count(asked)} prompts, {100 * n / len(answers):.0f} % of the rows"
                self.tally.add("same-answer", self.lines[rows[:SHOWN]].tolist(), n, detail)

    def _overlap(self, path: str, other: DatasetReport) -> None:
        if other.refused_count:
            lines = [r.line for r in other.refused]
            self.tally.add("validation-refused", lines, other.refused_count, f"of {path}, line {lines[0]}: "
                           f"{other.refused[0].cause}")  # fmt: skip
        mine, theirs = self.keys[:, 0], other.keys[:, 0]
        order = np.argsort(theirs, kind="stable")
        at = np.minimum(np.searchsorted(theirs[order], mine), max(len(order) - 1, 0))
        same = np.flatnonzero(theirs[order][at] == mine) if len(order) else np.zeros(0, np.int64)
        if len(same):
            self._pairs("overlap", self.lines[same], other.lines[order[at[same]]], path, "is line")
        near, of = near_pairs(other.signatures, self.signatures)
        rows, of = self.judged[near], other.judged[of]
        new = ~np.isin(rows, same)
        self._pairs("near-overlap", self.lines[rows[new]], other.lines[of[new]], path, "is nearly line")

    def _pairs(self, code: str, lines: Array, of: Array, about: str = "", like: str = "as line") -> None:
        if len(lines):
            example = f"line {lines[0]} {like} {of[0]}"
            self.tally.add(code, lines[:SHOWN].tolist(), len(lines), f"{about + ': ' if about else ''}{example}")

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _sample(self, line: int, ids: list[int], learned: list[bool]) -> dict[str, Any]:
        pieces: list[dict[str, Any]] = []
        begin, left = 0, _SAMPLE_CHARACTERS
        for end in range(1, len(ids) + 1):
            if (end == len(ids) or learned[end] != learned[begin]) and left > 0:
                text = self._decoded(ids[begin:end])
                pieces.append({"text": text[:left] + "…" * (len(text) > left), "learned": bool(learned[begin])})
                begin, left = end, left - len(text)
        return {"line": line, "pieces": pieces}


_FATE = {"error": "refused", "drop": "left out", "truncate": "cut at the end"}


def _lengths(lengths: Array) -> dict[str, Any]:
    if not len(lengths):
        return {"min": 0, "median": 0, "p90": 0, "p99": 0, "max": 0, "histogram": []}
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = np.bincount((lengths - low) // width)
    bars = [{"from": low + i * width, "to": low + (i + 1) * width - 1, "rows": int(n)} for i, n in enumerate(counts)]
    median, p90, p99 = (int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99))
    return {"min": low, "median": median, "p90": p90, "p99": p99, "max": high, "histogram": bars}
