"""Memory of one process when the base is sharded over N processes (`train.fsdp`).

    W / N  always  +  R  while a step runs  +  k · L      W weights, R those outside layers, L of the largest layer

k: a layer is gathered while it runs (1); its neighbour and the buffer that both are gathered into may exist too (3).
On a CPU each process reads the whole base before it is sharded, so sharding saves nothing at that moment.
"""

import dataclasses
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from .memory_trace import StepTrace

GATHERED_LAYERS = (1, 3)


def shard_base(model: Any, processes: int) -> tuple[int, float]:
    """Return the bytes that sharding the base of a model on meta saves, and how many fewer it may save."""
    layers = [_base_bytes(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    total = _base_bytes(model)
    largest, rest = max(layers, default=total), total - sum(layers)
    low, high = (total / processes + rest + k * largest for k in GATHERED_LAYERS)
    low, high = min(low, total), min(high, total + 2 * largest)
    return int(total - low), high - low


def _base_bytes(module: Any) -> int:
    # Adapters are not sharded: only what the base itself has.
    own = {n: p for n, p in module.named_parameters() if ".adapters." not in n and ".modules_to_save." not in n}
    return sum(p.numel() * p.element_size() for p in own.values() if not p.requires_grad)


def shard_trace(trace: StepTrace, saved: int, device: str) -> StepTrace:
    """Return what a traced step takes in one of the processes, if sharding saves so many bytes."""

    def shard(parts: dict[str, int]) -> dict[str, int]:
        return {**parts, "weights": parts["weights"] - saved}

    phases = {name: shard(parts) for name, parts in trace.phases.items()}
    if device == "cpu":
        phases["loading"] = {**dict.fromkeys(phases["forward"], 0), "weights": trace.state["weights"]}
    return dataclasses.replace(trace, state=shard(trace.state), phases=phases)
