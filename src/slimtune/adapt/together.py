"""Adapted linear maps that read one input (q, k and v; gate and up), computed in one step of autograd.

Which maps those are is seen, not known by name: neighbours in a forward pass that were given the very same tensor. From
then on the first of them that is called with an input computes all, and the others find their answer ready, if they are
called with that very input; with another one each computes for itself. So nothing hangs on the order of calls, no
weight is laid together with another, and parameters keep their names. A group whose answers were not all called for is
no group any more.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.low_rank_group import Map, low_rank_linears
from ..ops.maps import multiplies_plainly, weight_of


class Together:
    """What one model's adapted maps know of one another."""

    def __init__(self) -> None:
        self.groups: dict[nn.Module, tuple[Any, ...]] = {}
        """By map: those that read its input, itself among them; alone if there are none."""
        self._neighbours: list[nn.Module] = []
        self._input: weakref.ref[Tensor] | None = None
        self._ready: dict[nn.Module, Tensor] = {}
        self._ready_for: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()  # what was seen in one process or copy says nothing in another

    def answer(self, module: Any, x: Tensor) -> Tensor | None:
        """Return a map's output for `x (..., in)`; None where it has to compute for itself."""
        group = self.groups.get(module)
        if group is None:
            self._look(module, x)
            return None
        if len(group) == 1 or not torch.is_grad_enabled() or _has_its_own_way(x):
            return None
        if module in self._ready and self._ready_for is not None and self._ready_for() is x:
            return self._ready.pop(module)
        self._disband_unasked()
        maps = [_map_of(m, x) for m in group]
        if any(m is None for m in maps):
            return None
        outs = low_rank_linears(x, [m for m in maps if m is not None])
        self._ready = dict(zip(group, outs, strict=True))
        self._ready_for = weakref.ref(x)
        return self._ready.pop(module)

    def forget(self) -> None:
        """Let go of what was seen: adapters came or went."""
        self.groups.clear()
        self._neighbours.clear()
        self._ready.clear()

    def _look(self, module: nn.Module, x: Tensor) -> None:
        if self._input is None or self._input() is not x:
            for m in self._neighbours:
                self.groups[m] = tuple(self._neighbours)
            self._neighbours = []
            self._input = weakref.ref(x)
        self._neighbours.append(module)

    def _disband_unasked(self) -> None:
        for left in self._ready:
            for m in self.groups.get(left, ()):
                self.groups[m] = (m,)
        self._ready.clear()


def _map_of(module: Any, x: Tensor) -> Map | None:
    """Return an adapted module as a plain map with one low-rank update, None where it is more than that now."""
    plain = (
        module._kept is None and multiplies_plainly(type(module).__bases__[1]) and "_old_forward" not in vars(module)
    )
    running = [d for n, d in module.adapters.items() if n in module._running.active]
    if not plain or len(running) != 1 or not running[0].in_one_step:
        return None
    factors, weight = running[0].factors(), weight_of(module)
    if factors is None or weight.requires_grad or weight.device != x.device or weight.dtype != x.dtype:
        return None
    return Map(weight, module.bias, *factors)


def _has_its_own_way(x: Tensor) -> bool:
    # A compiler fuses by itself; autocast chooses dtypes operator by operator.
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
