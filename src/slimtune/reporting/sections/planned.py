"""Plan against measured: memory by part beside what the machine gives, and what the run came to."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..charts import BOX, is_number
from ..record import Record
from ..section import Missing, Section, command
from ..words import duration, fixed, size, span, whole


class Part(NamedTuple):
    """A piece of a bar: its place in the box, and what it is."""

    name: str
    at: float
    width: float
    bytes: float


class Line(NamedTuple):
    """One figure, planned and measured; `within`: whether it came as planned, None where nobody can say."""

    what: str
    planned: str
    measured: str
    within: bool | None = None


def section(run: Record) -> Section:
    """Return the section."""
    again = command("plan", run.folder / "recipe.yaml")
    if not run.plan:
        return Section("planned", "Plan against measured", missing=[Missing("not planned", again)])
    p = run.plan
    missing = [] if run.result else [Missing("not measured", command("train", run.folder / "recipe.yaml", "--resume"))]
    values = {"plan": p, "bar": _bar(run), "machine": _machine(run), "lines": _lines(run), "off": _is_off(run)}
    return Section("planned", "Plan against measured", values, missing)


def _peak(run: Record) -> tuple[Any, Any, Any]:
    """Return least, most and measured peak, counted alike: all of this process, on a GPU its tensors."""
    peak = run.result.get("peak_bytes")
    if str(run.result.get("device", "")).startswith("cuda"):
        return run.plan.get("allocated_bytes"), run.plan.get("allocated_bytes"), peak
    need = run.plan.get("need_bytes") or {}
    return need.get("low"), need.get("high"), peak


def _bar(run: Record) -> dict[str, Any]:
    parts = {k: v for k, v in (run.plan.get("parts") or {}).items() if is_number(v) and v > 0}
    low, high, peak = _peak(run)
    full = max([sum(parts.values()), *(x for x in (high, peak) if is_number(x))], default=0)
    if not full:
        return {}
    at, pieces = 0.0, []
    for name, n in parts.items():
        pieces.append(Part(name, round(at / full * BOX, 1), round(n / full * BOX, 1), n))
        at += n
    marks = {k: round(v / full * BOX, 1) for k, v in (("low", low), ("high", high), ("peak", peak)) if is_number(v)}
    return {"parts": pieces, **marks, "low_bytes": low, "high_bytes": high, "peak_bytes": peak}


def _machine(run: Record) -> dict[str, Any]:
    usable, (low, high, peak) = (run.plan.get("usable_bytes") or {}).get("low"), _peak(run)
    if not (is_number(usable) and usable and is_number(high)):
        return {}
    full = max(usable, high)
    return {
        "name": run.plan.get("card", "the machine"),
        "usable_bytes": usable,
        "usable": round(usable / full * BOX, 1),
        "low": round(low / full * BOX, 1) if is_number(low) else 0,
        "high": round(high / full * BOX, 1),
        "peak": round(peak / full * BOX, 1) if is_number(peak) else None,
        "share": high / usable,
    }


def _lines(run: Record) -> list[Line]:
    p, r, probe = run.plan, run.result, run.probe
    low, high, peak = _peak(run)
    lines = [Line("peak memory", span(low, high, size), size(peak), _inside(peak, low, high) if low != high else None)]
    if probe:
        what = f"longest pass, {whole(probe.get('tokens'))} tokens"
        planned = span(probe.get("low"), probe.get("high"), size)
        lines.append(Line(what, planned, size(probe.get("bytes")), probe.get("as_planned")))
    lines += [
        Line("parameters trained", whole(p.get("trainable_params")), whole(r.get("trainable_params"))),
        Line("adapter file", size(p.get("adapter_bytes")), size(r.get("adapter_bytes"))),
    ]
    pace = p.get("tokens_per_second") or {}
    slow: Any = pace.get("low")
    fast: Any = pace.get("high")
    tokens: Any = r.get("trained_tokens")
    known = all(is_number(x) and x > 0 for x in (slow, fast)) and is_number(tokens)
    rate, took = r.get("tokens_per_second"), r.get("train_seconds")
    lines.append(
        Line("tokens a second", span(slow, fast, whole) if pace else "no rate known", fixed(rate, 0),
             _inside(rate, slow, fast))
    )  # fmt: skip
    planned = span(tokens / fast, tokens / slow, duration) if known else "no rate known"
    lines.append(Line("time of the training steps", planned, duration(took)))
    return lines


def _inside(value: Any, low: Any, high: Any) -> bool | None:
    return low <= value <= high if all(map(is_number, (value, low, high))) else None


def _is_off(run: Record) -> bool:
    return run.probe.get("as_planned") is False
