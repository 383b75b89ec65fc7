"""The optimizers of a run: AdamW, or AdamW with 8-bit states, in groups by learning rate and weight decay.

lr of a group       the run's learning rate times the factor its method gives (LoRA+: B learns faster than A)
decay of a group    weight_decay, but 0 for biases and for the weights of normalisation layers

8-bit states are bitsandbytes'; plans have a stand-in that only allocates what it allocates:

    state1, state2   one byte per value and an fp32 scale per 256 values; fp32 for tensors below 4096 values
    a step           one tensor at a time: in place on a GPU; with fp32 states, gradient and divisor on a CPU

As in bitsandbytes 0.50: optim/optimizer.py and backends/cpu/ops.py. Paper: https://arxiv.org/abs/2110.02861.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from ..foundation.device import get_real_or_simulated_device_type

BLOCK_SIZE, MIN_8BIT_VALUES = 256, 4096


def _build_adamw_8bit(groups: Sequence[dict[str, Any]], **settings: Any) -> Optimizer:
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


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamw-8bit": (_build_adamw_8bit, {}),
}
"""PyTorch's default instead of `fused`, `foreach`, takes temporary tensors of all parameters at once."""
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of the parameter names that transformers' Trainer excludes from weight decay."""


def build_optimizer(model: Any, name: str = "adamw", *, lr: float = 1e-4, weight_decay: float = 0.0) -> Optimizer:
    """Return the optimizer of a model's trained parameters, real or fake; `name` is a key of `OPTIMIZERS`."""
    optimizer, options = OPTIMIZERS[name]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    # The first group's rate is the one logged: that of parameters that decay.
    return optimizer(parameter_groups(model, lr, weight_decay, decayed), lr=lr, **options)


def parameter_groups(
    model: Any, lr: float, weight_decay: float = 0.0, decayed: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups; each group's `lr` is multiplied by its method's factor.

    `decayed` has the names of the parameters that decay. None: matrices do, and biases, magnitudes and other vectors
    do not. Groups that decay come first.
    """
    multipliers: dict[int, float] = {}
    for adapter in getattr(model, "peft_config", ()):
        for module in model.adapter_modules(adapter).values():
            own = module.lr_multipliers()
            multipliers |= {id(p): own[n] for n, p in module.named_parameters() if n in own}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.dim() > 1 if decayed is None else name in decayed
            groups.setdefault((decays, multipliers.get(id(p), 1.0)), []).append(p)
    return [
        {"params": params, "lr": lr * multiplier, "weight_decay": weight_decay if decays else 0.0}
        for (decays, multiplier), params in sorted(groups.items(), key=lambda item: not item[0][0])
    ]
