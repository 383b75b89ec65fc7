"""The plan of a job on a card: will it run, with how much room, and what to change if it does not.

    request ─ outline (config alone) ─ job of each method ─ trace + formula ─ reserved band ─ verdict ─ advice
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapt.quantized import values_in
from ..build import OPTIMIZERS
from ..contract.config import PeftConfig
from ..errors import SlimtuneError, UsageError, listed, nearest
from ..methods import config_class
from ..methods import names as method_names
from ..models.dtype import pick_dtype
from ..models.known import Outline
from ..recipe.method import method_section
from ..units import bytes_text
from .advice import advised
from .allocator import Allocator
from .cards import Card
from .closed import Form, extrapolated, form_of
from .files import adapter_bytes, run_bytes, writing_bytes
from .job import Job
from .pace import pace
from .result import PARTS, Band, Plan, Verdict
from .trace import Trace, merging, trace

FULL = "full"
LONGEST = 1 << 22
"""No row longer than this is looked for."""
RUNTIME = {"cuda": Band(0.25e9, 0.75e9), "mps": Band(0.2e9, 1.0e9), "cpu": Band(0.45e9, 0.8e9)}
"""Bytes that are no tensors: a CUDA context and loaded kernels; of a process on a CPU, Python and its libraries."""


GAPS = {"cuda": 0.12, "mps": 0.2, "cpu": 0.5}
"""Share of what comes and goes in a step that an allocator may hold beside it, as lengths change from step to step."""
WORKSPACES = 64e6
"""Bytes that matrix products take for themselves."""


@dataclass(frozen=True)
class Request:
    """What is asked.

    Args:
        outline: the base.
        card: where it is to run.
        methods: names of methods; "full" trains every weight.
        settings: the method's own settings, by full or short name; those a method does not have are left out where
            several methods are asked for.
        batch: rows at once; with `divide`, at most.
        seq_len: tokens of the longest row.
        accumulate: batches in an optimizer step.
        dtype: of the base's weights, "auto": bfloat16 where the card has it, else float32.
        optimizer: a name `build.OPTIMIZERS` lists.
        quantization: "nf4", "int8" or None.
        checkpointing: activations are computed twice.
        packing: rows in one sequence.
        divide: a batch may be computed in several passes, as training does by itself.
        keep: checkpoints that a run keeps beside its best.
        tokens: trained tokens of the whole run, None where the data are not known.
    """

    outline: Outline
    card: Card
    methods: tuple[str, ...] = ("lora",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    seq_len: int = 1024
    accumulate: int = 1
    dtype: str = "auto"
    optimizer: str = "adamw"
    quantization: str | None = None
    checkpointing: bool = False
    packing: bool = True
    divide: bool = True
    keep: int = 2
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "seq_len", "accumulate"):
            if getattr(self, name) < (2 if name == "seq_len" else 1):
                raise UsageError(f"{name} is {getattr(self, name)}", f"a whole number from {2 if name == 'seq_len' else 1}")
        if self.seq_len > LONGEST:
            raise UsageError(f"a row of {self.seq_len} tokens", f"at most {LONGEST}", "give the length in tokens")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"unknown optimizer {self.optimizer!r}{nearest(self.optimizer, OPTIMIZERS)}", listed(OPTIMIZERS)
            )

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the base's weights."""
        if self.dtype != "auto" or self.card.kind == "cpu":
            return pick_dtype(self.dtype)
        return torch.bfloat16 if self.card.bf16 else torch.float32

    def job(self, method: str) -> Job:
        """Return the job of one method, with every row of the batch in one pass.

        Raises:
            UsageError: there is no such method, or its settings are faulty.
        """
        return Job(
            base=self.outline.config,
            method=None if method == FULL else self._config(method),
            dtype=self.weights,
            lengths=(self.seq_len,) * self.batch,
            passes=self.accumulate,
            device=self.card.device,
            checkpointing=self.checkpointing,
            optimizer=self.optimizer,
            quantization=self.quantization,
            packing=self.packing,
        )

    def _config(self, method: str) -> PeftConfig:
        cls = config_class(method)
        given = dict(self.settings)
        if len(self.methods) > 1:
            known = {f.name for f in dataclasses.fields(cls)} | set(getattr(cls, "short_names", {}))
            given = {k: v for k, v in given.items() if k in known}
        section, faults = method_section({"name": method, **given})
        if faults:
            raise UsageError("; ".join(map(str, faults)))
        return cls(**{"task_type": "CAUSAL_LM", **{k: v for k, v in section.items() if k != "name"}})


def every_method() -> tuple[str, ...]:
    """Return the names of all methods that can be planned, full fine-tuning last."""
    return (*method_names(), FULL)


def plans(request: Request, say: Callable[[str], None] = lambda _: None) -> list[Plan]:
    """Return the plan of each method asked for.

    Args:
        request: what is asked.
        say: told which method is being planned.

    Raises:
        UsageError: an unknown method, faulty settings, targets that match nothing.
    """
    found = []
    for method in request.methods:
        say(f"planning {method}")
        found.append(plan_of(request, method, quick=len(request.methods) > 1))
    return found


def plan_of(request: Request, method: str, *, quick: bool = False) -> Plan:
    """Return the plan of one method.

    Args:
        request: what is asked.
        method: a method's name.
        quick: trace two and three layers and go on from there, in place of all layers: the same to a millionth.
    """
    job = request.job(method)
    model = job.outline()
    file, at_most = adapter_bytes(model)
    trained = sum(values_in(p) for p in model.parameters() if p.requires_grad)
    every = sum(values_in(p) for p in model.parameters())
    form, state = form_of(job), _state_of(job, model)
    job = _divided(request, job, form, state)
    traced = extrapolated(job, model) if quick else trace(job, model)
    form = form.corrected(job.lengths, traced)
    state = sum(traced.state.values())
    merge = None if quick else merging(job)
    peak, band = _allocation(job, traced)
    runtime = RUNTIME[job.device]
    usable = Band(*request.card.usable)

    def room(lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths surely fit."""
        return _verdict(_scaled(band, peak, state + form.over_state(lengths)), runtime, usable) == "fits"

    verdict = _verdict(band, runtime, usable)
    parts = {part: traced.parts.get(part, 0) for part in PARTS} | {"runtime": int(runtime.high)}
    plan = Plan(
        model=request.outline.name,
        method=method,
        card=request.card.name,
        dtype=request.quantization or str(request.weights).removeprefix("torch."),
        batch=len(job.lengths),
        seq_len=request.seq_len,
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
        host_bytes=_host(job, traced, band, writing_bytes(model, request.optimizer, request.card.device)),
        disk_bytes=run_bytes(model, request.keep, request.optimizer),
        verdict=verdict,
        reason=_reason(verdict, parts, band, runtime, usable),
        max_seq_len=_most(lambda n: room((n,) * len(job.lengths)), LONGEST),
        max_batch_size=_most(lambda n: room((request.seq_len,) * n), 1 << 16),
        tokens_per_second=pace(traced.work, request.card, sum(job.lengths)),
        evidence=_evidence(request, quick),
    )
    if verdict == "fits" or quick:
        return plan
    return dataclasses.replace(plan, advice=advised(request, job, plan, lambda j: verdict_of(j, request.card)))


def verdict_on(plan: Plan, card: Card) -> Verdict:
    """Return whether a plan made for one card runs on another of the same kind of device."""
    return _verdict(plan.reserved_bytes, plan.runtime_bytes, Band(*card.usable))


def verdict_of(job: Job, card: Card) -> tuple[int, Verdict]:
    """Return a job's peak and whether it runs, from two and three layers."""
    peak, band = _allocation(job, extrapolated(job))
    return peak, _verdict(band, RUNTIME[job.device], Band(*card.usable))


def _divided(request: Request, job: Job, form: Form, state: int) -> Job:
    """Return the job with as many rows in a pass as surely fit, as training divides a batch by itself."""
    if not request.divide or request.batch == 1:
        return job
    runtime, usable = RUNTIME[job.device], Band(*request.card.usable)

    def fits(rows: int) -> bool:
        peak = state + form.over_state((request.seq_len,) * rows)
        return _verdict(_band_about(job, peak, state), runtime, usable) == "fits"

    rows = min(request.batch, max(1, _most(fits, request.batch)))
    passes = -(-request.batch // rows) * request.accumulate
    return dataclasses.replace(job, lengths=(request.seq_len,) * rows, passes=passes)


def _state_of(job: Job, model: Any) -> int:
    """Return the bytes that are always there, from shapes alone."""
    kept = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    states = {"adamw": 2, "adamw-foreach": 2}.get(job.optimizer, 0)
    return sum(kept.values()) + trained * (states + (job.passes > 1))


def _allocation(job: Job, traced: Trace) -> tuple[int, Band]:
    """Return the bytes allocated at most, and what the allocator takes from the device for them."""
    state = sum(traced.state.values())
    if job.device != "cuda" or not traced.events:
        return traced.peak, _band_about(job, traced.peak, state)
    allocator = Allocator()
    allocator.run(traced.events)
    peak = max(allocator.most_allocated, traced.peak)
    return peak, Band(peak, max(allocator.most_reserved, _band_about(job, peak, state).high))


def _band_about(job: Job, peak: int, state: int) -> Band:
    # Weights lie once and whole; what comes and goes leaves gaps.
    return Band(peak, peak + GAPS[job.device] * (peak - state) + WORKSPACES)


def _scaled(band: Band, was: int, now: int) -> Band:
    return Band(now, now + (band.high - was) * max(1.0, now / was))


def _verdict(band: Band, runtime: Band, usable: Band) -> Verdict:
    if band.high + runtime.high <= usable.low:
        return "fits"
    return "tight" if band.low + runtime.low <= usable.high else "does not fit"


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, 0 where 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _peaks(traced: Trace, merge: int | None) -> dict[str, int]:
    """Return the most bytes in each phase of a run, the step's own phases as they are."""
    start = traced.state["weights"] + traced.state.get("adapters", 0)
    return {"start": start, **traced.peaks, **({"merge": merge} if merge else {})}


def _host(job: Job, traced: Trace, band: Band, writing: int) -> int:
    """Return the most bytes of the machine's own memory while training."""
    if job.device == "cpu":
        return int(band.high + RUNTIME["cpu"].high)
    # The base is read into the machine's memory and moved from there; a Mac's memory is one.
    loading = traced.state["weights"] if job.device == "cuda" else 0
    return int(max(loading, writing) + RUNTIME["cpu"].high)


def _reason(verdict: Verdict, parts: Mapping[str, int], band: Band, runtime: Band, usable: Band) -> str:
    low, high = band.low + runtime.low, band.high + runtime.high
    need = f"it needs {bytes_text(low)} to {bytes_text(high)} of {bytes_text(usable.low)}"
    if verdict == "fits":
        return f"{need}, which leaves {bytes_text(usable.low - high)} free"
    largest = sorted(((size, part) for part, size in parts.items()), reverse=True)[:2]
    most = " and ".join(f"{part} ({bytes_text(size)})" for size, part in largest)
    if parts["weights"] + runtime.low > usable.high:
        return f"{need}: the weights alone ({bytes_text(parts['weights'])}) are more than the card has"
    return f"{need}; the most of it is {most}" + ("" if verdict == "does not fit" else ": try it, with nothing beside")


def _evidence(request: Request, quick: bool) -> dict[str, str]:
    card = request.card
    traced = "traced" + (" at two and three layers, which tell of the others" if quick else "")
    return {
        "trainable_params": "computed",
        "total_params": "computed",
        "adapter_bytes": "computed",
        "parts": f"{traced}; runtime: guessed",
        "allocated_bytes": traced,
        "reserved_bytes": "computed by replaying the allocator; the upper end is guessed" if card.device == "cuda"
        else "guessed",
        "runtime_bytes": "guessed",
        "usable_bytes": "measured on this machine" if card.kind == "cpu" else f"published ({card.source}); guessed band",
        "peaks": traced,
        "host_bytes": "computed; guessed runtime",
        "disk_bytes": "computed, an upper bound",
        "max_seq_len": "computed by the formula that the trace corrects",
        "max_batch_size": "computed by the formula that the trace corrects",
        "tokens_per_second": f"computed from traced work and published rates ({card.source}); the band is guessed",
        "model": request.outline.source,
    }  # fmt: skip
