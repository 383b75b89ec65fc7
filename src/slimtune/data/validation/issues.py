"""What a survey can find, and when it would spoil a run: one table.

A kind of finding is a fault from the share of rows up that stands beside it (0: a single row is enough), a warning
below that; None: always a warning. A kind that is not in the table is a row's refusal, and a fault.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 20
"""Lines that a finding names."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Args:
        what: the rows it is said of, as a noun.
        hint: what to do.
        fault_from: share of the file's rows from which it spoils a run; None: never.
    """

    what: str
    hint: str
    fault_from: float | None = None


KINDS = {
    "no-learned-token": Kind("rows without a token to learn", "remove these rows", 0),
    "doubled-bos": Kind(
        "rows that begin with the beginning-of-sequence token twice", "take it out of the text or of the template", 0
    ),
    "missing-end": Kind(
        "rows whose last turn is not closed by an end-of-turn token: the model does not learn to stop",
        "give a chat template that closes turns by a special token (data.chat_template)",
        0.5,
    ),
    "control-token-in-text": Kind(
        "rows with a control token of this base typed in a message, which the model reads as the token itself",
        "take the token out of the text, or break it up",
        0.001,
    ),
    "already-rendered": Kind(
        "rows with a message that a template has rendered before: it would be rendered twice",
        "give the messages as they were before that template",
        0.02,
    ),
    "too-long": Kind("rows longer than max_seq_len", "a larger --max-seq-len, or shorter rows", 0.9),
    "duplicate": Kind("rows that repeat an earlier row", "remove them, unless they are meant to count more"),
    "near-duplicate": Kind("rows that nearly repeat an earlier row", "remove them, unless they are meant to be there"),
    "contradiction": Kind(
        "rows that give a prompt another short answer than an earlier row does", "keep the right answer"
    ),
    "same-answer": Kind("rows that answer different prompts alike", "keep a few of them", 0.95),
    "hollow-answer": Kind("rows whose answer says nothing", "remove them, or write an answer", 0.5),
    "same-pair": Kind("pairs whose better and worse answer are the same", "remove them", 0),
    "overlap": Kind("rows that are validation rows too: the validation loss would look too good",
                    "remove them from one of the two", 0.01),
    "near-overlap": Kind("rows that are nearly validation rows", "remove them from one of the two"),
    "validation-refused": Kind("validation rows that are refused", "ask slimtune data about the validation file", 0),
    "mojibake": Kind("rows with text that was decoded wrongly (“Ã©” for “é”)",
                     "decode the source as UTF-8, or repair it with ftfy", 0.1),
    "replacement-character": Kind("rows with U+FFFD, which stands for characters that were lost",
                                  "decode the source in its own encoding", 0.1),
    "null-byte": Kind("rows with a null character", "read the source in its own encoding (UTF-16?)", 0.1),
    "control-character": Kind("rows with control characters", "remove them"),
    "byte-order-mark": Kind("rows with a byte order mark within their text", "remove it"),
    "html-entity": Kind("rows of plain text with HTML entities", "unescape them (html.unescape)"),
    "mixed-script": Kind("rows with words that mix Latin and Cyrillic letters which look alike",
                         "write each word in one script"),
}  # fmt: skip


@dataclass
class Issue:
    """One kind of finding in one file: its first lines, how many there are, an example."""

    code: str
    severity: str
    what: str
    lines: list[int]
    count: int
    hint: str

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON takes it."""
        return asdict(self)


@dataclass
class IssueCounter:
    """Lines of each kind, of which only the first are kept, and what the first example was."""

    lines: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, code: str, lines: Iterable[int], count: int | None = None, detail: str = "") -> None:
        """Count lines under a code; `count` where there are more of them than are given."""
        lines = list(lines)
        kept = self.lines.setdefault(code, [])
        kept += lines[: SHOWN - len(kept)]
        self.counts[code] = self.counts.get(code, 0) + (len(lines) if count is None else count)
        if detail:
            self.details.setdefault(code, detail)

    def findings(self, rows: int, always: Iterable[str] = (), fixes: dict[str, str] | None = None) -> list[Issue]:
        """Return what was found, faults first.

        Args:
            rows: rows of the file, those refused included.
            always: codes that are faults whatever their share.
            fixes: what to do, for codes where it is not what the table says.
        """
        found = []
        for code, count in self.counts.items():
            if not count:
                continue
            kind = KINDS.get(code, Kind("", "repair or remove these rows", 0))
            detail = self.details.get(code, "")
            what = f"{kind.what} ({detail})" if kind.what and detail else kind.what or detail
            fault = code in always or (kind.fault_from is not None and count >= kind.fault_from * rows)
            fix = (fixes or {}).get(code, kind.hint)
            found.append(Issue(code, "fault" if fault else "warning", what, self.lines[code], count, fix))
        order = [*KINDS]
        return sorted(
            found, key=lambda f: (f.severity == "warning", order.index(f.code) if f.code in order else -1, f.code)
        )
