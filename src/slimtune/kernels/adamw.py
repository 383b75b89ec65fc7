"""AdamW with 8-bit states: bitsandbytes' optimizer, and a stand-in for plans that only allocates what it allocates.

    state1, state2   one byte per value and an fp32 scale per 256 values; fp32 for tensors below 4096 values
    a step           one tensor at a time: in place on a GPU; with fp32 states, gradient and divisor on a CPU

As in bitsandbytes 0.50: optim/optimizer.py and backends/cpu/ops.py. Paper: https://arxiv.org/abs/2110.02861.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from ..utils.device import device_type

BLOCK_SIZE, MIN_8BIT_VALUES = 256, 4096


def adamw_8bit(groups: Sequence[dict[str, Any]], **settings: Any) -> Optimizer:
    """Return bitsandbytes' AdamW8bit for parameter groups; `FakeAdamW8bit` if the parameters are fake tensors."""
    if any(isinstance(p, FakeTensor) for group in groups for p in group["params"]):
        return FakeAdamW8bit(groups, **settings)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


class FakeAdamW8bit(Optimizer):
    """Allocates the memory that AdamW8bit does, for parameters without values.

    Args:
        parameters: fake tensors, or groups of them.
        lr: stored in the groups; has no effect.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})
        self.quantization_maps: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Allocate and free what a step does."""
        del closure
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                self._init_state(parameter, state)
            if device_type(parameter.device) != "cuda":
                _allocate_cpu_step(parameter, state)

    def _init_state(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        small = p.numel() < MIN_8BIT_VALUES
        dtype = torch.float32 if small else torch.uint8
        state["step"] = 0
        state["state1"], state["state2"] = torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype)
        if small:
            return
        if self.quantization_maps is None:  # one table for all tensors
            maps = (p.new_empty(BLOCK_SIZE, dtype=torch.float32) for _ in range(2))
            self.quantization_maps = (next(maps), next(maps))
        state["qmap1"], state["qmap2"] = self.quantization_maps
        for name in ("absmax1", "absmax2"):
            state[name] = p.new_zeros(-(-p.numel() // BLOCK_SIZE), dtype=torch.float32)


def _allocate_cpu_step(p: torch.Tensor, state: dict[str, Any]) -> None:
    """Allocate what bitsandbytes' CPU step does for one tensor; it is written in tensor operations."""
    quantized = state["state1"].dtype == torch.uint8
    # Named variables, since bitsandbytes keeps these tensors until the end of its function.
    first = torch.empty_like(p, dtype=torch.float32) if quantized else state["state1"]
    second = torch.empty_like(p, dtype=torch.float32) if quantized else state["state2"]
    gradient, values = p.grad.float() * 1.0, p.float()  # type: ignore[union-attr]
    divisor = (second.sqrt() / 1.0).add_(1e-8)
    values.addcdiv_(first, divisor)
    del gradient
