"""AdamW whose two states are held in 8 bits: bitsandbytes', and a stand-in for plans that allocates what it does.

    state1, state2   one byte per value and an fp32 scale per 256 values; fp32 for tensors below 4096 values
    a step           one tensor at a time: in place on a GPU; with fp32 states, gradient and divisor on a CPU

As in bitsandbytes 0.50: optim/optimizer.py and backends/cpu/ops.py. Paper: https://arxiv.org/abs/2110.02861.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from ..core.foundation.device import get_real_or_simulated_device_type

BLOCK_SIZE, MIN_8BIT_VALUES = 256, 4096


def build_adamw_8bit(groups: Sequence[dict[str, Any]], **settings: Any) -> Optimizer:
    """Return bitsandbytes' AdamW8bit for parameter groups; `_FakeAdamW8bit` if the parameters are fake tensors."""
    if any(isinstance(p, FakeTensor) for group in groups for p in group["params"]):
        return _FakeAdamW8bit(groups, settings)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


class _FakeAdamW8bit(Optimizer):
    """Allocates the memory that AdamW8bit does, for parameters without values."""

    quantization_maps: list[torch.Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                self._allocate_state(p, state)
            if get_real_or_simulated_device_type(p.device) == "cuda":
                continue
            # bitsandbytes' CPU step is written in tensor operations, and keeps these tensors until its end.
            quantized = state["state1"].dtype == torch.uint8
            first, second = (
                torch.empty_like(p, dtype=torch.float32) if quantized else state[name] for name in ("state1", "state2")
            )
            gradient, values = p.grad.float() * 1.0, p.float()
            divisor = (second.sqrt() / 1.0).add_(1e-8)
            values.addcdiv_(first, divisor)
            del gradient, values, divisor, first, second

    def _allocate_state(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        small = p.numel() < MIN_8BIT_VALUES
        dtype = torch.float32 if small else torch.uint8
        state |= {"step": 0, "state1": torch.zeros_like(p, dtype=dtype), "state2": torch.zeros_like(p, dtype=dtype)}
        if small:
            return
        if self.quantization_maps is None:  # one table for all tensors
            self.quantization_maps = [p.new_empty(BLOCK_SIZE, dtype=torch.float32) for _ in range(2)]
        state["qmap1"], state["qmap2"] = self.quantization_maps
        for name in ("absmax1", "absmax2"):
            state[name] = p.new_zeros(-(-p.numel() // BLOCK_SIZE), dtype=torch.float32)
