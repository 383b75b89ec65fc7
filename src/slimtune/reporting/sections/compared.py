"""Base against tuned on rows that were held out, with the intervals drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..charts import Figure, Whiskers, is_number, whiskers
from ..record import Evaluation, Record, Values
from ..section import Missing, Section, command
from ..words import fixed, interval, signed


@dataclass(frozen=True)
class Measure:
    """One measure of both models.

    Args:
        title: what is measured.
        unit: of it.
        both: base and tuned on one axis.
        change: tuned against base, beside 0.
    """

    title: str
    unit: str
    both: Whiskers
    change: Whiskers | None


def section(run: Record) -> Section:
    """Return the section."""
    again = command("eval", run.folder, *run.split.split())
    if not run.evaluations:
        return Section("compared", "Base against tuned", missing=[Missing("not measured", again)])
    found = [{"name": _named(e), "found": e.values, "measures": _measures(e.values)} for e in run.evaluations]
    missing = [] if any("tuned_accuracy" in e.values for e in run.evaluations) else [
        Missing("accuracy was not measured", again)
    ]  # fmt: skip
    return Section("compared", "Base against tuned", {"evaluations": found}, missing)


def _named(evaluation: Evaluation) -> str:
    name = evaluation.name
    return f"{name} rows" if name in ("test", "validation") else f"rows of {name.removeprefix('data-')}"


def _measures(v: Values) -> list[Measure]:
    measures = [
        _measure(v, "loss", "Loss", "nats a token, lower is better", "loss_reduction", 3),
        _measure(v, "perplexity", "Perplexity", "lower is better", "", 2),
        _measure(v, "accuracy", "Accuracy", "% of tokens foretold, higher is better", "accuracy_gain", 1, 100),
        _measure(_use(v), "use", "Use of the prompt", "nats a token lost after another's prompt", "change_use", 3),
    ]
    return [m for m in measures if m is not None]


def _use(v: Values) -> Values:
    """Return what both models read from the prompt, by the names that other measures have: `base_use_ci95` …"""
    found = {tuple(name.partition("_")): value for name, value in (v.get("prompt_dependence") or {}).items()}
    return {f"{who}_use{bar}{rest}": value for (who, bar, rest), value in found.items()}


def _measure(v: Values, key: str, title: str, unit: str, gain: str, digits: int, factor: float = 1.0) -> Measure | None:
    def row(label: str, tone: str, name: str, say: Callable[..., str]) -> Figure:
        value: Any = v.get(name)
        ci: Any = v.get(f"{name}_ci95")
        if not is_number(value):
            return label, tone, None, None, ""
        around = interval(ci, digits, factor)
        text = say(value * factor, digits) + (f" ({around})" if around else "")
        return label, tone, value * factor, [x * factor for x in ci] if around else None, text

    both = whiskers([row("base", "one", f"base_{key}", fixed), row("tuned", "two", f"tuned_{key}", fixed)])
    if both is None:
        return None
    change = whiskers([row("loss_reduction", "two", gain, signed)], [(0.0, "")]) if gain else None
    return Measure(title, unit, both, change)
