"""What it was made of: what was adapted, what the run came to, memory that ran out, versions."""

from __future__ import annotations

from ..record import Record
from ..section import Missing, Section, command
from ..words import duration, short, size, whole


def section(run: Record) -> Section:
    """Return the section."""
    r = run.result
    if not r:
        again = command("train", run.folder / "recipe.yaml", "--resume")
        return Section("made", "What it was made of", missing=[Missing("not finished", again)])
    early = ", stopped early" if r.get("stopped_early") else ""
    facts = [
        ("steps", f"{whole(r.get('steps'))}{early}; the adapter is that of step {whole(r.get('best_step'))}"),
        ("trained tokens", f"{whole(r.get('trained_tokens'))}, of which {whole(r.get('supervised_tokens'))} learned"),
        ("training steps", duration(r.get("train_seconds"))),
        ("loading the base", duration(r.get("load_seconds"))),
        ("dequantizing it", duration(r.get("prepare_seconds"))),
        ("parameters trained", f"{short(r.get('trainable_params'))} of {short(r.get('total_params'))}"),
        ("adapter", f"{whole(r.get('adapter_bytes'))} bytes"),
        ("peak memory", size(r.get("peak_bytes"))),
        ("weights", f"{r.get('quantization') or r.get('dtype', '–')} on {r.get('device', '–')}"),
    ]
    values = {
        "facts": facts,
        "adapted": r.get("adapted"),
        "events": [m for m in run.metrics if m.get("event") == "out of memory"],
        "versions": r.get("versions") or {},
    }
    return Section("made", "What it was made of", values)
