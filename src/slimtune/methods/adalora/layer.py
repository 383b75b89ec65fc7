"""AdaLoRA at one layer: what it adds, the scores of its ranks, and the ranks that are left, in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import AdapterModule, BaseForward, Site
from ...kernels.dropout import active_dropout_p, dropout
from ...kernels.low_rank import add_low_rank

_NAMES = ("lora_A", "lora_E", "lora_B")


class LinearAdaLora(AdapterModule):
    """`y + s · B diag(E) A dropout(x)` for a linear map.

    Beside its parameters: `left`, which ranks the last allocation left (None: all), and `averages`, the smoothed
    sensitivity and deviation of each parameter's values.
    """

    def __init__(self, site: Site, config: Any, r: int) -> None:
        super().__init__()
        # As PEFT divides; the ranks a layer starts with, not those it is left with.
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.config, self.at = config, f"{site.name}.lora_E"
        self.lora_dropout = dropout(config.lora_dropout)
        # Drawn in PEFT's order, so that one seed gives the same adapter in both.
        self.lora_A = nn.Parameter(torch.randn(r, site.in_features, device=site.init_device))
        self.lora_E = nn.Parameter(torch.randn(r, 1, device=site.init_device))
        self.lora_B = nn.Parameter(torch.randn(site.out_features, r, device=site.init_device))
        torch.randn(1, device=site.init_device)  # PEFT's count of ranks
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        self.to(site.device, site.dtype)
        self.left: Tensor | None = None
        self.averages: dict[str, Tensor] = {}

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., in)` to `(..., out)`."""
        return frozen.plus_low_rank(x, *self.low_rank_factors(), active_dropout_p(self.lora_dropout))

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(diag(E) A (r, in), B (out, r), scale)`."""
        return self.lora_A * self.lora_E, self.lora_B, self.scale

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · B diag(E) A` and the bias as it is."""
        return add_low_rank(weight, *self.low_rank_factors()), bias

    # --- ranks ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth each value's sensitivity |parameter · gradient| and its deviation from what is expected."""
        for name, p in self.named_parameters():
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            mean = self.averages.setdefault(f"{name}.mean", torch.zeros_like(p))
            spread = self.averages.setdefault(f"{name}.spread", torch.zeros_like(p))
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Return each rank's score `(r)`."""
        a = self.averages
        A, E, B = (a[f"{n}.mean"] * a[f"{n}.spread"] for n in _NAMES)
        return E[:, 0] + (A.mean(1) + B.mean(0))

    @torch.no_grad()
    def drop(self) -> None:
        """Put the ranks that are out to zero."""
        if self.left is not None:
            self.lora_E.masked_fill_(~self.left.to(self.lora_E.device)[:, None], 0)

    def _note(self, left: list[bool]) -> None:
        self.config.rank_pattern = {**(self.config.rank_pattern or {}), self.at: left}

    # --- files: the ranks that are left ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return A, E and B of the ranks that are left."""
        if self.left is None:
            return super().tensors()
        left = self.left.to(self.lora_A.device)
        return {"lora_A": self.lora_A[left], "lora_E": self.lora_E[left], "lora_B": self.lora_B[:, left]}

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Take the file's number of ranks."""
        if not all(n in given and given[n].dim() == 2 for n in ("lora_A", "lora_B")):
            return
        self.left = None
        self.averages.clear()
        rank, most, noted = len(given["lora_A"]), self.config.init_r, (self.config.rank_pattern or {}).get(self.at)
        if rank != len(self.lora_A) and rank <= most:
            self._put({n: given[n] for n in _NAMES if n in given})
        if rank != (most if noted is None else sum(noted)):
            self._note([at < rank for at in range(most)])

    def extra_state(self) -> dict[str, Tensor]:
        """Return what training goes on from beside the file: every rank, which are left, and the averages."""
        own, left, averages = dict(self.named_parameters()), self.left, self.averages
        if self.lora_A.is_meta:
            left = torch.empty(len(self.lora_A), dtype=torch.bool, device="meta")
            averages = {f"{n}.{what}": p for n, p in own.items() for what in ("mean", "spread")}
        return dict(averages) if left is None else {**own, "left": left, **averages}

    def load_extra_state(self, kept: Mapping[str, Tensor]) -> None:
        """Go on from what `extra_state` returned."""
        device = self.lora_A.device
        self._put({n: kept[n] for n in _NAMES if n in kept})
        self.averages = {n: t.to(device) for n, t in kept.items() if n.endswith((".mean", ".spread"))}
        if "left" in kept:
            self.left = kept["left"].to(device)
            self._note(self.left.tolist())

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(value.to(old.device, old.dtype, copy=True), old.requires_grad))


def skewness(P: Tensor) -> Tensor:
    """Return `‖P Pᵀ - I‖` (Frobenius) for `P (r, n)`: 0 where its rows are orthonormal."""
    return torch.linalg.matrix_norm(P @ P.t() - torch.eye(len(P), dtype=P.dtype, device=P.device))
