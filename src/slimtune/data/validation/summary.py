"""The report as text, for the terminal and for the log of a training run."""

from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...utils.formatting import format_count
from ..tokenize import format_lines


def report_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a report with their names."""
    n, prefix, packing = report["lengths"], report["shared_prefix"], report["packing"]
    overlong, share = report["overlong"]["rows"], 100 * report["supervised_share"]
    supervised = f"{format_count(report['supervised_tokens'])} supervised ({share:.0f} %)"
    quantiles = f"50 % of the rows up to {n['median']}, 90 % up to {n['p90']}, 99 % up to {n['p99']}"
    saved = f"{100 * packing['saved_share']:.0f} % saved by shared prefixes"
    return [
        ("rows", f"{report['rows']:,}, {report['invalid_count'] or 'none'} invalid"),
        ("tokens", f"{format_count(report['tokens'])}, {supervised}"),
        ("tokens per row", f"{n['min']} to {n['max']}; {quantiles}"),
        (f"longer than {report['max_seq_len']}", f"{overlong:,} rows" if overlong else "none"),
        ("shared prefix", f"{prefix['tokens']} tokens: {prefix['text']!r}" if prefix["tokens"] else "none"),
        ("packed", f"{format_count(packing['packed_tokens'])} tokens per epoch, {saved}"),
    ]


def format_verdict(report: Mapping[str, Any]) -> str:
    """Return the verdict as one line."""
    severities = [issue["severity"] for issue in report["issues"]]
    counts = [(severities.count(name), name) for name in ("error", "warning")]
    parts = [f"{n} kind{'s' * (n > 1)} of {name}s" for n, name in counts if n]
    return f"{report['verdict']}: {' and '.join(parts)}" if parts else report["verdict"]


def format_issue(issue: Mapping[str, Any]) -> str:
    """Return an issue as one line."""
    count = issue["count"]
    rows = f"{count:,} rows, " if count > 1 else ""
    return f"{issue['what']}: {rows}{format_lines(issue['lines'], count)}"


def raise_if_invalid(report: Mapping[str, Any]) -> None:
    """Raise DataError with every error of a report, if there is one."""
    errors = [issue for issue in report["issues"] if issue["severity"] == "error"]
    if errors:
        hints = "; ".join(dict.fromkeys(issue["hint"] for issue in errors))
        raise DataError(
            "\n".join(f"{report['file']}: {format_issue(issue)}" for issue in errors),
            "rows that do not spoil the run",
            f"{hints}; or --force to train all the same",
        )
