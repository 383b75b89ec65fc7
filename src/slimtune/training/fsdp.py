"""The frozen base sharded over the processes of a run (FSDP2): each keeps 1/N, a layer is gathered where it runs.

FSDP2 gets one group per layer and one for the rest (embeddings, last norm, head); each is gathered before its forward
and backward passes. The adapter stays whole in every process, and `utils/distributed.py` sums its gradients: it is
saved, clipped and resumed as in one process. A fused function keeps the gathered weight for its backward pass: FSDP2
frees that tensor's storage after the layer's forward pass and fills the same storage again before its backward pass.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..errors import UsageError, format_names
from ..train_step.memory_savings import transformer_layers


def apply_fsdp(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard an adapted model's base over the processes, in place, and move the whole adapter to `device`.

    Args:
        model: the adapted model, which may be in CPU memory: it is moved layer by layer.
        mesh: the processes.
        device: the device of this process.

    Raises:
        UsageError: the base is quantized, or has no transformer layers.
    """
    layers = transformer_layers(model, "--set train.fsdp=false")
    unsharded = find_adapter_parameters(model)
    quantized = [n for n, p in model.named_parameters() if p not in unsharded and not p.is_floating_point()]
    if quantized:
        raise UsageError(
            f"train.fsdp: {len(quantized)} weights are quantized, such as {format_names(quantized, 2)}",
            "a base in 16 or 32 bits: quantized weights cannot be cut by rows",
            "--set train.fsdp=false, where each process keeps the whole quantized base",
        )
    for parameter in unsharded:
        parameter.data = parameter.data.to(device)
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=unsharded)


def find_adapter_parameters(model: Any) -> set[nn.Parameter]:
    """Return the adapter's parameters, trained or fixed, and the base's parameters that it has trained copies of."""
    modules = model.adapted_layers().values()
    own = {p for m in modules for part in (m.adapters, m.trained_copies) for p in part.parameters()}
    copied = {p for m in modules if m.trained_copies for p in m._parameters.values() if p is not None}
    return own | copied | {p for p in model.parameters() if p.requires_grad}
