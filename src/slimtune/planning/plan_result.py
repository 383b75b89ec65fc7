"""The result of a plan: numbers, each with the kind of evidence behind it (docs/plan.md)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Verdict = Literal["fits", "tight", "does not fit"]
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime")
"""The parts of a step's memory, in the order bars are stacked."""

EVIDENCE = ("measured", "traced", "computed", "published", "guessed")
"""Kinds of evidence behind a figure, explained in docs/plan.md."""


class Range(NamedTuple):
    """A number known to lie between two ends."""

    low: float
    high: float


class Workload(NamedTuple):
    """What a run computes, from which its speed on any GPU follows (`throughput.estimate_speed`)."""

    operator_counts: Any  # how often an operator of (FLOPs, bytes moved, dtype) runs in one micro-batch
    attention_operations: Any  # FLOPs of fused attention in one micro-batch, by dtype
    tokens: int  # trained in one micro-batch
    optimizer_step_bytes: int = 0  # that the optimizer moves in a step
    micro_batches: int = 1  # in an optimizer step


@dataclass(frozen=True)
class Advice:
    """One change that saves memory."""

    change: str  # as a flag
    saves: int  # bytes less at the highest point
    verdict: Verdict  # of the changed run


@dataclass(frozen=True)
class Plan:
    """What a run takes on a GPU; sizes in bytes."""

    model: str
    method: str
    card: str  # the GPU's name
    dtype: str  # of the base's weights; "nf4" or "int8" if it is quantized
    batch: int  # rows in a micro-batch
    seq_len: int  # tokens of the longest row
    max_tokens_per_micro_batch: int
    micro_batches: int  # in an optimizer step
    trainable_params: int
    total_params: int  # the adapter's included
    adapter_bytes: int  # of `adapter_model.safetensors`, to the MB
    adapter_bytes_at_most: bool  # training may leave a smaller file (ranks chosen from data)
    parts: dict[str, int]  # by part (PARTS) at the highest point of the step
    allocated_bytes: int  # highest number of bytes of tensors over all phases of the run
    reserved_bytes: Range  # what the allocator takes from the device for them
    runtime_bytes: Range  # what the device's runtime takes beside the allocator
    usable_bytes: Range  # what the GPU gives to a job, (surely, at most)
    peaks: dict[str, int]  # bytes of tensors by phase: start, forward, loss, backward, optimizer, evaluation, merge
    host_bytes: int  # highest number of bytes of CPU memory
    disk_bytes: int  # what a run writes at most: checkpoints and adapter
    verdict: Verdict
    reason: str  # of the verdict, in one sentence
    max_seq_len: int  # longest row that fits at this batch; 0: none
    max_batch_size: int  # most rows of `seq_len` that fit in a micro-batch; 0: none
    tokens_per_second: Range | None  # trained ones; None if the GPU's rates are unknown
    advice: list[Advice] = field(default_factory=list)  # changes that save memory, the best first
    evidence: dict[str, str] = field(default_factory=dict)  # by field, with a note where there is one
    work: Workload | None = field(default=None, repr=False, compare=False)
    notes: list[str] = field(default_factory=list)  # what the GPU's dtypes and software, or the base's positions, cost

    @property
    def trainable_fraction(self) -> float:
        return self.trainable_params / self.total_params

    @property
    def need(self) -> Range:
        """Bytes that the device needs: reserved and runtime."""
        return add_ranges(self.reserved_bytes, self.runtime_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values; ranges as `{"low", "high"}`."""
        advice = [dataclasses.asdict(a) for a in self.advice]
        values = fields_as_dict(self, trainable_fraction=self.trainable_fraction, need_bytes=self.need, advice=advice)
        del values["work"]
        return values


def add_ranges(*ranges: Range) -> Range:
    """Return the range of the sum."""
    return Range(sum(r.low for r in ranges), sum(r.high for r in ranges))


def fields_as_dict(record: Any, **more: Any) -> dict[str, Any]:
    """Return the fields of a dataclass and more values; ranges as `{"low", "high"}`."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)} | more
    return {name: value._asdict() if isinstance(value, Range) else value for name, value in values.items()}
