"""Optimizer steps of bf16 weights whose results are rounded up or down at random, so that no step is lost on average.

    P(up) = (w - down) / (up - down)         w: what the step computes in fp32; down, up: w's neighbours in bf16

A step of 1e-5 on a weight of 1 is less than half of what bf16 can represent, and rounding to the nearest value would
drop it each time. The expectation of what is stored here is w. torchao's optimizers call it `bf16_stochastic_round`.

The optimizer itself stays what it is. It steps one tensor at a time, on an fp32 copy of the tensor and its gradient, so
that its states are those of fp32 weights. The random numbers are torch's own, which every checkpoint contains.

Paper: Zamirai et al. 2020, "Revisiting BFloat16 Training", https://arxiv.org/abs/2010.06192.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

CHUNK = 1 << 20
"""Values that are rounded at once; more are slower on a CPU, whose caches they leave."""


def round_steps_stochastically(optimizer: Optimizer) -> Optimizer:
    """Let an optimizer round the bf16 parameters that it steps stochastically; return it, of another class."""
    base: Any = type(optimizer)
    optimizer.__class__ = _make_rounding_class(base)
    return optimizer


@cache
def _make_rounding_class(base: Any) -> type[Optimizer]:
    """Return the subclass of an optimizer's class that rounds stochastically; it has the name of `base`."""

    @torch.no_grad()
    def step(self: Any, closure: Callable[[], Any] | None = None) -> None:
        del closure
        groups = self.param_groups
        try:
            for group in groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.param_groups = [group]
                        _step_one(self, base.step, group, p)
        finally:
            self.param_groups = groups

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        base.load_state_dict(self, state_dict)
        # PyTorch casts what it loads to the parameters' dtype; these states belong to fp32 copies of them.
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            p = parameters[index]
            wide = {n: v.to(p.device) for n, v in state.items() if n != "step" and isinstance(v, Tensor)}
            self.state[p].update(wide)

    return type(base.__name__, (base,), {"step": step, "load_state_dict": load_state_dict, "__module__": __name__})


def _step_one(optimizer: Any, step: Callable[[Any], Any], group: dict[str, Any], p: nn.Parameter) -> None:
    """Step one parameter of a group, in fp32 and rounded if it is in bf16."""
    wide = p
    if p.dtype == torch.bfloat16:
        wide = nn.Parameter(p.float())
        wide.grad = p.grad.float()  # type: ignore[union-attr]
        optimizer.state[wide] = optimizer.state[p]  # the same dictionary: what is written there stays
    optimizer.param_groups = [{**group, "params": [wide]}]
    try:
        step(optimizer)
    finally:
        if wide is not p:
            del optimizer.state[wide]
    if wide is not p:
        store_rounded_stochastically(wide.data, p.data)


def store_rounded_stochastically(values: Tensor, into: Tensor) -> None:
    """Round contiguous fp32 values to bf16 at random and store them; the values are overwritten.

    Args:
        values: fp32, contiguous.
        into: bf16, of the same shape.
    """
    # The 16 bits that bf16 lacks are the share of the way to the next value. A random number of 16 bits carries into
    # the bits that are kept as often as that share says.
    for part in values.view(-1).split(CHUNK):
        noise = torch.randint(-(1 << 15), 1 << 15, part.shape, dtype=torch.int16, device=part.device)
        part.view(torch.int32).add_(noise).add_(1 << 15).bitwise_and_(-(1 << 16))
    into.copy_(values)
