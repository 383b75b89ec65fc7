"""A base divided over N processes (`train.fsdp`): what of its weights one process holds.

    W / N  always  +  R  while a step runs  +  k · L      W weights, R those outside layers, L of the largest layer

k: a layer is gathered while it runs (1); its neighbour and the buffer that both are gathered into may lie beside (3).
On a CPU each process reads the whole base before it is divided, so that dividing saves nothing at that moment.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from .memory_trace import Trace
from .result import Range

_GATHERED = (1, 3)


@dataclass(frozen=True)
class Weights:
    """Bytes of a base's frozen weights.

    Args:
        every: all.
        layer: of the largest layer.
        rest: outside layers.
    """

    every: int
    layer: int
    rest: int

    def held(self, processes: int) -> Range:
        """Return what one of the processes holds at the highest point of a step."""
        low, high = (self.every / processes + self.rest + k * self.layer for k in _GATHERED)
        return Range(min(low, self.every), min(high, self.every + 2 * self.layer))


def weight_bytes(model: Any) -> Weights:
    """Return the frozen weights of an adapted model on meta, each once; the adapter's own are not among them."""
    parts = [_bytes(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    every = _bytes(model)
    return Weights(every, max(parts, default=every), every - sum(parts))


def shard_trace(traced: Trace, weights: Weights, processes: int, device: str) -> Trace:
    """Return what a traced step takes in one of the processes, at least; without events, those of the whole base."""
    saved = int(weights.every - weights.held(processes).low)

    def less(parts: dict[str, int]) -> dict[str, int]:
        return {**parts, "weights": parts["weights"] - saved}

    phases = {name: less(parts) for name, parts in traced.phases.items()}
    if device == "cpu":
        empty = dict.fromkeys(next(iter(phases.values())), 0)
        phases["loading"] = {**empty, "weights": traced.state["weights"]}
    return dataclasses.replace(traced, state=less(traced.state), phases=phases, events=[])


def _bytes(module: Any) -> int:
    # Adapters are kept whole: only what the base itself has is divided.
    own = {n: p for n, p in module.named_parameters() if ".adapters." not in n and ".trained_copies." not in n}
    return sum(p.numel() * p.element_size() for p in own.values() if not p.requires_grad)
