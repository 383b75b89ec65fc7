"""The facts of a file's rows: what they are, how long, and which have what. Nothing here judges them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...core.data.chat_template import TokenizedRow
from ...core.data.packing import pack_into_one_sequence
from ...core.data.rows import InvalidRow
from ...core.data.tokenize import TokenizationStats, TokenizedBatch
from ...core.foundation.sequences import find_shared_prefix
from ...extras.row_files import RowFileReader
from .batch_stats import ROW_STATS, SAMPLES, RowBatchStats
from .near_duplicates import HASHES, Array
from .swapped_texts import Sides

SHOWN_INVALID_ROWS = 100
SHOWN_LINES = 20
"""Lines that an issue names."""
PAIR_FORMATS = ("preference", "ranked-preference")


@dataclass
class AffectedRows:
    """Rows of a file that have something in common: how many, the first `SHOWN_LINES` of their lines, and one example.

    The hint stands in place of that of their kind.
    """

    count: int = 0
    lines: list[int] = field(default_factory=list)
    example: str = ""
    hint: str = ""

    def add(self, lines: Sequence[int] | Array, example: str = "") -> None:
        """Add the next rows."""
        self.count += len(lines)
        self.lines += map(int, lines[: SHOWN_LINES - len(self.lines)])
        self.example = self.example or example


@dataclass(frozen=True)
class RowFacts:
    """What is known of the rows of a file."""

    source: RowFileReader  # its format and columns
    on_overlong: str  # what training does with longer rows than `stats.max_seq_len`
    stats: TokenizationStats
    stats_by_row: Array  # `ROW_STATS` [N], of the rows that have tokens
    signatures: Array  # uint8 [J, 128], of the comparable rows
    groups: Mapping[str, AffectedRows]  # by what batches found in them: a code of `FINDING_TYPES` or of an `InvalidRow`
    invalid: Sequence[InvalidRow]  # the first ones
    invalid_count: int
    sides: Sequence[Sides]  # of the first rows with one question and one answer
    labels: Mapping[str, AffectedRows]  # the rows of each class
    labelled_rows: int
    validation: "tuple[str, RowFacts] | None" = None  # the file of the validation rows, and their facts

    @property
    def comparable_rows(self) -> Array:
        """The numbers of the rows with a signature, int64 [J]."""
        return np.flatnonzero(self.stats_by_row["comparable"])


class RowFactsCollector:
    """Collects the facts of a file's rows, batch by batch.

    Args:
        source: the rows.
        max_seq_len, on_overlong: as for `tokenize_dataset`.
        rows_per_step: rows of an optimizer step, which are packed together.
        special_tokens_per_document: tokens beside its text; None: the rows are no documents.
        shown_row_count: how many of the first rows are kept as samples.
    """

    def __init__(
        self,
        source: RowFileReader,
        max_seq_len: int,
        on_overlong: str,
        rows_per_step: int,
        special_tokens_per_document: int | None,
        shown_row_count: int = SAMPLES,
    ) -> None:
        self.shown_row_count = shown_row_count
        self.source, self.on_overlong, self.rows_per_step = source, on_overlong, rows_per_step
        self.special_tokens_per_document = special_tokens_per_document
        self.stats = TokenizationStats(max_seq_len)
        self.groups: dict[str, AffectedRows] = {}
        self.invalid_count = self.packed_tokens = 0
        self.invalid: list[InvalidRow] = []
        self.sides: list[Sides] = []
        self.labels: dict[str, AffectedRows] = {}
        self.labelled_rows = 0
        self.prefix: list[int] | None = None
        self.thinking = [0, 0, 0]
        self.samples: list[list[tuple[int, str, TokenizedRow]]] = []
        self._rows, self._signatures = bytearray(), bytearray()

    def add_batch(self, batch: TokenizedBatch) -> None:
        """Add the next batch."""
        found: RowBatchStats = batch.stats
        self.stats.add(batch.counts)
        self.add_invalid(batch.invalid)
        if batch.labels is not None and self.source.format != "prompt":
            self.add_labels(batch.lines.tolist(), batch.labels)
        for code, line, example in found.issues:
            self.add_group(code, [line], example)
        self.add_group("no-supervised-token", batch.unsupervised)
        self.add_group("too-long", batch.overlong)
        if self.special_tokens_per_document is not None:
            short = batch.lines[batch.lengths < self.special_tokens_per_document + 2]
            self.add_group("short-document", short, self.source.find_file(int(short[0])) if len(short) else "")
        else:
            self.packed_tokens += _count_packed_tokens(batch, self.rows_per_step)
        if found.prefix is not None:
            self.prefix = found.prefix if self.prefix is None else find_shared_prefix([self.prefix, found.prefix])
        self.sides += found.sides
        self.thinking = [a + b for a, b in zip(self.thinking, found.thinking, strict=True)]
        self.samples += found.samples[: self.shown_row_count - len(self.samples)]
        self._rows += found.row_stats.tobytes()
        self._signatures += found.minhash_signatures.tobytes()

    def add_invalid(self, rows: Sequence[InvalidRow]) -> None:
        """Count invalid rows."""
        self.invalid_count += len(rows)
        self.invalid += rows[: SHOWN_INVALID_ROWS - len(self.invalid)]
        for row in rows:
            self.add_group(row.code, [row.line], row.cause)
            self.groups[row.code].hint = row.hint

    def add_labels(self, lines: Sequence[int], labels: Sequence[Sequence[str]]) -> None:
        """Count the rows of each class."""
        self.labelled_rows += len(lines)
        for line, names in zip(lines, labels, strict=True):
            for name in names:
                self.labels.setdefault(name, AffectedRows()).add([line])

    def add_group(self, code: str, lines: Sequence[int] | Array, example: str = "") -> None:
        """Count rows that have something."""
        if len(lines):
            self.groups.setdefault(code, AffectedRows()).add(lines, example)

    @property
    def rows(self) -> Array:
        """The statistics of all rows that have tokens, `ROW_STATS` [N]."""
        return np.frombuffer(self._rows, ROW_STATS)

    def collect(self, validation: "tuple[str, RowFacts] | None" = None) -> RowFacts:
        """Return the facts of the rows so far; `validation`: the file of the validation rows, and their facts."""
        return RowFacts(
            source=self.source,
            on_overlong=self.on_overlong,
            stats=self.stats,
            stats_by_row=self.rows,
            signatures=np.frombuffer(self._signatures, np.uint8).reshape(-1, 2 * HASHES),
            groups=self.groups,
            invalid=self.invalid,
            invalid_count=self.invalid_count,
            sides=self.sides,
            labels=self.labels,
            labelled_rows=self.labelled_rows,
            validation=validation,
        )


def _count_packed_tokens(batch: TokenizedBatch, rows_per_step: int) -> int:
    """Return the tokens of a batch whose rows are packed, those of each step together."""
    examples = [n or [length] for n, length in zip(batch.row_lengths, batch.lengths.tolist(), strict=True)]
    left = iter(np.split(batch.ids, np.cumsum([n for lengths in examples for n in lengths])[:-1]))
    total = 0
    for at in range(0, len(examples), rows_per_step):
        count = sum(map(len, examples[at : at + rows_per_step]))
        total += len(pack_into_one_sequence([next(left).tolist() for _ in range(count)]).tokens)
    return total
