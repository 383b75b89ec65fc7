"""Samples: what base and tuned model answered to the same prompts, side by side."""

from __future__ import annotations

from ..record import Record
from ..section import Missing, Section, command

OPEN = 4
"""Samples that are not folded away."""


def section(run: Record) -> Section:
    """Return the section."""
    for name, v in run.evaluations:
        if answers := v.get("generations"):
            values = {"name": name, "first": answers[:OPEN], "rest": answers[OPEN:],
                      "summary": v.get("generation_summary") or {}}  # fmt: skip
            return Section("samples", "Samples", values)
    again = command("eval", run.folder, *run.split.split(), "--generate", "8")
    beside = command("chat", run.folder, "--side-by-side")
    return Section("samples", "Samples", missing=[Missing("not generated", again), Missing("or talk to both", beside)])
