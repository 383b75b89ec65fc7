"""AdamW with its two states in 8 bits: bitsandbytes' own, and in a plan what takes its memory and computes nothing.

    state1, state2   one byte a value, a scale in fp32 for every 256 of them; fp32 for tensors below 4096 values
    a step           each tensor by itself: on a GPU in place, on a CPU its states, gradient and divisor in fp32

Read from bitsandbytes 0.50: optim/optimizer.py and backends/cpu/ops.py. Paper: https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from ..utils.simulated_device import device_type

BLOCK, SMALLEST = 256, 4096


def theirs() -> type[Optimizer]:
    """Return bitsandbytes' class."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def adamw_8bit(groups: Sequence[dict[str, Any]], **settings: Any) -> Optimizer:
    """Return bitsandbytes' AdamW8bit for parameter groups; `FakeAdamW8bit` if the parameters are fake tensors."""
    fake = any(isinstance(p, FakeTensor) for group in groups for p in group["params"])
    optimizer: Any = FakeAdamW8bit if fake else theirs()
    return optimizer(groups, **settings)


class FakeAdamW8bit(Optimizer):
    """Holds and takes what AdamW8bit does, of tensors without values.

    Args:
        parameters: fake ones.
        lr: taken, and moot.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})
        self.maps: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take what a step takes."""
        del closure
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                self._begin(parameter, state)
            if device_type(parameter.device) != "cuda":
                _take(parameter, state)

    def _begin(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        small = p.numel() < SMALLEST
        dtype = torch.float32 if small else torch.uint8
        state["step"] = 0
        state["state1"], state["state2"] = torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype)
        if small:
            return
        if self.maps is None:  # what the bytes mean: one table for all tensors
            self.maps = (p.new_empty(BLOCK, dtype=torch.float32), p.new_empty(BLOCK, dtype=torch.float32))
        state["qmap1"], state["qmap2"] = self.maps
        for name in ("absmax1", "absmax2"):
            state[name] = p.new_zeros(-(-p.numel() // BLOCK), dtype=torch.float32)


def _take(p: torch.Tensor, state: dict[str, Any]) -> None:
    """Take what the kernel of a CPU takes for one tensor: it is written in tensor operations."""
    wide = state["state1"].dtype == torch.uint8
    # Held until the end, as they are there.
    first = torch.empty_like(p, dtype=torch.float32) if wide else state["state1"]
    second = torch.empty_like(p, dtype=torch.float32) if wide else state["state2"]
    gradient, values = p.grad.float() * 1.0, p.float()  # type: ignore[union-attr]
    divisor = (second.sqrt() / 1.0).add_(1e-8)
    values.addcdiv_(first, divisor)
    del gradient
