"""A report in words: what the terminal, the page and the messages of training say alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import DataError
from ...utils.formatting import format_count


def report_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a report, each with its name."""
    n, prefix, packing = report["lengths"], report["shared_prefix"], report["packing"]
    long, most = report["on_overlong"]["rows"], report["max_seq_len"]
    share = 100 * report["supervised_share"]
    return [
        ("rows", f"{report['rows']:,} read, {report['refused_count'] or 'none'} refused"),
        (
            "tokens",
            f"{format_count(report['tokens'])}, {format_count(report['supervised_tokens'])} learned ({share:.0f} %)",
        ),
        (
            "tokens a row",
            f"{n['min']} to {n['max']}, half of the rows up to {n['median']}, "
            f"90 % up to {n['p90']}, 99 % up to {n['p99']}",
        ),
        (f"longer than {most}", f"{long:,} rows" if long else "none"),
        (
            "all rows begin with",
            f"{prefix['tokens']} tokens: {prefix['text']!r}" if prefix["tokens"] else "nothing alike",
        ),
        (
            "packed",
            f"{format_count(packing['laid_tokens'])} tokens a pass over the rows, "
            f"{100 * packing['saved_share']:.0f} % fewer",
        ),
    ]


def format_verdict(report: Mapping[str, Any]) -> str:
    """Return the verdict as one line."""
    kinds = [f["severity"] for f in report["findings"]]
    faults, warnings = kinds.count("fault"), kinds.count("warning")
    if not kinds:
        return "sound"
    said = [f"{n} kind{'s' * (n > 1)} of {name}s" for n, name in ((faults, "fault"), (warnings, "warning")) if n]
    return f"{report['verdict']}: {' and '.join(said)}"


def format_issue(finding: Mapping[str, Any]) -> str:
    """Return a finding as one line."""
    n = finding["count"]
    return f"{finding['what']}: {f'{n:,} rows, ' if n > 1 else ''}{lines_text(finding['lines'], n)}"


def lines_text(lines: Sequence[int], count: int, most: int = 12) -> str:
    """Return lines as a person reads them: `lines 3, 9, … (40 more)`."""
    shown = lines[:most]
    more = f", … ({count - len(shown):,} more)" if count > len(shown) else ""
    return f"line{'s' if count > 1 else ''} {', '.join(map(str, shown))}{more}"


def raise_if_invalid(report: Mapping[str, Any]) -> None:
    """Stop where a report says that the rows would spoil a run.

    Raises:
        DataError: it does; every fault is named.
    """
    faults = [f for f in report["findings"] if f["severity"] == "fault"]
    if faults:
        said = [f"{report['file']}: {format_issue(f)}" for f in faults]
        fixes = "; ".join(dict.fromkeys(f["hint"] for f in faults))
        raise DataError("\n".join(said), "rows that do not spoil the run", f"{fixes}; or --force to train all the same")
