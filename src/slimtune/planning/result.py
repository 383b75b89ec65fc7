"""The result of a plan: numbers, each with the kind of evidence behind it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Verdict = Literal["fits", "tight", "does not fit"]
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime")
"""The parts of a step's memory, in the order bars are stacked."""
EVIDENCE = {
    "measured": "a recorded run, or this machine",
    "traced": "the real training step on fake tensors, of two and three layers and extrapolated",
    "computed": "arithmetic on exact shapes",
    "published": "a measurement or data sheet of somebody else",
    "guessed": "known within the range given",
}


class Range(NamedTuple):
    """A number known to lie between two ends."""

    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """One change that saves memory.

    Args:
        change: what to do, as a flag.
        saves: bytes less at the highest point.
        verdict: of the changed run.
    """

    change: str
    saves: int
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    """What a run takes on a GPU.

    Args:
        model: the base's name.
        method: the method's name; "full": every weight is trained.
        card: the GPU's name.
        dtype: of the base's weights; "nf4" or "int8" if it is quantized.
        batch: rows in a micro-batch.
        seq_len: tokens of the longest row.
        max_tokens_per_micro_batch: tokens in a micro-batch.
        micro_batches: micro-batches in an optimizer step.
        trainable_params: parameters that are trained.
        total_params: all parameters, the adapter's included.
        adapter_bytes: size of `adapter_model.safetensors`, to the MB.
        adapter_bytes_at_most: training may leave a smaller file (ranks chosen from data).
        parts: bytes by part (`PARTS`) at the highest point of the step.
        allocated_bytes: highest number of bytes of tensors over all phases of the run.
        reserved_bytes: what the allocator takes from the device for them.
        runtime_bytes: what the device's runtime takes beside the allocator.
        usable_bytes: what the GPU gives to a job, (surely, at most).
        peaks: highest number of bytes of tensors in each phase: start, forward, loss, backward, optimizer, evaluation,
            merge.
        host_bytes: highest number of bytes of CPU memory.
        disk_bytes: what a run writes at most: checkpoints and adapter.
        verdict: whether it fits.
        reason: why, in one sentence.
        max_seq_len: longest row that fits at this batch; 0: none.
        max_batch_size: most rows of `seq_len` that fit in a micro-batch; 0: none.
        tokens_per_second: trained tokens a second; None if the GPU's rates are unknown.
        advice: changes that save memory, the best first.
        evidence: the kind of evidence (`EVIDENCE`) by field, with a note where there is one.
    """

    model: str
    method: str
    card: str
    dtype: str
    batch: int
    seq_len: int
    max_tokens_per_micro_batch: int
    micro_batches: int
    trainable_params: int
    total_params: int
    adapter_bytes: int
    adapter_bytes_at_most: bool
    parts: dict[str, int]
    allocated_bytes: int
    reserved_bytes: Range
    runtime_bytes: Range
    usable_bytes: Range
    peaks: dict[str, int]
    host_bytes: int
    disk_bytes: int
    verdict: Verdict
    reason: str
    max_seq_len: int
    max_batch_size: int
    tokens_per_second: Range | None
    advice: list[Advice] = field(default_factory=list)
    evidence: dict[str, str] = field(default_factory=dict)

    @property
    def trainable_fraction(self) -> float:
        """Trained parameters divided by all parameters."""
        return self.trainable_params / self.total_params

    @property
    def need(self) -> Range:
        """Bytes that the device needs: reserved and runtime."""
        return Range(*(r + o for r, o in zip(self.reserved_bytes, self.runtime_bytes, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values; ranges as `{"low", "high"}`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"trainable_fraction": self.trainable_fraction, "need_bytes": self.need}
        values["advice"] = [dataclasses.asdict(a) for a in self.advice]
        return {k: v._asdict() if isinstance(v, Range) else v for k, v in values.items()}
