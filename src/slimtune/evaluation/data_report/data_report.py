"""The report on the rows of a file: what `slimtune data --json` prints, and its text for people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...core.data.tokenize import format_line_numbers
from ...core.foundation.formatting import format_count
from ...core.foundation.json_results import make_json_key_metadata
from ...errors import DataError

SHOWN_PREFIX = 200
"""Characters of the shared prefix that people see."""
SHOWN_NAMES = 20
"""Columns and classes that people see."""


@dataclass(frozen=True)
class UnusedColumnCount:
    """A column that no row's format uses."""

    name: str
    """Its name in the file."""
    rows: int
    """Rows that have a value in it."""
    changes_meaning: bool
    """Whether rows mean something else without it."""


@dataclass(frozen=True)
class InvalidRowNote:
    """A row that cannot be used."""

    line: int
    """Its line, or the number of the item, from 1."""
    cause: str
    """What is wrong with it."""
    code: str
    """The kind of error."""


@dataclass(frozen=True)
class PairLengthCounts:
    """How often the better answer of a preference pair is the longer one, in supervised tokens."""

    better_longer: int
    """Pairs whose better answer is the longer one."""
    better_shorter: int
    """Pairs whose better answer is the shorter one."""
    equal: int
    """Pairs whose answers have the same length."""
    longer_share: float | None
    """Share of the longer ones among answers of unequal length; null: there are none."""
    longer_share_ci95: list[float]
    """Its 95 % interval."""


@dataclass(frozen=True)
class HistogramBar:
    """A bar of a histogram."""

    low: int = field(metadata=make_json_key_metadata("from"))
    """Fewest tokens of its rows."""
    high: int = field(metadata=make_json_key_metadata("to"))
    """Most tokens of its rows."""
    rows: int
    """Rows of such a length."""


@dataclass(frozen=True)
class LengthStatistics:
    """The lengths of the rows before any is truncated, in tokens; 0 if no row has tokens."""

    min: int
    """Of the shortest row."""
    median: int
    """Half of the rows have at most so many."""
    p90: int
    """90 % of the rows have at most so many."""
    p99: int
    """99 % of the rows have at most so many."""
    max: int
    """Of the longest row."""
    histogram: list[HistogramBar]
    """Rows by their length."""


@dataclass(frozen=True)
class OverlongRows:
    """The rows that are longer than `max_seq_len`."""

    rows: int
    """How many."""
    lines: list[int]
    """The lines of the first ones."""


@dataclass(frozen=True)
class ThinkingTurnCounts:
    """The turns that think before they answer."""

    learned: int
    """Turns that are learned with what they think."""
    kept: int
    """Turns that are not learned, and whose thinking the chat template keeps."""
    left_out: int
    """Turns that are not learned, and whose thinking the chat template leaves out."""


@dataclass(frozen=True)
class SharedPrefix:
    """What all rows begin with."""

    tokens: int
    """Its tokens."""
    text: str
    """Its beginning."""


@dataclass(frozen=True)
class SharedPrefixSavings:
    """What an epoch computes when the rows of a step are packed."""

    packed_tokens: int
    """Tokens of an epoch, a prefix that rows of a step share once."""
    saved_share: float
    """Share of the tokens that is saved by shared prefixes."""


@dataclass(frozen=True)
class DataIssue:
    """Rows with something that may spoil a run."""

    code: str
    """Its kind."""
    severity: Literal["error", "warning"]
    """Training refuses rows with an error."""
    what: str
    """Which rows have it, with an example."""
    lines: list[int]
    """The lines of the first ones."""
    count: int
    """Rows that have it."""
    hint: str
    """What to do."""

    def __str__(self) -> str:
        rows = f"{self.count:,} rows, " if self.count > 1 else ""
        return f"{self.what}: {rows}{format_line_numbers(self.lines, self.count)}"


@dataclass(frozen=True)
class SamplePiece:
    """A part of a row's text."""

    text: str
    """What the model reads."""
    supervised: bool
    """Whether the model learns it."""


@dataclass(frozen=True)
class SampleRow:
    """A text of a row as the model reads it; of a long one the beginning, and less of what is not learned."""

    line: int
    """Its line."""
    pieces: list[SamplePiece]
    """Its text in parts."""
    name: str = ""
    """Which text of the row it is ("chosen answer", "best of 3 answers"), or its label; empty: its only text."""


@dataclass(frozen=True)
class DataReport:
    """What `data --json` prints: figures of the rows of a file, and what may spoil a run."""

    file: str
    """The file, folder or dataset."""
    format: str
    """The format of its rows; "unknown" if no record can be read."""
    model: str | None
    """The base that reads the rows; null: only rows and columns are counted."""
    rows: int
    """Rows of the file, invalid ones included."""
    columns: list[str]
    """Columns that are used."""
    unused_columns: list[UnusedColumnCount]
    """Columns that are not used and have a value in some row."""
    ignored_columns: list[str]
    """Columns that are left out by name."""
    notes: list[str]
    """What training does with every row of this file, in sentences."""
    invalid_rows: list[InvalidRowNote]
    """The first rows that cannot be used."""
    invalid_count: int
    """Rows that cannot be used."""
    classes: dict[str, int]
    """Rows of each class, or with each label."""
    pairs: PairLengthCounts | None
    """Lengths of the answers of preference pairs; null: the rows are none, or have no tokens."""
    tokens: int
    """Tokens of the rows that are kept."""
    supervised_tokens: int
    """Tokens that the model learns to predict."""
    supervised_share: float
    """Their share of all tokens."""
    lengths: LengthStatistics
    """Tokens of a row."""
    max_seq_len: int
    """Most tokens of a row in training."""
    overlong: OverlongRows
    """Rows that are longer."""
    windows: int | None
    """Windows into which documents are cut in an epoch; null: the rows are no documents."""
    thinking: ThinkingTurnCounts
    """Turns that think before they answer."""
    shared_prefix: SharedPrefix
    """What all rows begin with."""
    packing: SharedPrefixSavings
    """What an epoch computes."""
    issues: list[DataIssue]
    """What may spoil a run, errors first."""
    samples: list[SampleRow]
    """The first rows as the model reads them: both answers of a pair, all answers of a list, one after another."""
    verdict: Literal["ok", "warnings", "errors", "not checked"]
    """"errors": training refuses the rows; "not checked": no base has read them."""
    seconds: float
    """Time that the report took."""

    @property
    def saved_share(self) -> float:
        return self.packing.saved_share

    def require_no_errors(self) -> None:
        """Raise DataError with every issue that is an error."""
        if errors := [issue for issue in self.issues if issue.severity == "error"]:
            problem = "\n".join(f"{self.file}: {issue}" for issue in errors)
            hints = "; ".join(dict.fromkeys(issue.hint for issue in errors))
            raise DataError(problem, "rows that do not spoil the run", f"{hints}; or --force to train all the same")

    def summarize(self) -> list[str]:
        """Return the verdict, columns, notes and issues, for the log of a run."""
        columns = "\n".join([f"  columns: {self.format_columns()}", *(f"  {note}" for note in self.notes)])
        return [self.format_verdict(), columns, *(f"  {issue.severity}: {issue}" for issue in self.issues)]

    def format_verdict(self) -> str:
        """Return the verdict as one line."""
        if self.verdict == "not checked":
            return "not checked: rows and columns are counted; what a base reads of them, --model BASE shows"
        severities = [issue.severity for issue in self.issues]
        counts = [(sum(s == name for s in severities), name) for name in ("error", "warning")]
        parts = [f"{n} kind{'s' * (n > 1)} of {name}s" for n, name in counts if n]
        return f"{self.verdict}: {' and '.join(parts)}" if parts else self.verdict

    def format_columns(self) -> str:
        """Return which columns of a file are used, which are not, and in how many rows these have a value."""
        # Those that change the meaning of rows come first.
        unused = sorted(self.unused_columns, key=lambda column: not column.changes_meaning)
        counts = _join_names([f"{c.name or repr('')} ({c.rows:,} row{'s' * (c.rows != 1)})" for c in unused])
        parts = [_join_names(self.columns) or "none", counts and f"not used: {counts}"]
        ignored = _join_names(self.ignored_columns)
        return "; ".join(filter(None, [*parts, ignored and f"left out by --ignore-columns: {ignored}"]))

    def lines(self) -> list[tuple[str, str]]:
        """Return the figures with their names, as people read them."""
        rows = "documents" if self.format == "document" else "rows"
        rated = self.format == "unpaired-preference"
        counts = [
            (rows, f"{self.rows:,}, {self.invalid_count or 'none'} invalid"),
            ("columns", self.format_columns()),
            *([("labels" if rated else "classes", _format_classes(self))] if self.classes else []),
            *(("note", note) for note in self.notes),
        ]
        if self.model is None:
            return counts
        if not self.lengths.histogram:
            return [*counts, ("tokens", "none: no row of the file is valid")]
        return [*counts, *_list_token_lines(self, rows)]


def _list_token_lines(report: DataReport, rows: str) -> list[tuple[str, str]]:
    """Return the figures of tokens with their names; `rows` is what the rows are called."""
    n, prefix, packing, share = report.lengths, report.shared_prefix, report.packing, 100 * report.supervised_share
    supervised = f", {format_count(report.supervised_tokens)} supervised ({share:.0f} %)" if share else ""
    quantiles = f"50 % of the {rows} up to {n.median}, 90 % up to {n.p90}, 99 % up to {n.p99}"
    lines = [("thinking", thinking)] if (thinking := _format_thinking(report.thinking)) else []
    lines += [
        ("tokens", f"{format_count(report.tokens)}{supervised}"),
        (f"tokens per {rows.removesuffix('s')}", f"{n.min} to {n.max}; {quantiles}"),
    ]
    if (pairs := report.pairs) is not None and pairs.longer_share is not None:
        low, high = (100 * end for end in pairs.longer_share_ci95)
        longer = f"the longer one in {100 * pairs.longer_share:.0f} % of the pairs ({low:.0f} to {high:.0f} %)"
        lines.append(("better answer", longer))
    if report.windows is not None:
        cut = f"{report.windows:,} in an epoch, of at most {report.max_seq_len} tokens, cut elsewhere in each"
        return [*lines, ("windows", cut)]
    shown = prefix.text[:SHOWN_PREFIX] + "…" * (len(prefix.text) > SHOWN_PREFIX)
    shared = f"{prefix.tokens} token{'s' * (prefix.tokens != 1)}: {shown!r}" if prefix.tokens else "none"
    saved = f": {100 * packing.saved_share:.0f} % fewer, because a prefix that rows of a step share is computed once"
    packed = f"an epoch computes {format_count(packing.packed_tokens)} tokens{saved * bool(packing.saved_share)}"
    longer = f"{report.overlong.rows:,} rows" if report.overlong.rows else "none"
    return [*lines, (f"longer than {report.max_seq_len}", longer), ("shared prefix", shared), ("packed", packed)]


def _join_names(names: Sequence[str]) -> str:
    more = f", … ({len(names) - SHOWN_NAMES} more)" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _format_classes(report: DataReport) -> str:
    """Return the classes of a file, the most frequent ones first, with their rows."""
    classes = sorted(report.classes.items(), key=lambda item: -item[1])
    show = str.lower if report.format == "unpaired-preference" else repr  # True and False of KTO
    shares = [(name, f"{rows:,} ({100 * rows / max(1, report.rows):.0f} %)") for name, rows in classes]
    return _join_names([f"{show(name)} {share}" for name, share in shares])


def _format_thinking(thinking: ThinkingTurnCounts) -> str:
    """Return what the chat template does with turns that think before they answer, and what is learned of them."""
    counts = [
        (thinking.learned, "learned with what they think"),
        (thinking.kept, "not learned, whose thinking the template keeps"),
        (thinking.left_out, "not learned, whose thinking the template leaves out, as it does in generation"),
    ]
    return "; ".join(f"{n:,} turn{'s' * (n != 1)} {text}" for n, text in counts if n)
