"""The report on a data set: the statistics of all batches, the issues of the whole file, and its text for people."""

import dataclasses
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.data.chat_template import TokenizedRow, adds_bos
from ...core.data.packing import pack_sequences
from ...core.data.parallel import parallel_map
from ...core.data.rows import InvalidRow, Row
from ...core.data.tokenize import (
    PARAGRAPH_HINT,
    BatchTokenizer,
    TokenizationStats,
    TokenizedBatch,
    batch_rows,
    format_lines,
)
from ...core.foundation.cpu import cpu_count
from ...core.foundation.formatting import format_count
from ...core.foundation.sequences import find_shared_prefix
from ...errors import DataError, format_names, nearest
from ...extras.row_files import RowFile, column_hint, describe_losses, open_rows
from ...extras.row_formats.classification import sort_labels
from ...extras.row_formats.documents import find_cuts
from .batch_stats import ROW_STATS, SAMPLES, BatchStats, BatchValidator
from .near_duplicates import HASHES, SHORT_ANSWER, THRESHOLD, Array, find_near_duplicates, find_repeats, mix_hashes

SHOWN_INVALID_ROWS = 100
SHOWN_LINES = 20
"""Lines that an issue names."""
SAMPLE_CHARACTERS = 1500
SHOWN_PREFIX = 200
"""Characters of the shared prefix that people see."""
HISTOGRAM_BARS = 16
SAME_ANSWER_ROWS = 10
"""Fewest rows with the same answer that are an issue."""
RARE_CLASS_ROWS = 5
"""Fewer rows of a class are an issue."""
LENGTH_LEAK = 0.65
"""Share of pairs that the length of their answers decides, from whose lower bound on it is an issue."""
PAIR_FORMATS = ("preference", "ranked-preference")
IMBALANCE = 10
"""How many times as many rows the most frequent class has as one whose rows are an issue."""


@dataclass(frozen=True)
class IssueType:
    """Which rows have an issue, and what to do about it.

    `error_from` is the share of the file's rows from which it is an error (0: a single row); None: always a warning.
    """

    description: str
    hint: str
    error_from: float | None = None


ISSUE_TYPES = {
    "unused-column": IssueType("rows with a column that changes what they mean and is not used", "", 0),
    "no-supervised-token": IssueType("rows without a supervised token", "remove these rows", 0),
    "doubled-bos": IssueType("rows that begin with the beginning-of-sequence token twice",
        "remove it from the text or from the template", 0),
    "missing-end": IssueType("rows whose last turn has no end-of-turn token: the model does not learn to stop",
        "use a chat template that ends turns with a special token (data.chat_template)", 0.5),
    "control-token-in-text": IssueType(
        "rows with a control token of this base typed in a message, which the model reads as the token itself",
        "remove the token from the text, or break it up", 0.001),
    "already-rendered": IssueType(
        "rows with a message that a chat template has already rendered: it would be rendered twice",
        "use the messages from before that template", 0.02),
    "too-long": IssueType("rows longer than max_seq_len", "a larger --max-seq-len, or shorter rows", 0.9),
    "duplicate": IssueType("rows that repeat an earlier row", "remove them, unless they should count more"),
    "near-duplicate": IssueType("rows that nearly repeat an earlier row", "remove them, unless they are intended"),
    "contradiction": IssueType("rows with another short answer to a prompt than an earlier row",
        "keep the right answer"),
    "one-class": IssueType("rows of one class only: there is nothing to tell apart", "add rows of another class", 0),
    "contradictory-pair": IssueType("pairs that prefer the answer which an earlier pair of the same prompt rejects",
        "keep the right one of the two"),
    "length-leak": IssueType("pairs whose answer can be chosen by its length: a model may learn the length alone",
        "add pairs whose better answer is the other one, or compare answers per token (task simpo, or dpo with "
        "loss_type sigmoid_norm)"),
    "one-label": IssueType("rows with the same label: KTO learns from good and from bad answers",
        "add rows with the other label"),
    "contradictory-label": IssueType("rows with another label for a text than an earlier row", "keep the right label"),
    "similar-labels": IssueType("rows with labels that differ in upper case or white space alone",
        "write each class in one way"),
    "rare-class": IssueType(f"rows of a class with fewer than {RARE_CLASS_ROWS} rows", "more rows of these classes"),
    "class-imbalance": IssueType("rows of classes that are much rarer than the most frequent one",
        "class_weights: balanced, and compare macro-F1 rather than accuracy"),
    "unseen-label": IssueType("validation rows with a label that no training row has",
        "correct the label, or add training rows of this class", 0),
    "same-answer": IssueType("rows with the same answer to different prompts", "keep a few of them", 0.95),
    "media-placeholder": IssueType("rows with a place for an image or a sound in their text: only text is learned",
        "remove them, or say in words what it shows", 0.02),
    "other-prompt": IssueType(
        "rows whose last answer is learned after another text than generation begins it with; a template that ends "
        "its prompt with <think> does so", "write what is thought into the rows, or use a template whose prompt ends "
        "where an answer begins (data.chat_template)"),
    "short-document": IssueType("documents of fewer than two tokens, from which nothing is learned but their end",
        "remove them, or join them to others"),
    "placeholder-answer": IssueType("rows with a placeholder as the answer", "remove them, or write an answer", 0.5),
    "same-pair": IssueType("preference pairs whose two answers are the same", "remove them", 0),
    "empty-answer": IssueType("preference pairs with an answer that has no token of its own", "remove them", 0),
    "overlap": IssueType("rows that are also validation rows: the validation loss would look too good",
        "remove them from one of the two files", 0.01),
    "near-overlap": IssueType("rows that nearly repeat a validation row", "remove them from one of the two files"),
    "validation-invalid": IssueType("invalid validation rows", "run slimtune data on the validation file", 0),
    "mojibake": IssueType("rows with text that was decoded with the wrong encoding (“Ã©” for “é”)",
        "decode the source as UTF-8, or repair it with ftfy", 0.1),
    "replacement-character": IssueType("rows with U+FFFD, which replaces characters that were lost",
        "decode the source with its own encoding", 0.1),
    "null-byte": IssueType("rows with a null character", "read the source with its own encoding (UTF-16?)", 0.1),
    "control-character": IssueType("rows with control characters", "remove them"),
    "byte-order-mark": IssueType("rows with a byte order mark inside their text", "remove it"),
    "html-entity": IssueType("rows of plain text with HTML entities", "unescape them (html.unescape)"),
    "mixed-script": IssueType("rows with words that mix Latin and Cyrillic letters that look alike",
        "write each word in one script"),
}  # fmt: skip
"""Issues by code, in the order of the report. A code that is not here is the code of an `InvalidRow`: an error."""
INVALID_ROW = IssueType("", "repair or remove these rows", 0)


def validate_file(
    path: str | Path,
    tokenizer: Any,
    *,
    model: str | None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
    max_seq_len: int = 1024,
    on_overlong: str = "drop",
    train_on: str = "assistant",
    rows_per_step: int = 8,
    validation: str | Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Return the report on a data set, as JSON takes it.

    Args:
        path, format, columns, ignore_columns: see `open_rows`.
        tokenizer, model: of the base that will read the rows, and its name; None: only rows and columns are counted.
        max_seq_len, on_overlong, train_on: see `tokenize_dataset`.
        rows_per_step: rows of an optimizer step, from 1; they are packed together.
        validation: validation rows, which must not be among these.
        processes: how many validate at once; None: as many as there are cores.
    """

    def validate(rows: RowFile, like: DatasetReport | None = None) -> DatasetReport:
        report = DatasetReport(tokenizer, rows, max_seq_len, on_overlong, rows_per_step, like)
        if tokenizer is None:
            for row in rows:
                report.total.rows += 1
                if isinstance(row, Row) and row.label_names is not None:
                    report.add_labels([row.line], [row.label_names])
                report.add_invalid([row] if isinstance(row, InvalidRow) else [])
            return report
        function = BatchTokenizer(
            tokenizer, max_seq_len, on_overlong, train_on, report.measure_batch, report.has_documents
        )
        for batch in parallel_map(function, batch_rows(rows), processes or cpu_count()):
            report.on_batch(batch)
        return report

    options: dict[str, Any] = {"format": format, "columns": columns, "ignore_columns": ignore_columns}
    files = [open_rows(p, **options) for p in (path, validation) if p is not None]
    report = validate(files[0])
    other = None if validation is None else (str(validation), validate(files[1], report))
    return report.finish(file=path, model=model, validation=other).to_json()


@dataclass
class FoundIssue:
    """The rows of a file that have an issue: how many, the first `SHOWN_LINES` of their lines, and one example."""

    count: int = 0
    lines: list[int] = dataclasses.field(default_factory=list)
    example: str = ""
    hint: str = ""  # in place of the hint of its type

    def add(self, lines: Sequence[int] | Array, example: str = "") -> None:
        self.count += len(lines)
        self.lines += map(int, lines[: SHOWN_LINES - len(self.lines)])
        self.example = self.example or example


class DatasetReport:
    """Collects tokenized batches with `on_batch`, then makes the report with `finish`, once.

    Arguments are those of `validate_file`; `like` is a report with which this one will be compared. `measure_batch`
    computes the statistics of a batch, possibly in another process.
    """

    def __init__(
        self, tokenizer: Any, source: RowFile, max_seq_len: int, on_overlong: str = "drop", rows_per_step: int = 8,
        like: "DatasetReport | None" = None,
    ) -> None:  # fmt: skip
        self.start = time.perf_counter()
        self.tokenizer, self.source, self.on_overlong = tokenizer, source, on_overlong
        self.rows_per_step = rows_per_step
        self.measure_batch = None if tokenizer is None else BatchValidator(tokenizer, max_seq_len)
        if self.measure_batch is not None and like is not None and like.measure_batch is not None:
            self.measure_batch.common_trigrams = like.measure_batch.common_trigrams
        self.total = TokenizationStats(max_seq_len)
        self.has_documents = source.format == "document"
        self.special_tokens = 1 + (tokenizer is not None and adds_bos(tokenizer))  # of a document
        self.issues: dict[str, FoundIssue] = {}
        self.invalid_count = self.packed_tokens = 0
        self.invalid: list[InvalidRow] = []
        self.labels: dict[str, FoundIssue] = {}  # the rows of each class
        self.labelled_rows = 0
        self.prefix: list[int] | None = None
        self.thinking = [0, 0, 0]
        self.samples: list[tuple[int, TokenizedRow]] = []
        self._rows, self._signatures = bytearray(), bytearray()

    def on_batch(self, batch: TokenizedBatch) -> None:
        """Add the next batch."""
        stats: BatchStats = batch.stats
        self.total.add(batch.report)
        self.add_invalid(batch.invalid)
        if batch.labels is not None:
            self.add_labels(batch.lines.tolist(), batch.labels)
        for code, line, example in stats.issues:
            self.add_issue(code, [line], example)
        self.add_issue("no-supervised-token", batch.unsupervised)
        self.add_issue("too-long", batch.overlong)
        if self.has_documents:
            short = batch.lines[batch.lengths < self.special_tokens + 2]
            self.add_issue("short-document", short, self.source.find_file(int(short[0])) if len(short) else "")
        else:
            examples = [n or [length] for n, length in zip(batch.row_lengths, batch.lengths.tolist(), strict=True)]
            left = iter(np.split(batch.ids, np.cumsum([n for lengths in examples for n in lengths])[:-1]))
            for at in range(0, len(examples), self.rows_per_step):
                count = sum(map(len, examples[at : at + self.rows_per_step]))
                self.packed_tokens += len(pack_sequences([next(left).tolist() for _ in range(count)]).tokens)
        if stats.prefix is not None:
            self.prefix = stats.prefix if self.prefix is None else find_shared_prefix([self.prefix, stats.prefix])
        self.thinking = [a + b for a, b in zip(self.thinking, stats.thinking, strict=True)]
        self.samples += stats.samples[: SAMPLES - len(self.samples)]
        self._rows += stats.rows.tobytes()
        self._signatures += stats.minhash_signatures.tobytes()

    def add_invalid(self, rows: Sequence[InvalidRow]) -> None:
        """Count invalid rows."""
        self.invalid_count += len(rows)
        self.invalid += rows[: SHOWN_INVALID_ROWS - len(self.invalid)]
        for row in rows:
            self.add_issue(row.code, [row.line], row.cause)
            self.issues[row.code].hint = row.hint

    def add_labels(self, lines: Sequence[int], labels: Sequence[Sequence[str]]) -> None:
        """Count the rows of each class."""
        self.labelled_rows += len(lines)
        for line, names in zip(lines, labels, strict=True):
            for name in names:
                self.labels.setdefault(name, FoundIssue()).add([line])

    def add_issue(self, code: str, lines: Sequence[int] | Array, example: str = "") -> None:
        """Count rows with an issue of `ISSUE_TYPES`, or with an error of an `InvalidRow`."""
        if len(lines):
            self.issues.setdefault(code, FoundIssue()).add(lines, example)

    @property
    def rows(self) -> Array:
        """The statistics of all rows that have tokens, `ROW_STATS` [N]."""
        return np.frombuffer(self._rows, ROW_STATS)

    def kept_hashes(self) -> Array:
        """Return the hash of the text of each row that training keeps, uint64 [N]."""
        rows = self.rows
        whole = self.has_documents or self.on_overlong == "truncate"
        kept = (rows["length"] <= self.total.max_seq_len) | whole
        return rows["hashes"][kept, 0]

    @property
    def signatures(self) -> tuple[Array, Array]:
        """The signatures of the comparable rows, uint8 [J, 128], and their numbers, int64 [J]."""
        signatures = np.frombuffer(self._signatures, np.uint8).reshape(-1, 2 * HASHES)
        return signatures, np.flatnonzero(self.rows["comparable"])

    def finish(
        self, *, file: str | Path, model: str | None, validation: "tuple[str, DatasetReport] | None" = None
    ) -> "DataReport":
        """Return the report; `validation` is path and report of the rows to compare with."""
        self._add_file_issues()
        self._find_similar_rows()
        self._find_label_issues()
        pairs = self._measure_pairs()
        if validation is not None:
            self._find_overlap(*validation)
        total, prefix, windows = self.total, self.prefix or [], None
        if self.has_documents and self.measure_batch is not None:
            cuts = find_cuts(self.rows["length"], total.max_seq_len, self.special_tokens - 1, vary=True)
            windows = int(cuts[0].sum())
            # A window inside a document begins with tokens that it does not learn.
            self.packed_tokens = total.tokens + (windows - len(self.rows)) * self.special_tokens
        overlong = self.issues.get("too-long", FoundIssue())
        consequence = {"error": "training refuses them", "drop": "left out", "truncate": "truncated at the end"}
        overlong.example = (
            f"{total.max_seq_len} tokens; {consequence[self.on_overlong]}; the longest has {total.longest}"
        )
        if self.source.has_paragraphs:
            overlong.hint = f"{PARAGRAPH_HINT}, or a larger --max-seq-len"
        issues = self._list_issues()
        severities = {issue["severity"] for issue in issues}
        source = self.source
        verdict = "errors" if "error" in severities else "not checked" if self.measure_batch is None else ""
        values = {
            "file": str(file),
            "format": source.format,
            "model": model,
            "rows": total.rows,
            "columns": source.columns,
            "unused_columns": [
                {"name": c.name, "rows": c.rows, "changes_meaning": bool(c.loss)} for c in source.unused_columns
            ],
            "ignored_columns": [c for c in source.ignored_columns if c not in source.missing_ignored_columns],
            "notes": self._list_notes(),
            "invalid_rows": [{"line": r.line, "cause": r.cause, "code": r.code} for r in self.invalid],
            "invalid_count": self.invalid_count,
            "classes": {name: self.labels[name].count for name in sort_labels(self.labels)},
            "pairs": pairs,
            "tokens": total.tokens,
            "supervised_tokens": total.supervised_tokens,
            "supervised_share": total.supervised_tokens / total.tokens if total.tokens else 0.0,
            "lengths": _length_statistics(self.rows["length"]),
            "max_seq_len": total.max_seq_len,
            "overlong": {"rows": overlong.count, "lines": overlong.lines},
            "windows": windows,
            "thinking": dict(zip(("learned", "kept", "left_out"), self.thinking, strict=True)),
            "shared_prefix": {"tokens": len(prefix), "text": self._decode(prefix)[:SAMPLE_CHARACTERS]},
            "packing": {
                "packed_tokens": self.packed_tokens,
                "saved_share": max(0.0, 1 - self.packed_tokens / total.tokens) if total.tokens else 0.0,
            },
            "issues": issues,
            "samples": [self._show_sample(line, row.input_ids, row.supervised) for line, row in self.samples],
            "verdict": verdict or ("warnings" if issues else "ok"),
            "seconds": round(time.perf_counter() - self.start, 3),
        }
        return DataReport(values)

    def _add_file_issues(self) -> None:
        """Find what is wrong with all rows: columns that are not used."""
        if columns := self.source.lossy_columns:
            first = max(columns, key=lambda c: c.rows)
            what, hint = describe_losses(columns), column_hint(columns)
            self.issues["unused-column"] = FoundIssue(first.rows, [first.line], what, hint)

    def _list_notes(self) -> list[str]:
        """Return what training does with every row of this file, in sentences."""
        known = [column.name for column in self.source.unused_columns]
        notes = [
            f"--ignore-columns {name}: no row has that column{nearest(name, known)}"
            for name in self.source.missing_ignored_columns
        ]
        if self.source.has_paragraphs:
            blank = "blank lines separate them" if self.total.rows > 1 else "it has no blank line, so it is one row"
            notes.append(f"each paragraph of a .txt file is a row of its own: {blank}")
        good, bad = (self.labels.get(str(label), FoundIssue()).count for label in (True, False))
        if self.source.format == "unpaired-preference" and good and bad and not 2 / 3 <= good / bad <= 2:
            # Equation 8 of the paper on KTO: 1 to 4/3 times as much weight on good answers as on bad ones
            name, low = ("desirable", bad / good) if good < bad else ("undesirable", 0.75 * good / bad)
            advice = f"task.{name}_weight of {low:.2f} to {4 / 3 * low:.2f} balances them"
            notes.append(f"{good:,} good and {bad:,} bad answers: a {advice}")
        if self.source.rows_are_text_files:
            notes.append("each file is one document; its line is its number in the order of the names")
        if self.source.format in ("text", "document"):
            end = "the end-of-text token" if self.tokenizer is None else repr(self.tokenizer.eos_token)
            row = "document" if self.has_documents else "row"
            notes.append(f"a {row} is learned whole, and {end} after it: the model learns to stop where a {row} ends")
        return notes

    def _find_similar_rows(self) -> None:
        lines, words, (texts, prompts, answers) = self.rows["line"], self.rows["words"], self.rows["hashes"].T
        repeated, first = find_repeats(texts)
        self._add_pairs("duplicate", lines[repeated], lines[first])
        signatures, numbers = self.signatures
        near, match = (numbers[rows] for rows in find_near_duplicates(signatures))
        new = ~np.isin(near, repeated)
        self._add_pairs("near-duplicate", lines[near[new]], lines[match[new]], f"similarity from {THRESHOLD}: ")
        again, before = find_repeats(prompts)
        other = (answers[again] != answers[before]) & (prompts[again] != 0)
        other &= (words[again] <= SHORT_ANSWER) & (words[before] <= SHORT_ANSWER)
        is_labelled = self.source.format in ("classification", "unpaired-preference")
        if self.source.format not in PAIR_FORMATS:
            code = "contradictory-label" if is_labelled else "contradiction"
            self._add_pairs(code, lines[again[other]], lines[before[other]])
        # A label or a yes may be the answer of half of the rows, a whole sentence not of a tenth.
        values, first, counts = np.unique(answers, return_index=True, return_counts=True)
        least = np.maximum(np.where(words[first] > SHORT_ANSWER, 0.1, 0.95) * len(answers), SAME_ANSWER_ROWS)
        for value in values[(counts >= least) & (values != 0)] if not is_labelled else ():
            rows = np.flatnonzero(answers == value)
            different = len(np.unique(prompts[rows]))
            if different >= max(SAME_ANSWER_ROWS, len(rows) / 2):
                share = f"{100 * len(rows) / len(answers):.0f} % of the rows"
                self.add_issue("same-answer", lines[rows], f"one answer to {format_count(different)} prompts, {share}")

    def _measure_pairs(self) -> dict[str, Any] | None:
        """Find pairs that contradict one another or that length decides; return how often the better one is longer."""
        rows = self.rows
        if self.source.format not in PAIR_FORMATS or not len(rows):
            return None
        _, prompts, better = rows["hashes"].T
        keys, swapped = (mix_hashes(prompts, *pair) for pair in ((better, rows["worst"]), (rows["worst"], better)))
        order = np.argsort(keys, kind="stable")
        # the first row that is the reverse of each, if there is one
        place = order[np.searchsorted(keys[order], swapped).clip(max=len(keys) - 1)]
        later = np.flatnonzero((keys[place] == swapped) & (place < np.arange(len(keys))) & (keys != swapped))
        self._add_pairs("contradictory-pair", rows["line"][later], rows["line"][place[later]], relation="contradicts")
        longer, shorter = (sign * (rows["answer_tokens"] @ [1, -1]) > 0 for sign in (1, -1))
        counts = [int(part.sum()) for part in (longer, shorter)]
        low, high = _estimate_share(counts[0], sum(counts))
        for name, part, (least, most) in (("longer", longer, (low, high)), ("shorter", shorter, (1 - high, 1 - low))):
            if least > LENGTH_LEAK:
                of_all = f"the {name} answer is the better one in {part.sum():,} of {sum(counts):,}"
                interval = f"95 % interval {100 * least:.0f} to {100 * most:.0f} %"
                self.add_issue("length-leak", rows["line"][part], f"{of_all}, {interval}")
        share = counts[0] / sum(counts) if sum(counts) else None
        return {"better_longer": counts[0], "better_shorter": counts[1], "equal": len(rows) - sum(counts),
                "longer_share": share, "longer_share_ci95": [low, high]}  # fmt: skip

    def _find_label_issues(self) -> None:
        """Find classes that are too few, too rare, or written in two ways."""
        if self.source.format == "unpaired-preference" and len(self.labels) == 1:
            self._add_class_issue("one-label", self.labels.values(), next(iter(self.labels)))
        if self.source.format != "classification" or not self.labels:
            return
        name, found = next(iter(self.labels.items()))
        if len(self.labels) == 1 and found.count == self.labelled_rows:
            self._add_class_issue("one-class", [found], repr(name))
        most = max(found.count for found in self.labels.values())
        rare = {n: found for n, found in self.labels.items() if found.count < RARE_CLASS_ROWS}
        rarer = {n: f for n, f in self.labels.items() if n not in rare and f.count * IMBALANCE <= most}
        spellings: dict[str, list[str]] = {}
        for name in sort_labels(self.labels):
            spellings.setdefault(" ".join(name.casefold().split()), []).append(name)
        similar = {name: self.labels[name] for names in spellings.values() if len(names) > 1 for name in names}
        for code, classes in (("rare-class", rare), ("class-imbalance", rarer), ("similar-labels", similar)):
            if classes:
                self._add_class_issue(code, classes.values(), format_names(classes, 6))

    def _add_class_issue(self, code: str, classes: Collection[FoundIssue], example: str) -> None:
        lines = sorted(line for found in classes for line in found.lines)[:SHOWN_LINES]
        self.issues[code] = FoundIssue(sum(found.count for found in classes), lines, example)

    def _find_overlap(self, path: str, other: "DatasetReport") -> None:
        """Find rows that are validation rows, and invalid validation rows."""
        if columns := other.source.lossy_columns:
            example = f"{path}, line {columns[0].line}: {describe_losses(columns)}"
            self.issues["validation-invalid"] = FoundIssue(columns[0].rows, [columns[0].line], example)
        if unseen := {name: found for name, found in other.labels.items() if name not in self.labels}:
            self._add_class_issue("unseen-label", [*unseen.values()], f"{path}: {format_names(unseen, 6)}")
        if other.invalid_count:
            example = f"{path}, line {other.invalid[0].line}: {other.invalid[0].cause}"
            self.add_issue("validation-invalid", [r.line for r in other.invalid], example)
            self.issues["validation-invalid"].count = other.invalid_count
        lines, other_lines = self.rows["line"], other.rows["line"]
        texts, other_texts = self.rows["hashes"][:, 0], other.rows["hashes"][:, 0]
        order = np.argsort(other_texts, kind="stable")
        same = np.flatnonzero(np.isin(texts, other_texts))
        match = order[np.searchsorted(other_texts[order], texts[same])]
        self._add_pairs("overlap", lines[same], other_lines[match], f"{path}: ", "is")
        (signatures, numbers), (other_signatures, other_numbers) = self.signatures, other.signatures
        near, match = find_near_duplicates(other_signatures, signatures)
        new = ~np.isin(numbers[near], same)
        near, match = numbers[near[new]], other_numbers[match[new]]
        self._add_pairs("near-overlap", lines[near], other_lines[match], f"{path}: ", "is nearly")

    def _add_pairs(self, code: str, lines: Array, matches: Array, prefix: str = "", relation: str = "as") -> None:
        if len(lines):
            self.add_issue(code, lines, f"{prefix}line {lines[0]} {relation} line {matches[0]}")

    def _list_issues(self) -> list[dict[str, Any]]:
        """Return the issues as JSON takes them: errors first, invalid rows before those of `ISSUE_TYPES`."""
        issues = []
        for code in [*sorted(self.issues.keys() - ISSUE_TYPES), *(c for c in ISSUE_TYPES if c in self.issues)]:
            kind, found = ISSUE_TYPES.get(code, INVALID_ROW), self.issues[code]
            refused = code == "too-long" and self.on_overlong == "error"
            error = refused or (kind.error_from is not None and found.count >= kind.error_from * self.total.rows)
            example = f" ({found.example})" if kind.description and found.example else ""
            issues.append(
                {
                    "code": code,
                    "severity": "error" if error else "warning",
                    "what": f"{kind.description}{example}" or found.example,
                    "lines": found.lines,
                    "count": found.count,
                    "hint": found.hint or kind.hint,
                }
            )
        return sorted(issues, key=lambda issue: issue["severity"])

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
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


@dataclass(frozen=True)
class DataReport:
    """What was found in the rows of a file (core/data/row_observer.py)."""

    values: dict[str, Any]  # what `slimtune data --json` prints

    @property
    def file(self) -> str:
        return str(self.values["file"])

    @property
    def verdict(self) -> str:
        return str(self.values["verdict"])

    @property
    def saved_share(self) -> float:
        return float(self.values["packing"]["saved_share"])

    def format_verdict(self) -> str:
        """Return the verdict with the numbers of findings, as one line."""
        return format_verdict(self.values)

    def summarize(self) -> list[str]:
        """Return the verdict, columns, notes and findings, for the log of a run."""
        columns = [f"  columns: {format_columns(self.values)}", *(f"  {note}" for note in self.values["notes"])]
        issues = [f"  {issue['severity']}: {format_issue(issue)}" for issue in self.values["issues"]]
        return [self.format_verdict(), "\n".join(columns), *issues]

    def require_no_errors(self) -> None:
        """Raise DataError with every finding that is an error."""
        raise_if_invalid(self.values)

    def to_json(self) -> dict[str, Any]:
        """Return what `slimtune data --json` prints."""
        return self.values


def _estimate_share(hits: int, rows: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's)."""
    if not rows:
        return 0.0, 1.0
    z = 1.96
    share, weight = hits / rows, z * z / rows
    middle, half = share + weight / 2, z * math.sqrt(share * (1 - share) / rows + weight / (4 * rows))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


def _length_statistics(lengths: Array) -> dict[str, Any]:
    if not len(lengths):
        return {"min": 0, "median": 0, "p90": 0, "p99": 0, "max": 0, "histogram": []}
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // HISTOGRAM_BARS))
    counts = np.bincount((lengths - low) // width)
    bars = [{"from": low + i * width, "to": low + (i + 1) * width - 1, "rows": int(n)} for i, n in enumerate(counts)]
    median, p90, p99 = (int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99))
    return {"min": low, "median": median, "p90": p90, "p99": p99, "max": high, "histogram": bars}


def report_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a report with their names."""
    n, prefix, packing = report["lengths"], report["shared_prefix"], report["packing"]
    overlong, share = report["overlong"]["rows"], 100 * report["supervised_share"]
    supervised = f", {format_count(report['supervised_tokens'])} supervised ({share:.0f} %)" if share else ""
    rows = "documents" if report["format"] == "document" else "rows"
    quantiles = f"50 % of the {rows} up to {n['median']}, 90 % up to {n['p90']}, 99 % up to {n['p99']}"
    saved = f": {100 * packing['saved_share']:.0f} % fewer, because a prefix that rows of a step share is computed once"
    shared = prefix["tokens"]
    shown = prefix["text"][:SHOWN_PREFIX] + "…" * (len(prefix["text"]) > SHOWN_PREFIX)
    rated = report["format"] == "unpaired-preference"
    counts = [
        (rows, f"{report['rows']:,}, {report['invalid_count'] or 'none'} invalid"),
        ("columns", format_columns(report)),
        *([("labels" if rated else "classes", format_classes(report))] if report["classes"] else []),
        *(("note", note) for note in report["notes"]),
    ]
    if report["model"] is None:
        return counts
    if not n["histogram"]:
        return [*counts, ("tokens", "none: no row of the file is valid")]
    if any(report["thinking"].values()):
        counts.append(("thinking", format_thinking(report["thinking"])))
    counts += [
        ("tokens", f"{format_count(report['tokens'])}{supervised}"),
        (f"tokens per {rows.removesuffix('s')}", f"{n['min']} to {n['max']}; {quantiles}"),
    ]
    if (pairs := report["pairs"]) is not None and pairs["longer_share"] is not None:
        low, high = (100 * end for end in pairs["longer_share_ci95"])
        longer = f"the longer one in {100 * pairs['longer_share']:.0f} % of the pairs ({low:.0f} to {high:.0f} %)"
        counts.append(("better answer", longer))
    if report["windows"] is not None:
        cut = f"{report['windows']:,} in an epoch, of at most {report['max_seq_len']} tokens, cut elsewhere in each"
        return [*counts, ("windows", cut)]
    return [
        *counts,
        (f"longer than {report['max_seq_len']}", f"{overlong:,} rows" if overlong else "none"),
        ("shared prefix", f"{shared} token{'s' * (shared != 1)}: {shown!r}" if shared else "none"),
        (
            "packed",
            f"an epoch computes {format_count(packing['packed_tokens'])} tokens{saved * bool(packing['saved_share'])}",
        ),
    ]


def format_classes(report: Mapping[str, Any]) -> str:
    """Return the classes of a file, the most frequent ones first, with their rows."""
    classes = sorted(report["classes"].items(), key=lambda item: -item[1])
    show = str.lower if report["format"] == "unpaired-preference" else repr  # True and False of KTO
    shares = [(name, f"{rows:,} ({100 * rows / max(1, report['rows']):.0f} %)") for name, rows in classes]
    shown = [f"{show(name)} {share}" for name, share in shares[:SHOWN_LINES]]
    return ", ".join(shown) + (f", … ({len(classes) - SHOWN_LINES} more)" if len(classes) > SHOWN_LINES else "")


def format_columns(report: Mapping[str, Any]) -> str:
    """Return which columns of a file are used, which are not, and in how many rows these have a value."""

    def join(names: Sequence[str]) -> str:
        more = f", … ({len(names) - SHOWN_LINES} more)" if len(names) > SHOWN_LINES else ""
        return ", ".join(names[:SHOWN_LINES]) + more

    # Those that change the meaning of rows come first.
    unused = sorted(report["unused_columns"], key=lambda column: not column["changes_meaning"])
    counts = join([f"{c['name'] or repr('')} ({c['rows']:,} row{'s' * (c['rows'] != 1)})" for c in unused])
    parts = [join(report["columns"]) or "none", counts and f"not used: {counts}"]
    ignored = join(report["ignored_columns"])
    return "; ".join(filter(None, [*parts, ignored and f"left out by --ignore-columns: {ignored}"]))


def format_thinking(thinking: Mapping[str, int]) -> str:
    """Return what the chat template does with turns that think before they answer, and what is learned of them."""
    texts = {
        "learned": "learned with what they think",
        "kept": "not learned, whose thinking the template keeps",
        "left_out": "not learned, whose thinking the template leaves out, as it does in generation",
    }
    return "; ".join(f"{thinking[k]:,} turn{'s' * (thinking[k] != 1)} {t}" for k, t in texts.items() if thinking[k])


def format_verdict(report: Mapping[str, Any]) -> str:
    """Return the verdict as one line."""
    if report["verdict"] == "not checked":
        return "not checked: rows and columns are counted; what a base reads of them, --model BASE shows"
    severities = [issue["severity"] for issue in report["issues"]]
    counts = [(severities.count(name), name) for name in ("error", "warning")]
    parts = [f"{n} kind{'s' * (n > 1)} of {name}s" for n, name in counts if n]
    return f"{report['verdict']}: {' and '.join(parts)}" if parts else report["verdict"]


def format_issue(issue: Mapping[str, Any]) -> str:
    """Return an issue as one line."""
    rows = f"{issue['count']:,} rows, " if issue["count"] > 1 else ""
    return f"{issue['what']}: {rows}{format_lines(issue['lines'], issue['count'])}"


def raise_if_invalid(report: Mapping[str, Any]) -> None:
    """Raise DataError with every error of a report, if there is one."""
    errors = [issue for issue in report["issues"] if issue["severity"] == "error"]
    if errors:
        problem = "\n".join(f"{report['file']}: {format_issue(issue)}" for issue in errors)
        hints = "; ".join(dict.fromkeys(issue["hint"] for issue in errors))
        raise DataError(problem, "rows that do not spoil the run", f"{hints}; or --force to train all the same")
