"""Run the longest micro-batch once before training, and compare the memory it takes with the plan.

The probe leaves nothing behind: gradients are dropped, random number generators are restored, no weight changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..attention.register import packed_attention
from ..data.collator import Collator, Example
from ..kernels.dropout import preserve_rng_state
from ..train_step.loss import forward_backward, move_to_device
from ..utils.device import peak_memory, reset_peak_memory
from ..utils.formatting import format_bytes


@dataclass(frozen=True)
class Probe:
    """The memory that the longest micro-batch takes.

    Args:
        tokens: tokens of the micro-batch.
        bytes: most bytes in use at once: reserved by the GPU's allocator, or resident in this process.
        low: fewest bytes that were planned.
        high: most bytes that were planned.
    """

    tokens: int
    bytes: int
    low: int
    high: int

    @property
    def as_planned(self) -> bool:
        """Whether the bytes are within the planned range."""
        return self.low <= self.bytes <= self.high

    def text(self) -> str:
        """Return a line for people."""
        planned = f"{format_bytes(self.low)} to {format_bytes(self.high)} were planned"
        line = f"the longest micro-batch, {self.tokens} tokens, takes {format_bytes(self.bytes)}; {planned}"
        return line if self.as_planned else f"{line}: the plan is off, please report it with the run's plan.json"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "as_planned": self.as_planned}


def probe_memory(model: Any, collator: Collator, examples: Sequence[Example], plan: Mapping[str, Any]) -> Probe:
    """Run the longest micro-batch of some rows, forward and backward.

    Args:
        model: the adapted model, as it will train.
        collator: divides the rows into micro-batches.
        examples: the rows of the longest step.
        plan: the plan as plain values.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: it does not fit; nothing is left of the attempt.
    """
    device, was_training = next(model.parameters()).device, model.training
    micro_batch = max(collator.make_micro_batches(examples), key=lambda batch: batch["input_ids"].numel())
    model.train()
    reset_peak_memory(device)
    try:
        with preserve_rng_state(device), packed_attention(model):
            forward_backward(model, [move_to_device(micro_batch, device)])
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        model.train(was_training)
    low, high = planned_bytes(plan, device)
    # The first optimizer step creates the optimizer's state, after this.
    low -= plan["parts"]["optimizer"]
    return Probe(micro_batch["input_ids"].numel(), peak_memory(device, reserved=True), low, high)


def planned_bytes(plan: Mapping[str, Any], device: torch.device) -> tuple[int, int]:
    """Return the fewest and most planned bytes, as `peak_memory(reserved=True)` counts them."""
    outside_allocator = plan["runtime_bytes"] if device.type == "cuda" else {"low": 0, "high": 0}
    low, high = (int(plan["need_bytes"][end] - outside_allocator[end]) for end in ("low", "high"))
    return low, high
