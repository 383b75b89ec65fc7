"""The issues that a data set can have, and when one would spoil a run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SHOWN_LINES = 20
"""Lines that an issue names."""


@dataclass(frozen=True)
class IssueType:
    """A kind of issue.

    Args:
        description: the rows that have it.
        hint: what to do.
        error_from: share of the file's rows from which it is an error (0: a single row); None: always a warning.
    """

    description: str
    hint: str
    error_from: float | None = None


ISSUE_TYPES = {
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
    "same-answer": IssueType("rows with the same answer to different prompts", "keep a few of them", 0.95),
    "placeholder-answer": IssueType("rows with a placeholder as the answer", "remove them, or write an answer", 0.5),
    "same-pair": IssueType("preference pairs whose two answers are the same", "remove them", 0),
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


@dataclass
class IssueCounter:
    """Counts issues by code, and keeps the first lines and the first example of each."""

    lines: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, code: str, lines: Iterable[int], count: int | None = None, example: str = "") -> None:
        """Count rows with an issue; `count` if there are more than the given lines."""
        lines = list(lines)
        kept = self.lines.setdefault(code, [])
        kept += lines[: SHOWN_LINES - len(kept)]
        self.counts[code] = self.counts.get(code, 0) + (len(lines) if count is None else count)
        if example:
            self.examples.setdefault(code, example)

    def to_list(self, rows: int, always_errors: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Return the issues as JSON takes them, errors first.

        Args:
            rows: rows of the file, invalid ones included.
            always_errors: codes that are errors whatever their share.
        """
        issues = []
        for code, count in self.counts.items():
            if not count:
                continue
            kind, example = ISSUE_TYPES.get(code, INVALID_ROW), self.examples.get(code, "")
            description = f"{kind.description} ({example})" if kind.description and example else kind.description
            error = code in always_errors or (kind.error_from is not None and count >= kind.error_from * rows)
            issues.append(
                {
                    "code": code,
                    "severity": "error" if error else "warning",
                    "what": description or example,
                    "lines": self.lines[code],
                    "count": count,
                    "hint": kind.hint,
                }
            )
        order = [*ISSUE_TYPES]
        return sorted(
            issues,
            key=lambda i: (i["severity"] == "warning", order.index(i["code"]) if i["code"] in order else -1, i["code"]),
        )
