"""The plan of a job on a card: will it run, with how much room, and what to change if it does not.

request ─ outline (config alone) ─ job of each method ─ trace + formula ─ reserved band ─ verdict ─ advice
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..adapters.quantized import count_values
from ..errors import UsageError
from ..utils.formatting import format_bytes
from .advice import make_advice
from .extrapolate import MemoryModel, extrapolate_layers, fit_memory_model
from .file_sizes import adapter_bytes, run_bytes, writing_bytes
from .fsdp import shard_trace, weight_bytes
from .memory_trace import Trace, trace_memory, trace_merge
from .request import LONGEST, PlanRequest
from .result import PARTS, Plan, Range, Verdict
from .throughput import estimate_throughput
from .training_job import TrainingJob
from .verdict import RUNTIME, allocation, judge_job, largest_fitting, memory_range, other_bytes, scaled, verdict


def plans(request: PlanRequest, say: Callable[[str], None] = lambda _: None) -> tuple[list[Plan], dict[str, str]]:
    """Return the plan of each method asked for, and why a method has none, by its name.

    Args:
        request: what is asked.
        say: told which method is being planned.

    Raises:
        UsageError: one method is asked for and is unknown, has faulty settings, or targets that match nothing.
    """
    found, refused = [], {}
    for method in request.methods:
        say(f"planning {method}")
        try:
            found.append(make_plan(request, method, quick=len(request.methods) > 1, advise=len(request.methods) == 1))
        except UsageError as e:
            if len(request.methods) == 1:
                raise
            refused[method] = e.message
    return found, refused


def make_plan(request: PlanRequest, method: str, *, quick: bool = False, advise: bool = True) -> Plan:
    """Return the plan of one method.

    Args:
        request: what is asked.
        method: a method's name.
        quick: trace two and three layers and go on from there, in place of all layers: the same to a millionth.
        advise: where it does not surely fit, look for what to change.
    """
    job = request.job(method)
    model = job.outline()
    file, at_most = adapter_bytes(model)
    trained = sum(count_values(p) for p in model.parameters() if p.requires_grad)
    every = sum(count_values(p) for p in model.parameters())
    # Asked before the trace, which may use the model up.
    writing = writing_bytes(model, request.optimizer, request.card.device)
    disk = run_bytes(model, request.keep, request.optimizer)
    form, state, weights = fit_memory_model(job), _state_of(job, model), weight_bytes(model)
    held = weights.held(request.processes) if request.divided else Range(weights.every, weights.every)
    state -= int(weights.every - held.low)
    job = _divided(request, job, form, state)
    traced = extrapolate_layers(job, model) if quick else trace_memory(job, model)
    if request.divided:
        traced = shard_trace(traced, weights, request.processes, job.device)
    form = form.corrected(job.lengths, traced)
    state = sum(traced.state.values())
    merge = None if quick else trace_merge(job)
    peak, band = allocation(job, traced)
    band = Range(band.low, band.high + held.high - held.low)
    runtime = RUNTIME[job.device]
    usable = Range(*request.card.usable)

    def room(lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths surely fit."""
        now = state + form.over_state(lengths) + other_bytes(job)
        return verdict(scaled(job, band, peak, now), runtime, usable) == "fits"

    said = verdict(band, runtime, usable)
    host, when = _host(job, traced, band, writing)
    parts = {part: traced.parts.get(part, 0) for part in PARTS} | {"runtime": int(runtime.high)}
    plan = Plan(
        model=request.outline.name,
        method=method,
        card=request.card.name,
        dtype=request.quantization or str(request.weights).removeprefix("torch."),
        batch=len(job.lengths),
        seq_len=max(job.lengths),
        max_tokens_per_micro_batch=sum(job.lengths),
        passes=job.passes,
        trainable_params=trained,
        total_params=every,
        adapter_bytes=file,
        adapter_bytes_at_most=at_most,
        parts=parts,
        allocated_bytes=peak,
        reserved_bytes=band,
        runtime_bytes=runtime,
        usable_bytes=usable,
        peaks=_peaks(traced, merge),
        host_bytes=host,
        disk_bytes=disk,
        verdict=said,
        reason=_reason(said, parts, band, runtime, usable) + _shared(request),
        max_seq_len=largest_fitting(lambda n: room((n,) * len(job.lengths)), LONGEST),
        max_batch_size=largest_fitting(lambda n: room((max(job.lengths),) * n), 1 << 16),
        tokens_per_second=_pace(request, job, traced),
        evidence=_evidence(request, quick, when),
    )
    if said == "fits" or not advise or request.divided:
        return plan
    return dataclasses.replace(plan, advice=make_advice(request, job, plan, lambda j: judge_job(j, request.card)))


def _divided(request: PlanRequest, job: TrainingJob, form: MemoryModel, state: int) -> TrainingJob:
    """Return the job with as many rows in a pass as surely fit, as training divides a batch by itself."""
    every = job.lengths
    if len(every) == 1 or not (request.divide or request.room):
        return job
    runtime, usable = RUNTIME[job.device], Range(*request.card.usable)

    def fits(rows: int) -> bool:
        peak = round(1.02 * (state + form.over_state(every[:rows]) + other_bytes(job)))
        small = request.room is None or sum(every[:rows]) <= request.room
        return small and (not request.divide or verdict(memory_range(job, peak, state), runtime, usable) == "fits")

    rows = max(1, largest_fitting(fits, len(every)))
    return dataclasses.replace(
        job, lengths=every[:rows], passes=-(-len(every) // rows) * request.gradient_accumulation_steps
    )


def _state_of(job: TrainingJob, model: Any) -> int:
    """Return the bytes that are always there, from shapes alone."""
    kept = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    states = {"adamw": 2, "adamw-foreach": 2, "adamw-8bit": 2 * (1 + 4 / 256) / 4}.get(job.optimizer, 0)
    return round(sum(kept.values()) + trained * (states + (job.passes > 1)))


def _pace(request: PlanRequest, job: TrainingJob, traced: Trace) -> Range | None:
    """Return trained tokens a second, the optimizer's part with it."""
    trained = traced.state.get("adapters", 0) if job.method is not None else traced.state["weights"]
    # Parameter, gradient and states are read, and all but the gradient written.
    moved = 2 * traced.state.get("optimizer", 0) + 3 * trained
    return estimate_throughput(traced.work, request.card, sum(job.lengths), step_bytes=moved, passes=job.passes)


def _peaks(traced: Trace, merge: int | None) -> dict[str, int]:
    """Return the most bytes in each phase of a run, the step's own phases as they are."""
    start = traced.state["weights"] + traced.state.get("adapters", 0)
    return {"start": start, **traced.peaks, **({"merge": merge} if merge else {})}


def _host(job: TrainingJob, traced: Trace, band: Range, writing: int) -> tuple[int, str]:
    """Return the most bytes of the machine's own memory, and when it holds them."""
    if job.device == "cpu":
        return int(band.high + RUNTIME["cpu"].high), "in a step"
    # The base is read into the machine's memory and moved from there; a Mac's memory is one.
    loading = traced.state["weights"] if job.device == "cuda" else 0
    moments = ((traced.host, "in a step"), (writing, "as a checkpoint is written"), (loading, "as the base is read"))
    most, when = max(moments)
    return int(most + RUNTIME["cpu"].high), when


def _reason(said: Verdict, parts: Mapping[str, int], band: Range, runtime: Range, usable: Range) -> str:
    low, high = band.low + runtime.low, band.high + runtime.high
    need = f"it needs {format_bytes(low)} to {format_bytes(high)} of {format_bytes(usable.low)}"
    if said == "fits":
        return f"{need}, which leaves {format_bytes(usable.low - high)} free"
    largest = sorted(((size, part) for part, size in parts.items()), reverse=True)[:2]
    most = " and ".join(f"{part} ({format_bytes(size)})" for size, part in largest)
    if parts["weights"] + runtime.low > usable.high:
        return f"{need}: the weights alone ({format_bytes(parts['weights'])}) are more than the card has"
    return f"{need}; the most of it is {most}" + ("" if said == "does not fit" else ": try it, with nothing beside")


def _shared(request: PlanRequest) -> str:
    n = request.processes
    if n == 1:
        return ""
    if request.divided:
        return f"; the base is divided over {n} processes, this is what one of them takes"
    return f"; the base is whole in each of {n} processes, this is what one of them takes (train.fsdp divides it)"


def _evidence(request: PlanRequest, quick: bool, host: str) -> dict[str, str]:
    card = request.card
    traced = "traced" + (" at two and three layers, which tell of the others" if quick else "")
    if request.divided:
        traced += "; the divided base: computed, what is gathered beside a layer is guessed"
    return {
        "trainable_params": "computed",
        "total_params": "computed",
        "adapter_bytes": "computed",
        "parts": f"{traced}; runtime: guessed",
        "allocated_bytes": traced,
        "reserved_bytes": "computed by replaying the allocator; the upper end is guessed" if card.device == "cuda"
        else "guessed",
        "runtime_bytes": "guessed",
        "usable_bytes": "measured on this machine" if card.kind == "cpu" else f"published ({card.source})",
        "peaks": traced,
        "host_bytes": f"computed, {host}; guessed runtime",
        "disk_bytes": "computed, an upper bound",
        "max_seq_len": "computed by the formula that the trace corrects",
        "max_batch_size": "computed by the formula that the trace corrects",
        "tokens_per_second": f"computed from traced work and published rates ({card.source}); the band is guessed",
        "model": request.outline.source,
    }  # fmt: skip
