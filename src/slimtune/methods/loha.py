"""LoHa: y = W x + b + s · ((W1a W1b) ∘ (W2a W2b)) x, an elementwise product of two low-rank matrices.

W1a, W2a (out, r), W1b, W2b (r, in), s = alpha / r. The product has rank up to r², with 2 r (in + out) parameters. W2b
starts at zero, so the model starts unchanged. Merged: W + s · (W1a W1b) ∘ (W2a W2b).

An elementwise product of low-rank matrices is a low-rank matrix: with the r² pairs (k, l) of ranks,

    B[:, kl] = W1a[:, k] ∘ W2a[:, l]    A[kl, :] = W1b[k, :] ∘ W2b[l, :]    (W1a W1b) ∘ (W2a W2b) = B A

so where r² is small beside the layer, it runs, and is handed on, as a LoRA of rank r². Where it is not, the weight is
made in the forward pass and made again in the backward pass.

Papers: FedPara https://arxiv.org/abs/2108.06098, LyCORIS https://arxiv.org/abs/2309.14859. File format: PEFT's
`hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterModule, Site
from ..adapters.config import PatternedConfig
from ..kernels.dropout import output_dropout_mask
from ..kernels.recompute_linear import recompute_linear


@dataclass
class LoHaConfig(PatternedConfig):
    """LoHa: the elementwise product of two low-rank matrices beside frozen linear maps; PEFT's names and defaults.

    Args:
        r: rank of each of the two products, 1 and up; the update has rank up to r².
        alpha: scale numerator, above 0; the update is scaled by alpha / r.
        rank_dropout: probability in [0, 1) of dropping an output of the update while training, the same for all rows.
        module_dropout: probability in [0, 1) of leaving out a layer's whole update for one step.
        init_weights: True: Kaiming-uniform, W2b zero; False: all four random, for tests.
    """

    name: ClassVar[str] = "loha"
    learning_rate: ClassVar[float] = 5e-3
    unsupported_peft_fields: ClassVar[dict[str, Any]] = {"use_effective_conv2d": False}
    short_names: ClassVar[dict[str, str]] = {"rank": "r", "targets": "target_modules"}
    recipe_defaults: ClassVar[dict[str, Any]] = {
        "r": 8,
        "alpha": lambda given: 2 * given["r"],
        "target_modules": "all-linear",
    }

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool = True

    def check(self) -> None:
        """Check ranges: ranks of 1 and up, probabilities in [0, 1)."""
        super().check()
        self.require_share("rank_dropout")
        self.require_share("module_dropout")
        self.require(self.init_weights in (True, False), "init_weights", "True or False")

    def build(self, site: Site) -> AdapterModule:
        """Return the delta at `site`, with the layer's own rank and alpha."""
        r, alpha = self.rank_of(site.name), self.alpha_of(site.name)
        return LinearLoHa(site, r, alpha / r, self)


class LinearLoHa(AdapterModule):
    """`y + s · ((W1a W1b) ∘ (W2a W2b)) x` for a linear map."""

    def __init__(self, site: Site, r: int, scale: float, config: LoHaConfig) -> None:
        super().__init__()
        self.scale, self.rank_dropout, self.module_dropout = scale, config.rank_dropout, config.module_dropout
        out, in_ = site.out_features, site.in_features
        self.low_rank = r * r * (in_ + out) <= in_ * out
        self.hada_w1_a, self.hada_w2_a = (nn.Parameter(torch.empty(out, r, device=site.init_device)) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (nn.Parameter(torch.empty(r, in_, device=site.init_device)) for _ in range(2))
        # Filled in PEFT's order, so that one seed gives the same adapter in both.
        for p in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)
        else:
            nn.init.kaiming_uniform_(self.hada_w2_b, a=math.sqrt(5))
        self.to(site.device, site.dtype)

    def _parts(self, dtype: torch.dtype) -> list[Tensor]:
        return [p.to(dtype) for p in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)`, `y (..., out)` to `(..., out)`."""
        if self.training and self.module_dropout and torch.rand(1).item() <= self.module_dropout:
            return y
        parts = self._parts(x.dtype)
        if self.low_rank:
            A, B = _factors(*parts)
            update = x @ A.t() @ B.t()
        else:
            update = recompute_linear(_product, x, *parts)
        if self.training and self.rank_dropout:
            update = update * output_dropout_mask(update.shape[-1], self.rank_dropout, rescale=True).to(update)
        return torch.add(y, update, alpha=self.scale)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A (r², in), B (out, r²), scale)` where r² is small and nothing is being dropped."""
        if not self.low_rank or (self.training and (self.rank_dropout or self.module_dropout)):
            return None
        return *_factors(*self._parts(self.hada_w1_a.dtype)), self.scale

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · (W1a W1b) ∘ (W2a W2b)` and the bias as it is."""
        return weight + self.scale * _product(*self._parts(weight.dtype)), bias


def _product(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
    return (w1a @ w1b) * (w2a @ w2b)


def _factors(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> tuple[Tensor, Tensor]:
    A = (w1b[:, None] * w2b[None]).flatten(0, 1)
    B = (w1a[:, :, None] * w2a[:, None]).flatten(1)
    return A, B
