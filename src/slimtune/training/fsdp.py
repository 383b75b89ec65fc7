"""The frozen base divided over the processes of a run (FSDP2): each keeps 1/N, a layer is gathered where it runs.

    a group a layer, one for the rest (embeddings, last norm, head)      gathered before forwards and before backwards

What the adapter holds stays whole on every process and is left to `utils/distributed.py`: it is saved, clipped and resumed
as in one process. A fused function keeps the gathered weight for its backward pass: FSDP2 frees that tensor's storage
after the layer's forward pass and fills the same storage again before its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UsageError, format_names


def apply_fsdp(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide an adapted model's base over the processes, in place, without talking; the adapter goes to `device` whole.

    Args:
        model: the adapted model, which may lie in the machine's memory: it is moved layer by layer.
        mesh: the processes.
        device: where this process trains.

    Raises:
        UsageError: a base whose weights are no floating point numbers, or that has no layers known as such.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"train.fsdp: a {type(model).__name__} has no layers that are known as such",
            "a model of transformers whose layers can be checkpointed",
            "--set train.fsdp=false",
        )
    whole = adapters_of(model)
    packed = [n for n, p in model.named_parameters() if p not in whole and not p.is_floating_point()]
    if packed:
        raise UsageError(
            f"train.fsdp: {len(packed)} weights are quantized, such as {format_names(packed, 2)}",
            "a base in 16 or 32 bits: quantized weights cannot be cut by rows",
            "--set train.fsdp=false, where each process keeps the whole quantized base",
        )
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)


def adapters_of(model: Any) -> set[nn.Parameter]:
    """Return the parameters that are the adapter's: trained, kept fixed, and those of the base it has a copy of."""
    modules = model.adapted_layers().values()
    kept = {p for m in modules for part in (m.adapters, m.trained_copies) for p in part.parameters()}
    copied = {p for m in modules if m.trained_copies for p in m._parameters.values() if p is not None}
    return kept | copied | {p for p in model.parameters() if p.requires_grad}
