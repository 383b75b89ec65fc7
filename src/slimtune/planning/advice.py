"""What to change first when a job does not fit: each change tried on its own, then the best of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .request import PlanRequest
from .result import Advice, Plan, Verdict
from .training_job import TrainingJob

TILE = 1024
"""Tokens in a tile: products of so many are as fast as larger ones, and what they hold is small beside a long row."""
Ask = Callable[[TrainingJob], tuple[int, Verdict]]
"""Gives a job's peak and whether it runs."""


def make_advice(request: PlanRequest, job: TrainingJob, plan: Plan, ask: Ask) -> list[Advice]:
    """Return changes that save memory, by what they save; last, those that are needed together where none is enough.

    Args:
        request: what was asked.
        job: the job that does not fit, or is tight.
        plan: its plan.
        ask: gives a changed job's peak and whether it runs.
    """
    changes = _changes(job)
    tried = [(text, change, *ask(change(job))) for text, change in changes]
    useful = [t for t in tried if t[2] < plan.allocated_bytes]
    found = [Advice(text, plan.allocated_bytes - peak, verdict) for text, _, peak, verdict in useful]
    found.sort(key=lambda a: (a.verdict != "fits", -a.saves if a.verdict != "fits" else a.change))
    if any(a.verdict == "fits" for a in found):
        return found
    together, texts = job, []
    for text, change, _, _ in useful:
        together = change(together)
        texts.append(text)
        if len(texts) < 2:
            continue
        peak, verdict = ask(together)
        if verdict == "fits":
            return [Advice(" and ".join(texts), plan.allocated_bytes - peak, verdict), *found]
    return found


def _changes(job: TrainingJob) -> list[tuple[str, Callable[[TrainingJob], TrainingJob]]]:
    """Return what can be changed, in the order of how little it costs."""
    changes: list[tuple[str, Callable[[TrainingJob], TrainingJob]]] = []
    if not job.checkpointing:
        changes.append(("--checkpointing (a third slower)", lambda j: replace(j, checkpointing=True)))
    elif job.device == "cuda" and not job.offload:
        changes.append(("--offload", lambda j: replace(j, offload=True)))
    if job.tile is None and sum(job.lengths) >= 2 * TILE:
        changes.append((f"--tile {TILE}", lambda j: replace(j, tile=TILE)))
    if len(job.lengths) > 1:
        changes.append(
            ("--batch-size 1, and --accumulate as many", lambda j: replace(j, lengths=j.lengths[:1], passes=2))
        )
    if job.optimizer != "adamw":
        changes.append(("--optimizer adamw", lambda j: replace(j, optimizer="adamw")))
    if job.method is None:
        return changes
    if job.quantization != "nf4":
        changes += [(f"--quant {kind}", partial(replace, quantization=kind)) for kind in ("nf4", "int8")]
    if max(job.lengths) > 256:
        shorter = max(job.lengths) // 2
        changes.append(
            (f"--seq-len {shorter}", lambda j: replace(j, lengths=tuple(min(n, shorter) for n in j.lengths)))
        )
    return changes
