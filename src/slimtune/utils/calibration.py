"""Samples of the inputs that a model's layers get, for initialisations and rounding that depend on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear_layers import layer_sizes

ROWS = 64
"""Number of rows to run for samples."""
MAX_INPUTS = 1024
"""Inputs kept per layer: tokens drawn evenly from all rows."""


@torch.no_grad()
def collect_layer_inputs(
    model: Any, layers: Mapping[str, nn.Module], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Run a model over rows, one at a time; return each layer's inputs `(n ≤ MAX_INPUTS, in_features)` on the CPU.

    Layers that get the same tensor (q, k and v) share one sample. A layer that is not called, or does not get the row's
    hidden states (an expert), is left out.

    Args:
        model: run as it is, in its mode.
        layers: linear layers in it, by any name.
        rows: token ids, one sequence per row.
    """
    samples: dict[str, list[Tensor]] = {n: [] for n in layers}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    last_input: Tensor | None = None
    sample = torch.zeros(0)

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal last_input, sample
            if arguments[0] is not last_input:
                last_input = arguments[0]
                flat = last_input.reshape(-1, layer_sizes(module)[0])
                sample = flat[drawn].cpu() if len(flat) == length else flat[:0].cpu()
            samples[name].append(sample)

        return hook

    hooks = [m.register_forward_pre_hook(make_hook(n)) for n, m in layers.items()]
    try:
        for row in rows:
            length = len(row)
            drawn = torch.randperm(length, generator=generator)[: max(1, MAX_INPUTS // len(rows))].to(device)
            model(input_ids=torch.tensor([list(row)], device=device), use_cache=False, logits_to_keep=1)
            last_input = None
    finally:
        for hook in hooks:
            hook.remove()
    shared: dict[tuple[int, ...], Tensor] = {}
    found = {}
    for name, parts in samples.items():
        if sum(map(len, parts)):
            key = tuple(map(id, parts))
            if key not in shared:
                shared[key] = torch.cat(parts)
            found[name] = shared[key]
    return found


def second_moment(inputs: Tensor, damping: float) -> Tensor:
    """Return (1/n) XᵀX + λ I of inputs X `(n, in)` in float64; λ is `damping` times the mean of the diagonal.

    λ makes the matrix positive definite, and accounts for what a sample does not contain.
    """
    x = inputs.double()
    moment = x.t() @ x / len(x)
    moment.diagonal().add_(damping * moment.diagonal().mean() + 1e-12)
    return moment
