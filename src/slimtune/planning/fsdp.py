"""Memory of one process when the base is sharded over N processes (`train.fsdp`).

    W / N  always  +  R  while a step runs  +  k · L      W weights, R those outside layers, L of the largest layer

k: a layer is gathered while it runs (1); its neighbour and the buffer that both are gathered into may exist too (3).
On a CPU each process reads the whole base before it is sharded, so sharding saves nothing at that moment.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from .memory_trace import Trace
from .result import Range

GATHERED_LAYERS = (1, 3)


@dataclass(frozen=True)
class BaseWeights:
    """Bytes of a base's frozen weights.

    Args:
        total: all.
        layer: of the largest layer.
        rest: outside layers.
    """

    total: int
    layer: int
    rest: int

    def per_process(self, processes: int) -> Range:
        """Return what one process holds at the highest point of a step."""
        low, high = (self.total / processes + self.rest + k * self.layer for k in GATHERED_LAYERS)
        return Range(min(low, self.total), min(high, self.total + 2 * self.layer))


def weight_bytes(model: Any) -> BaseWeights:
    """Return the bytes of the frozen weights of a model on meta, without those of adapters."""
    layers = [_frozen_bytes(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    total = _frozen_bytes(model)
    return BaseWeights(total, max(layers, default=total), total - sum(layers))


def shard_trace(trace: Trace, weights: BaseWeights, processes: int, device: str) -> Trace:
    """Return what a traced step takes in one of the processes, the lower end."""
    saved = int(weights.total - weights.per_process(processes).low)

    def shard(parts: dict[str, int]) -> dict[str, int]:
        return {**parts, "weights": parts["weights"] - saved}

    phases = {name: shard(parts) for name, parts in trace.phases.items()}
    if device == "cpu":
        phases["loading"] = {**dict.fromkeys(phases["forward"], 0), "weights": trace.state["weights"]}
    return dataclasses.replace(trace, state=shard(trace.state), phases=phases)


def _frozen_bytes(module: Any) -> int:
    # Adapters are not sharded: only what the base itself has.
    own = {n: p for n, p in module.named_parameters() if ".adapters." not in n and ".trained_copies." not in n}
    return sum(p.numel() * p.element_size() for p in own.values() if not p.requires_grad)
