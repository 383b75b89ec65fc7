"""Forgetting: what the adapter costs on a text that it never saw, against the budget."""

from __future__ import annotations

from ..charts import is_number, whiskers
from ..record import Record
from ..section import Missing, Section, command
from ..words import fixed, interval, signed


def section(run: Record) -> Section:
    """Return the section."""
    for _, v in run.evaluations:
        if f := v.get("forgetting"):
            around = interval(f.get("change_ci95"))
            text = signed(f.get("change")) + (f" ({around})" if around else "")
            marks = [(0.0, "")]
            if is_number(f.get("budget")):
                marks.append((f["budget"], f"budget {fixed(f['budget'], 2)}"))
            drawn = whiskers([("change", "two", f.get("change"), f.get("change_ci95"), text)], marks)
            return Section("forgetting", "Forgetting", {"found": f, "drawn": drawn})
    again = command("eval", run.folder, *run.split.split())
    return Section("forgetting", "Forgetting", missing=[Missing("not measured", again)])
