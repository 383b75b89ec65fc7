"""What the maps of a model are given when it runs: a sample of each one's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear_layers import layer_sizes

ROWS = 64
"""Rows that are worth running for inputs."""
MOST = 1024
"""Inputs kept of a map: tokens drawn evenly from all rows."""


@torch.no_grad()
def collect_layer_inputs(model: Any, maps: Mapping[str, nn.Module], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Run a model over rows, one at a time; return for each map `(n, in_features)` on the CPU, n at most `MOST`.

    Maps that were called with one tensor (q, k and v) share one. A map that is not called, or is given something else
    than the row's hidden states (an expert), is left out.

    Args:
        model: it is run as it is, in its mode.
        maps: linear maps in it, by any name.
        rows: token ids, of one sequence each.
    """
    kept: dict[str, list[Tensor]] = {n: [] for n in maps}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    given: Tensor | None = None
    sample = torch.zeros(0)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal given, sample
            if arguments[0] is not given:
                given = arguments[0]
                flat = given.reshape(-1, layer_sizes(module)[0])
                sample = flat[drawn].cpu() if len(flat) == length else flat[:0].cpu()
            kept[name].append(sample)

        return hook

    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in maps.items()]
    try:
        for row in rows:
            length = len(row)
            drawn = torch.randperm(length, generator=generator)[: max(1, MOST // len(rows))].to(device)
            model(input_ids=torch.tensor([list(row)], device=device), use_cache=False, logits_to_keep=1)
            given = None
    finally:
        for hook in hooks:
            hook.remove()
    joined: dict[tuple[int, ...], Tensor] = {}
    found = {}
    for name, samples in kept.items():
        same = tuple(map(id, samples))
        if sum(map(len, samples)):
            found[name] = joined[same] if same in joined else joined.setdefault(same, torch.cat(samples))
    return found


def second_moment(inputs: Tensor, damping: float) -> Tensor:
    """Return (1/n) XᵀX + λ I of inputs X `(n, in)`, fp64; λ is `damping` times the mean of the diagonal.

    λ makes it definite, and stands for what a sample does not show.
    """
    x = inputs.double()
    found = x.t() @ x / len(x)
    found.diagonal().add_(damping * found.diagonal().mean() + 1e-12)
    return found
