"""Makes the report on a data set: collects the facts of its rows, checks them, and writes down what they are."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...core.data.chat_template import adds_bos
from ...core.data.parallel import parallel_map
from ...core.data.rows import InvalidRow, Row, split_preference_into_rows
from ...core.data.tokenize import BatchTokenizer, TokenizedBatch, batch_rows
from ...core.foundation.cpu import count_usable_cpus
from ...errors import suggest
from ...extras.row_files import RowFileReader, open_rows
from ...extras.row_formats.classification import sort_class_names
from ...extras.row_formats.documents import count_windows_and_first_window_token_range
from .batch_stats import SAMPLES, TokenizedRowBatchMeasurer
from .data_report import (
    DataIssue,
    DataReport,
    HistogramBar,
    InvalidRowNote,
    LengthStatistics,
    OverlongRows,
    SampleRow,
    SharedPrefix,
    SharedPrefixSavings,
    ThinkingTurnCounts,
    UnusedColumnCount,
)
from .near_duplicates import Array
from .row_checks import count_pairs_by_longer_answer, find_data_issues
from .row_facts import AffectedRows, RowFacts, RowFactsCollector
from .row_samples import SAMPLE_CHARACTERS, decode_with_special_tokens, make_row_samples, make_token_sample
from .swapped_texts import hash_prompt_and_answer_features

HISTOGRAM_BARS = 16


def make_data_report(
    path: str | Path,
    tokenizer: Any,
    *,
    model: str | None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
    split_special_tokens: bool = True,
    apply_chat_template: bool = True,
    max_seq_len: int = 1024,
    on_overlong: str = "drop",
    train_on: str = "assistant",
    rows_per_step: int = 8,
    validation: str | Path | None = None,
    processes: int | None = None,
    shown_row_count: int | None = None,
) -> DataReport:
    """Return the report on a data set.

    Args:
        path, format, columns, ignore_columns, split_special_tokens, apply_chat_template: see `open_rows`.
        tokenizer, model: of the base that will read the rows; None: only rows and columns are counted.
        max_seq_len, on_overlong, train_on: see `tokenize_dataset`.
        rows_per_step: rows of an optimizer step, from 1; they are packed together.
        validation: validation rows, which must not be among these.
        processes: how many tokenize at once; None: as many as there are cores.
        shown_row_count: how many of the first rows are shown; None: three, or none without a tokenizer.
    """

    def read(rows: RowFileReader, like: DataReportBuilder | None = None) -> DataReportBuilder:
        shown = (SAMPLES if tokenizer is not None else 0) if shown_row_count is None else shown_row_count
        builder = DataReportBuilder(tokenizer, rows, max_seq_len, on_overlong, rows_per_step, like, shown)
        if tokenizer is None:
            builder.count_rows()
            return builder
        documents = rows.window_cutter is not None
        function = BatchTokenizer(tokenizer, max_seq_len, on_overlong, train_on, builder.measure_batch, documents)
        for batch in parallel_map(function, batch_rows(rows), processes or count_usable_cpus()):
            builder.on_batch(batch)
        return builder

    options: dict[str, Any] = {"format": format, "columns": columns, "ignore_columns": ignore_columns}
    options |= {"split_special_tokens": split_special_tokens, "apply_chat_template": apply_chat_template}
    files = [open_rows(p, **options) for p in (path, validation) if p is not None]
    builder = read(files[0])
    other = None if validation is None else (str(validation), read(files[1], builder))
    return builder.finish(file=path, model=model, validation=other)


class DataReportBuilder:
    """Watches the rows of a file while they are tokenized (core/data/row_observer.py), and makes the report of them.

    Arguments are those of `make_data_report`; `compared_with` is the builder of rows that these will be compared with.
    `measure_batch` computes the statistics of a batch, possibly in another process.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: RowFileReader,
        max_seq_len: int,
        on_overlong: str = "drop",
        rows_per_step: int = 8,
        compared_with: "DataReportBuilder | None" = None,
        shown_row_count: int = SAMPLES,
    ) -> None:
        self._sample_rows, self._read_samples = shown_row_count, list[SampleRow]()
        self._start = time.perf_counter()
        self.tokenizer, self.source = tokenizer, source
        documents = source.format == "document"
        self.measure_batch = (
            None if tokenizer is None else TokenizedRowBatchMeasurer(tokenizer, max_seq_len, documents, shown_row_count)
        )
        if self.measure_batch is not None and compared_with is not None and compared_with.measure_batch is not None:
            self.measure_batch.common_trigrams = compared_with.measure_batch.common_trigrams
        special_tokens = 1 + (tokenizer is not None and adds_bos(tokenizer)) if documents else None
        self.facts = RowFactsCollector(source, max_seq_len, on_overlong, rows_per_step, special_tokens, shown_row_count)

    def on_batch(self, batch: TokenizedBatch) -> None:
        """Add the next batch."""
        self.facts.add_batch(batch)

    def count_rows(self) -> None:
        """Read the rows without a tokenizer: invalid ones and labels are counted, and the first rows are samples."""
        for row in self.source:
            self.facts.stats.rows += 1
            if isinstance(row, Row) and row.label_names is not None and not row.is_prompt:
                self.facts.add_labels([row.line], [row.label_names])
            for code, example in row.findings if isinstance(row, Row) else ():
                self.facts.add_group(code, [row.line], example)
            if (
                isinstance(row, Row)
                and (sides := hash_prompt_and_answer_features(split_preference_into_rows(row)[0])) is not None
            ):
                self.facts.sides.append(sides)
            if isinstance(row, Row) and self._sample_rows > 0:
                self._sample_rows -= 1
                self._read_samples += make_row_samples(row)
            self.facts.add_invalid([row] if isinstance(row, InvalidRow) else [])

    def kept_hashes(self) -> Array:
        """Return the hash of the text of each row that training keeps, uint64 [N]."""
        rows, facts = self.facts.rows, self.facts
        is_any_length_kept = facts.special_tokens_per_document is not None or facts.on_overlong == "truncate"
        return rows["hashes"][(rows["length"] <= facts.stats.max_seq_len) | is_any_length_kept, 0]

    def finish(
        self, *, file: str | Path, model: str | None, validation: "tuple[str, DataReportBuilder] | None" = None
    ) -> DataReport:
        """Return the report; `validation` is the file of the validation rows and their builder."""
        facts = self.facts.collect(None if validation is None else (validation[0], validation[1].facts.collect()))
        source, stats, prefix = self.source, facts.stats, self.facts.prefix or []
        issues, (windows, packed_tokens) = find_data_issues(facts), self._count_windows(facts)
        overlong = facts.groups.get("too-long", AffectedRows())
        return DataReport(
            file=str(file),
            format=source.format,
            model=model,
            rows=stats.rows,
            columns=source.columns,
            unused_columns=[
                UnusedColumnCount(c.name, c.row_count, bool(c.effect_of_missing)) for c in source.unused_columns
            ],
            ignored_columns=[c for c in source.ignored_columns if c not in source.missing_ignored_columns],
            notes=describe_row_treatment(facts, None if self.tokenizer is None else self.tokenizer.eos_token),
            invalid_rows=[InvalidRowNote(row.line, row.cause, row.code) for row in facts.invalid],
            invalid_count=facts.invalid_count,
            classes={name: facts.labels[name].count for name in sort_class_names(facts.labels)},
            pairs=count_pairs_by_longer_answer(facts),
            tokens=stats.tokens,
            supervised_tokens=stats.supervised_tokens,
            supervised_share=stats.supervised_tokens / stats.tokens if stats.tokens else 0.0,
            lengths=_measure_lengths(facts.stats_by_row["length"]),
            max_seq_len=stats.max_seq_len,
            overlong=OverlongRows(overlong.count, overlong.lines),
            windows=windows,
            thinking=ThinkingTurnCounts(*self.facts.thinking),
            shared_prefix=SharedPrefix(
                len(prefix), decode_with_special_tokens(self.tokenizer, prefix)[:SAMPLE_CHARACTERS]
            ),
            packing=SharedPrefixSavings(
                packed_tokens, max(0.0, 1 - packed_tokens / stats.tokens) if stats.tokens else 0.0
            ),
            issues=issues,
            samples=[
                *self._read_samples,
                *(make_token_sample(self.tokenizer, *text) for r in self.facts.samples for text in r),
            ],
            verdict=self._give_verdict(issues),
            seconds=round(time.perf_counter() - self._start, 3),
        )

    def _give_verdict(self, issues: list[DataIssue]) -> Literal["ok", "warnings", "errors", "not checked"]:
        if any(issue.severity == "error" for issue in issues):
            return "errors"
        return "not checked" if self.tokenizer is None else "warnings" if issues else "ok"

    def _count_windows(self, facts: RowFacts) -> tuple[int | None, int]:
        """Return the windows of documents in an epoch, None for other rows, and the tokens that an epoch computes."""
        special = self.facts.special_tokens_per_document
        if special is None or self.tokenizer is None:
            return None, self.facts.packed_tokens
        lengths = facts.stats_by_row["length"]
        windows = int(
            count_windows_and_first_window_token_range(lengths, facts.stats.max_seq_len, special - 1, vary=True)[
                0
            ].sum()
        )
        # A window inside a document begins with tokens that it does not learn.
        return windows, facts.stats.tokens + (windows - len(lengths)) * special


def describe_row_treatment(facts: RowFacts, eos_token: str | None) -> list[str]:
    """Return what training does with every row of a file, in sentences; `eos_token` is None without a tokenizer."""
    source = facts.source
    known = [column.name for column in source.unused_columns]
    notes = [
        f"--ignore-columns {name}: no row has that column{suggest(name, known)}"
        for name in source.missing_ignored_columns
    ]
    if source.has_paragraphs:
        blank = "blank lines separate them" if facts.stats.rows > 1 else "it has no blank line, so it is one row"
        notes.append(f"each paragraph of a .txt file is a row of its own: {blank}")
    if source.texts_as_chats:
        notes.append(
            "prompts and answers are texts, read as a chat: the user's turn and the assistant's; "
            "--no-apply-chat-template (data.apply_chat_template: false) reads them as plain text"
        )
    good, bad = (facts.labels.get(str(label), AffectedRows()).count for label in (True, False))
    if source.format == "unpaired-preference" and good and bad and not 2 / 3 <= good / bad <= 2:
        # Equation 8 of the paper on KTO: 1 to 4/3 times as much weight on good answers as on bad ones
        name, low = ("desirable", bad / good) if good < bad else ("undesirable", 0.75 * good / bad)
        advice = f"task.{name}_weight of {low:.2f} to {4 / 3 * low:.2f} balances them"
        notes.append(f"{good:,} good and {bad:,} bad answers: a {advice}")
    if source.rows_are_text_files:
        notes.append("each file is one document; its line is its number in the order of the names")
    if source.format in ("text", "document"):
        end = "the end-of-text token" if eos_token is None else repr(eos_token)
        row = "document" if source.format == "document" else "row"
        notes.append(f"a {row} is learned whole, and {end} after it: the model learns to stop where a {row} ends")
    return notes


def _measure_lengths(lengths: Array) -> LengthStatistics:
    """Return the statistics of the rows' tokens, int64 [N]."""
    if not len(lengths):
        return LengthStatistics(0, 0, 0, 0, 0, [])
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // HISTOGRAM_BARS))
    counts = np.bincount((lengths - low) // width)
    bars = [HistogramBar(low + i * width, low + (i + 1) * width - 1, int(n)) for i, n in enumerate(counts)]
    median, p90, p99 = (int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99))
    return LengthStatistics(low, median, p90, p99, high, bars)
