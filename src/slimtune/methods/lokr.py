"""LoKr: y = W x + b + s · (W1 ⊗ W2) x, a Kronecker product.

W1 (p, m), W2 (q, n), p·q = out, m·n = in, each pair as near to a square as the sizes (or `decompose_factor`) allow;
s = alpha / r. A matrix that is large beside r is a product of two: W2 = W2a (q, r) W2b (r, n), and with
`decompose_both` W1 = W1a (p, r) W1b (r, m). W1 starts at zero, so the model starts unchanged. Parameters added per
layer: p·m + r·(q + n), or fewer. Merged: W + s · W1 ⊗ W2.

The product is never formed to run: with x laid out as X (m, n), (W1 ⊗ W2) x is W1 X W2^T (p, q).

Papers: LyCORIS https://arxiv.org/abs/2309.14859, FedPara https://arxiv.org/abs/2108.06098. File format: PEFT's
`lokr_w1`, `lokr_w2`, or `lokr_w1_a`, `lokr_w1_b`, `lokr_w2_a`, `lokr_w2_b`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterModule, Site
from ..adapters.config import PatternedConfig
from ..kernels.dropout import output_dropout_mask


@dataclass
class LoKrConfig(PatternedConfig):
    """LoKr: a Kronecker product beside frozen linear maps; PEFT's names and defaults.

    Args:
        r: rank, 1 and up, of the factors that are large enough to be products themselves.
        alpha: scale numerator, above 0; the update is scaled by alpha / r.
        rank_dropout: probability in [0, 1) of dropping an output of the update while training, the same for all rows.
        module_dropout: probability in [0, 1) of leaving out a layer's whole update for one step.
        decompose_both: make W1 a product, too, where r is below half its larger side.
        decompose_factor: most rows and columns of W1, 1 and up; -1: as near to a square as the layer's sizes allow.
        rank_dropout_scale: scale what `rank_dropout` leaves, so that its mean stays.
        init_weights: True: Kaiming-uniform, W1 zero; "lycoris": W2 zero instead; False: all random, for tests.
    """

    name: ClassVar[str] = "lokr"
    learning_rate: ClassVar[float] = 3e-3
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
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def check(self) -> None:
        """Check ranges: ranks and the factor of 1 and up, probabilities in [0, 1), a known start."""
        super().check()
        self.require_share("rank_dropout")
        self.require_share("module_dropout")
        factor = self.decompose_factor
        self.require(factor == -1 or factor > 0, "decompose_factor", "-1, or a whole number, 1 and up")
        self.require(self.init_weights in (True, False, "lycoris"), "init_weights", "True, 'lycoris' or False")

    def build(self, site: Site) -> AdapterModule:
        """Return the delta at `site`, with the layer's own rank and alpha."""
        r, alpha = self.rank_of(site.name), self.alpha_of(site.name)
        return LinearLoKr(site, r, alpha / r, self)


class LinearLoKr(AdapterModule):
    """`y + s · (W1 ⊗ W2) x` for a linear map."""

    lokr_w1: nn.Parameter
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter

    def __init__(self, site: Site, r: int, scale: float, config: LoKrConfig) -> None:
        super().__init__()
        self.scale, self.rank_dropout, self.module_dropout = scale, config.rank_dropout, config.module_dropout
        self.rescale = config.rank_dropout_scale
        m, n = factorized(site.in_features, config.decompose_factor)
        p, q = factorized(site.out_features, config.decompose_factor)
        self.shape = (p, q, m, n)
        w1 = self._make("lokr_w1", (p, m), r, site, whole=not config.decompose_both or r >= max(p, m) / 2)
        w2 = self._make("lokr_w2", (q, n), r, site, whole=r >= max(q, n) / 2)
        # Filled in PEFT's order, so that one seed gives the same adapter in both. True: W1, or W1a, is zero;
        # "lycoris": W2, or W2b.
        zero = {True: w1[0], "lycoris": w2[-1], False: None}[config.init_weights]
        for part in (*w1, *w2):
            if part is zero:
                nn.init.zeros_(part)
            else:
                nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        self.to(site.device, site.dtype)

    def _make(self, name: str, size: tuple[int, int], r: int, site: Site, *, whole: bool) -> list[nn.Parameter]:
        """Register a matrix under its name, or as the product `name_a (rows, r) name_b (r, columns)`."""
        rows, columns = size
        parts = {name: size} if whole else {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
        for part, shape in parts.items():
            self.register_parameter(part, nn.Parameter(torch.empty(shape, device=site.init_device)))
        return [getattr(self, part) for part in parts]

    def _first(self, dtype: torch.dtype) -> Tensor:
        """Return `s · W1 (p, m)`."""
        if "lokr_w1" in self._parameters:
            return self.lokr_w1.to(dtype) * self.scale
        return self.lokr_w1_a.to(dtype) @ self.lokr_w1_b.to(dtype) * self.scale

    def _second(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return W2 `(q, n)` as the matrices whose product it is."""
        names = ("lokr_w2",) if "lokr_w2" in self._parameters else ("lokr_w2_a", "lokr_w2_b")
        return tuple(getattr(self, name).to(dtype) for name in names)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)`, `y (..., out)` to `(..., out)`."""
        if self.training and self.module_dropout and torch.rand(1).item() <= self.module_dropout:
            return y
        p, q, m, n = self.shape
        first, second = self._first(x.dtype), self._second(x.dtype)
        X = x.reshape(-1, m, n)
        # W1 comes where the layout in between is smallest: at rank r, or before a W2 that makes more than it takes.
        if len(second) == 2:
            a, b = second
            update = _right(_left(first, _right(X, b)), a)
        elif p * n < m * q:
            update = _right(_left(first, X), second[0])
        else:
            update = _left(first, _right(X, second[0]))
        update = update.reshape(y.shape)
        if self.training and self.rank_dropout:
            update = update * output_dropout_mask(update.shape[-1], self.rank_dropout, rescale=self.rescale).to(update)
        return y + update

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · W1 ⊗ W2` and the bias as it is."""
        second = self._second(weight.dtype)
        return weight + torch.kron(self._first(weight.dtype), second[0] @ second[1] if second[1:] else second[0]), bias


def _left(W: Tensor, X: Tensor) -> Tensor:
    """Return `W X` for each X `(t, m, n)`, W `(p, m)`, as one product."""
    return torch.einsum("pm,tmn->tpn", W, X)


def _right(X: Tensor, W: Tensor) -> Tensor:
    """Return `X W^T` for each X `(t, m, n)`, W `(q, n)`, as one product."""
    # Laid flat here: whether matmul does so by itself, and so how it rounds, hangs on what requires a gradient.
    return (X.reshape(-1, X.shape[-1]) @ W.t()).unflatten(0, X.shape[:2])


def factorized(size: int, most: int = -1) -> tuple[int, int]:
    """Return two factors of `size`: `most` first where it is one, else the largest up to `most` and √size."""
    if most > 0 and size % most == 0:
        return most, size // most
    limit = math.isqrt(size) if most == -1 else min(most, math.isqrt(size))
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first
