"""What a plan says: plain figures, each with the evidence it stands on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Verdict = Literal["fits", "tight", "does not fit"]
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "runtime")
"""The parts of a step's memory, in the order bars are stacked."""
EVIDENCE = {
    "measured": "a recorded run, or this machine",
    "traced": "the real step on tensors without values",
    "computed": "arithmetic on exact shapes",
    "published": "somebody else's measurement or data sheet",
    "guessed": "known within the band given",
}


class Range(NamedTuple):
    """A figure that is known within two ends."""

    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """One change that saves memory.

    Args:
        change: what to do, as a flag or a field of the recipe.
        saves: bytes less at the highest point.
        verdict: of the job so changed.
    """

    change: str
    saves: int
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    """What a job takes on a card.

    Args:
        model: the base's name.
        method: the method's name; "full": every weight trains.
        card: the card's name.
        dtype: of the base's weights; "nf4" or "int8" where it is quantized.
        batch: rows in one pass.
        seq_len: tokens of the longest row.
        max_tokens_per_micro_batch: tokens in one pass.
        passes: passes in an optimizer step.
        trainable_params: parameters that train.
        total_params: all parameters, the adapter's with them.
        adapter_bytes: size of `adapter_model.safetensors`.
        adapter_bytes_at_most: training may leave it smaller (ranks chosen from data).
        parts: bytes by part at the step's highest point (`PARTS`).
        allocated_bytes: most bytes of tensors at once, over all phases of the run.
        reserved_bytes: what the allocator takes for them, from the device.
        runtime_bytes: what the device's runtime takes beside the allocator.
        usable_bytes: what the card gives to a job, (surely, at most).
        peaks: most bytes of tensors in each phase: start, passes, optimizer, evaluation, merge.
        host_bytes: most bytes of the machine's own memory.
        disk_bytes: what a run writes at most: checkpoints and adapter.
        verdict: whether it runs.
        reason: why, in one sentence.
        max_seq_len: longest row that fits at this batch; 0: none.
        max_batch_size: most rows of `seq_len` that fit in one pass; 0: none.
        tokens_per_second: trained tokens a second; None where the card's rates are not known.
        advice: changes that save memory, the best first.
        evidence: the kind of evidence by field, see `EVIDENCE`, with a note where there is one.
    """

    model: str
    method: str
    card: str
    dtype: str
    batch: int
    seq_len: int
    max_tokens_per_micro_batch: int
    passes: int
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
        """Trained parameters over all."""
        return self.trainable_params / self.total_params

    @property
    def need(self) -> Range:
        """What the device has to give: reserved bytes and the runtime's."""
        return Range(*(r + o for r, o in zip(self.reserved_bytes, self.runtime_bytes, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values; bands as `{"low", "high"}`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"trainable_fraction": self.trainable_fraction, "need_bytes": self.need}
        values["advice"] = [dataclasses.asdict(a) for a in self.advice]
        return {k: v._asdict() if isinstance(v, Range) else v for k, v in values.items()}
