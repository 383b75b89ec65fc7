"""An optimizer's step that memory ran out of is done again, exactly: no parameter is stepped twice, none is left out.

The step makes what an optimizer remembers of each parameter and changes group after group, so a failure can leave some
parameters stepped, others counted and not stepped. A fused step does not tell which (it raises no tensor's version), so
a copy of all that a step changes, parameters and moments of what trains, lies in the machine's memory for its length.
Where there is no room for the copy the step is taken without; failing then, it cannot be done again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..utils.memory import is_out_of_memory
from ..utils.simulated_device import host_allocation

Again = Callable[[Callable[[], Any], Callable[[], Any] | None], Any]
"""Does some work; where it fails, it calls its second argument to undo it and does it again; None: it cannot be."""


def retry_optimizer_step(optimizer: torch.optim.Optimizer, again: Again) -> None:
    """Let an optimizer's `step` be done again where it fails half way, in place.

    Args:
        optimizer: any whose state is tensors and plain values by parameter, as torch's are.
        again: calls the step, and calls it again where memory ran out.
    """
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, closure: None = None) -> Any:
        assert closure is None
        copies = _copies(self)
        return again(plain, None if copies is None else copies.put_back)

    # Bound, as torch's schedulers want it: they wrap the function inside.
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


class _Copies:
    """Parameters that have a gradient, and what an optimizer remembers of them, as they are now."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.state = optimizer.state
        self.trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with host_allocation():
            self.values = [_copy(p.detach()) for p in self.trained]
            self.states = [{k: _copy(v) for k, v in self.state.get(p, {}).items()} for p in self.trained]
        self.homes = [{k: _home(v) for k, v in self.state.get(p, {}).items()} for p in self.trained]

    @torch.no_grad()
    def put_back(self) -> None:
        """Put them back; may be called once, since the copies themselves can become the state."""
        for p, value, state, homes in zip(self.trained, self.values, self.states, self.homes, strict=True):
            p.copy_(value)
            self.state.pop(p, None)
            if state:
                self.state[p] = {k: v if homes[k] is None else v.to(homes[k]) for k, v in state.items()}
        self.values, self.states = [], []


def _copies(optimizer: torch.optim.Optimizer) -> _Copies | None:
    try:
        return _Copies(optimizer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _copy(value: Any) -> Any:
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


def _home(value: Any) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None
