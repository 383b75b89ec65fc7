"""The longest pass run once before training: what it really takes, beside what was planned.

Nothing of it is left: gradients are dropped, random numbers are drawn as if it had not been, no weight is touched.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attention.packed_layout import packed_attention
from ..data.collator import Collator, Example
from ..data.store import Examples
from ..kernels.dropout import preserve_rng_state
from ..train_step.loss import forward_backward, move_to_device
from ..utils.formatting import format_bytes


@dataclass(frozen=True)
class Probe:
    """What the longest pass took.

    Args:
        tokens: of the pass, as laid.
        bytes: most held at once: reserved by the GPU's allocator, or resident in this process.
        low: what was planned for it, at least.
        high: at most.
    """

    tokens: int
    bytes: int
    low: int
    high: int

    @property
    def as_planned(self) -> bool:
        """Whether it is within the band."""
        return self.low <= self.bytes <= self.high

    def text(self) -> str:
        """Return it as a line for people."""
        planned = f"{format_bytes(self.low)} to {format_bytes(self.high)} were planned"
        line = f"the longest pass, {self.tokens} tokens, takes {format_bytes(self.bytes)}; {planned}"
        return line if self.as_planned else f"{line}: the plan is off, please report it with the run's plan.json"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "as_planned": self.as_planned}


def probe(model: Any, collator: Collator, examples: Sequence[Example], rows_a_step: int, plan: Mapping) -> Probe:
    """Run the longest pass that training can come to.

    Args:
        model: the adapted model, as it will train.
        collator: divides a step's rows into passes.
        examples: the training rows.
        rows_a_step: rows in an optimizer step.
        plan: the plan as plain values.

    Raises:
        what torch raises where memory runs out; nothing is left of the pass then, either.
    """
    device = next(model.parameters()).device
    pack = max(collator.packs(longest(examples, rows_a_step)), key=lambda p: p["input_ids"].numel())
    pack = move_to_device(pack, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.train()
    reset_peak(device)
    try:
        with preserve_rng_state(device), packed_attention(model):
            forward_backward(model, [pack], lambda loss: loss.backward())
    finally:
        for parameter in trained:
            parameter.grad = None
        model.train(was_training)
    # The optimizer's state is made by the first step, after this.
    low, high = planned_bytes(plan, device)
    later = plan["parts"]["optimizer"]
    return Probe(pack["input_ids"].numel(), peak_bytes(device, reserved=True), low - later, high)


def longest(examples: Sequence[Example], rows_a_step: int) -> list[Example]:
    """Return the rows of the step that takes most."""
    lengths = examples.lengths if isinstance(examples, Examples) else [len(e["input_ids"]) for e in examples]
    return [examples[i] for i in np.argsort(lengths, kind="stable")[-rows_a_step:]]


def planned_bytes(plan: Mapping, device: torch.device) -> tuple[int, int]:
    """Return what was planned to be held, at least and at most, as `peak_bytes(reserved=True)` counts it."""
    beside = plan["runtime_bytes"] if device.type == "cuda" else {"low": 0, "high": 0}
    low, high = (int(plan["need_bytes"][end] - beside[end]) for end in ("low", "high"))
    return low, high


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device, *, reserved: bool = False) -> int:
    """Return the most bytes held at once: by the GPU's allocator, or resident in this process.

    Args:
        device: where the model lies.
        reserved: of a GPU, what the allocator took from it, not what tensors took of that.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) if reserved else torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
