"""The data report: what the rows are, how long they are, what of them is learned, what was found in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..charts import BOX, Tick, is_number
from ..record import Record
from ..section import Missing, Section, command

SAMPLES = 3


def section(run: Record) -> Section:
    """Return the section."""
    d = run.recipe.data
    reports = {k: v for k in ("train", "validation") if isinstance(v := run.data.get(k), Mapping)}
    read = {k: v for k, v in (run.result.get("data_report") or {}).items() if v}
    if reports:
        shown = [{"name": k, "report": v, "lengths": _lengths(v)} for k, v in reports.items()]
        return Section("rows", "Data", {"reports": shown, "read": {}, "samples": SAMPLES})
    missing = [Missing("not looked through", command("data", d.train, "--model", run.recipe.model.name))]
    return Section("rows", "Data", {"reports": [], "read": read} if read else {}, missing)


def _lengths(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the histogram of row lengths: bars in the box, and the longest length that is taken."""
    bins = [b for b in (report.get("lengths") or {}).get("histogram") or [] if is_number(b.get("rows"))]
    bins = [b for b in bins if is_number(b.get("from")) and is_number(b.get("to")) and b["to"] >= b["from"]]
    if not bins or not (most := max(b["rows"] for b in bins)):
        return {}
    # A bin ends where the next begins, whether `to` is its last length or the one after it.
    last = bins[-1]["to"] + (bins[1]["from"] - bins[0]["to"] if len(bins) > 1 else 0)
    first, ends = bins[0]["from"], [*(b["from"] for b in bins[1:]), last]
    wide = max(last - first, 1)

    def at(x: float) -> float:
        return round((x - first) / wide * BOX, 1)

    bars = []
    for b, end in zip(bins, ends, strict=True):
        high = b["rows"] / most * BOX
        width = round(max(at(end) - at(b["from"]), 2), 1)
        bars.append({**b, "x": at(b["from"]), "w": width, "y": round(BOX - high, 1), "h": round(high, 1)})
    limit: Any = report.get("max_seq_len")
    inside = is_number(limit) and first <= limit <= last
    middle = math.floor((first + last) / 2)
    return {
        "bars": bars,
        "limit": at(limit) if inside else None,
        "xs": [Tick(0, f"{first:g} tokens"), Tick(50, f"{middle:,}"), Tick(100, f"{bins[-1]['to']:,g}")],
        "most": most,
    }
