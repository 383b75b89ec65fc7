"""AdamW for weights in 16 bits that all train: a copy of each in fp32, its master, takes the steps.

    m ← AdamW(m, g)        fp32: master, both moments; the gradient is widened one tensor at a time
    w ← round(m)           the weight that computes, in bf16

A step of 1e-5 on a weight of 1 is below what bf16 tells apart (2⁻⁸): without the master it would be lost. A weight held
in fp32 is its own master. Bytes a value of a 16-bit weight: 2 + 2 (gradient) + 4 + 8. Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw


class MasterAdamW(Optimizer):
    """AdamW with fp32 masters of 16-bit weights.

    Args:
        params: parameters, or groups of them, as every optimizer of torch takes them.
        lr: the learning rate.
        betas: decay of the two moments.
        eps: added to the divisor.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] or self._begun(p)
                master = state.get("master", p)
                adamw(
                    [master],
                    [p.grad.to(master.dtype)],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                if master is not p:
                    p.copy_(master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; torch's own way would round the masters to their weights' dtype."""
        super().load_state_dict(state_dict)
        every = [p for group in self.param_groups for p in group["params"]]
        for i, values in state_dict["state"].items():
            self.state[every[i]] = {k: v.to(every[i].device, copy=True) for k, v in values.items()}

    def _begun(self, p: Tensor) -> dict[str, Tensor]:
        half = p.dtype in (torch.float16, torch.bfloat16)
        wide = p.detach().float() if half else p
        zeros = {k: torch.zeros_like(wide, requires_grad=False) for k in ("exp_avg", "exp_avg_sq")}
        self.state[p] = {"step": torch.zeros((), device=p.device), **zeros, **({"master": wide} if half else {})}
        return self.state[p]
