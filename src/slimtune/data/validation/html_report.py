"""A report as one HTML page: no network, light and dark, readable on a phone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ...utils.formatting import format_count
from .summary import format_issue, format_verdict, report_facts


def render_html(report: Mapping[str, Any]) -> str:
    """Return a report as a page."""
    name = html.escape(report["file"])
    shown = [
        ("rows", f"{report['rows']:,}"),
        ("refused", f"{report['refused_count']:,}"),
        ("tokens", format_count(report["tokens"])),
        ("learned", f"{100 * report['supervised_share']:.0f} %"),
        ("longest row", f"{report['lengths']['max']:,}"),
    ]
    body = [
        f"<h1>{name}</h1><p>{html.escape(report['format'])} rows for {html.escape(report['model'])}</p>",
        f'<p><b class="{report["verdict"]}">{html.escape(format_verdict(report))}</b></p>',
        '<div class="big">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in shown) + "</div>",
        *_findings(report["findings"]),
        "<h2>Lengths</h2><p>rows by tokens</p>" + _histogram(report["lengths"]["histogram"], report["max_seq_len"]),
        "<h2>Figures</h2>" + _table(report_facts(report)),
    ]
    if report["refused"]:
        named = [(f"line {r['line']}", f"{r['cause']} ({r['code']})") for r in report["refused"]]
        more = report["refused_count"] - len(named)
        body.append("<h2>Refused rows</h2>" + _table(named) + (f"<p>and {more:,} more</p>" if more else ""))
    if report["samples"]:
        body.append("<h2>As the model reads them</h2><p>What is marked is learned.</p>")
        body += [f"<p>line {s['line']}</p><pre>{_pieces(s['pieces'])}</pre>" for s in report["samples"]]
    style = files(__package__).joinpath("page.css").read_text()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{name}</title><style>{style}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _findings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    return ["<h2>Findings</h2>"] + [
        f'<div class="finding {f["severity"]}"><b>{f["severity"]}: {html.escape(f["code"])}</b><br>'
        f"{html.escape(format_issue(f))}"
        f"<p>fix: {html.escape(f['fix'])}</p></div>"
        for f in found
    ]


def _histogram(bars: Sequence[Mapping[str, int]], limit: int, width: int = 720, height: int = 220) -> str:
    if not bars:
        return "<p>no row has tokens</p>"
    left, top, bottom = 4, 16, 24
    most = max(b["rows"] for b in bars)
    low, high = bars[0]["from"], bars[-1]["to"] + 1
    scale = (width - 2 * left) / (high - low)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="rows by length in tokens">']
    for b in bars:
        x, tall = left + (b["from"] - low) * scale, (height - top - bottom) * b["rows"] / most
        wide = max(1.0, (b["to"] + 1 - b["from"]) * scale - 2)
        parts.append(
            f'<rect x="{x:.1f}" y="{height - bottom - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
            f'fill="var(--bar)"><title>{b["from"]} to {b["to"]} tokens: {b["rows"]:,} rows</title></rect>'
        )
    for at, anchor in ((low, "start"), (high - 1, "end")):
        x = left if anchor == "start" else width - left
        parts.append(
            f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}" font-size="13" fill="var(--soft)">{at:,}</text>'
        )
    if low <= limit < high - 1:
        x = left + (limit + 1 - low) * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - bottom}" stroke="var(--bad)" '
            f'stroke-dasharray="4 3"><title>max_seq_len {limit}</title></line>'
        )
    return "".join(parts) + "</svg>"


def _pieces(pieces: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"<mark>{html.escape(p['text'])}</mark>" if p["learned"] else html.escape(p["text"]) for p in pieces)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return "<table>" + "".join(cells) + "</table>"
