"""LoKr: y = W x + b + s · (W1 ⊗ W2) x, a Kronecker product.

W1 (p, m), W2 (q, n), p·q = out, m·n = in, each pair as near to a square as the sizes (or `decompose_factor`) allow;
s = alpha / r. A matrix that is large beside r is a product of two: W2 = W2a (q, r) W2b (r, n), and with
`decompose_both` W1 = W1a (p, r) W1b (r, m). W1 starts at zero, so the model starts unchanged. Parameters added per
layer: p·m + r·(q + n), or fewer. Merged: W + s · W1 ⊗ W2.

The forward pass never builds the product: with x reshaped to X (m, n), (W1 ⊗ W2) x is W1 X W2^T (p, q).

Papers: LyCORIS https://arxiv.org/abs/2309.14859, FedPara https://arxiv.org/abs/2108.06098. File format: PEFT's
`lokr_w1`, `lokr_w2`, or `lokr_w1_a`, `lokr_w1_b`, `lokr_w2_a`, `lokr_w2_b`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterModule, Site
from ..adapters.config_fields import setting
from .loha import LycorisFields, LycorisModule


@dataclass
class LoKrConfig(LycorisFields):
    """LoKr: a Kronecker product beside frozen linear layers; PEFT's field names and defaults."""

    name: ClassVar[str] = "lokr"
    learning_rate: ClassVar[float] = 3e-3

    decompose_both: bool = setting(False, "make W1 a product too, where r is below half its larger side")
    decompose_factor: int = setting(
        -1, "largest number of rows and columns of W1; -1: as near to a square as the layer's sizes allow", ge=-1
    )
    rank_dropout_scale: bool = setting(False, "rescale the outputs that rank_dropout leaves, so that their mean stays")
    init_weights: bool | Literal["lycoris"] = setting(
        True, 'True: Kaiming-uniform, W1 zero; "lycoris": W2 zero instead; False: all random, for tests'
    )

    def check(self) -> None:
        """Check that the factor is not 0."""
        super().check()
        self.require(self.decompose_factor != 0, "decompose_factor", "-1, or at least 1")

    def build(self, site: Site) -> AdapterModule:
        """Return the adapter module at `site`, with the layer's own rank and alpha."""
        r = self.get_rank(site.name)
        return LinearLoKr(site, r, self.get_alpha(site.name) / r, self)


class LinearLoKr(LycorisModule):
    """`y + s · (W1 ⊗ W2) x` for a linear layer."""

    lokr_w1: nn.Parameter
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter

    def __init__(self, site: Site, r: int, scale: float, config: LoKrConfig) -> None:
        super().__init__(scale, config, rescale=config.rank_dropout_scale)
        m, n = factorize(site.in_features, config.decompose_factor)
        p, q = factorize(site.out_features, config.decompose_factor)
        self.shape = (p, q, m, n)
        w1 = self._register("lokr_w1", (p, m), r, site, whole=not config.decompose_both or r >= max(p, m) / 2)
        w2 = self._register("lokr_w2", (q, n), r, site, whole=r >= max(q, n) / 2)
        # In PEFT's order: one seed gives the same adapter in both libraries.
        zero = {True: w1[0], "lycoris": w2[-1], False: None}[config.init_weights]
        for factor in (*w1, *w2):
            if factor is zero:
                nn.init.zeros_(factor)
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.to(site.device, site.dtype)

    def _register(self, name: str, size: tuple[int, int], r: int, site: Site, *, whole: bool) -> list[nn.Parameter]:
        """Register a matrix under its name, or as the product `name_a (rows, r) name_b (r, columns)`."""
        rows, columns = size
        shapes = {name: size} if whole else {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
        for part, shape in shapes.items():
            self.register_parameter(part, nn.Parameter(torch.empty(shape, device=site.init_device)))
        return [getattr(self, part) for part in shapes]

    def _scaled_w1(self, dtype: torch.dtype) -> Tensor:
        """Return `s · W1 (p, m)`."""
        if "lokr_w1" in self._parameters:
            return self.lokr_w1.to(dtype) * self.scale
        return self.lokr_w1_a.to(dtype) @ self.lokr_w1_b.to(dtype) * self.scale

    def _w2_factors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return W2 `(q, n)` as the one or two matrices whose product it is."""
        names = ("lokr_w2",) if "lokr_w2" in self._parameters else ("lokr_w2_a", "lokr_w2_b")
        return tuple(getattr(self, name).to(dtype) for name in names)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)`, `y (..., out)` to `(..., out)`."""
        if self.draw_module_dropout():
            return y
        p, q, m, n = self.shape
        w1, w2 = self._scaled_w1(x.dtype), self._w2_factors(x.dtype)
        X = x.reshape(-1, m, n)
        # W1 is applied where the intermediate result is smallest: at rank r, or before a W2 that widens.
        if len(w2) == 2:
            a, b = w2
            update = _times_transposed(_times(w1, _times_transposed(X, b)), a)
        elif p * n < m * q:
            update = _times_transposed(_times(w1, X), w2[0])
        else:
            update = _times(w1, _times_transposed(X, w2[0]))
        return y + self.drop_outputs(update.reshape(y.shape))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · W1 ⊗ W2` and the unchanged bias."""
        w2 = self._w2_factors(weight.dtype)
        return weight + torch.kron(self._scaled_w1(weight.dtype), w2[0] @ w2[1] if len(w2) == 2 else w2[0]), bias


def _times(W: Tensor, X: Tensor) -> Tensor:
    """Return `W X` for each X of a batch `(t, m, n)`, W `(p, m)`."""
    return torch.einsum("pm,tmn->tpn", W, X)


def _times_transposed(X: Tensor, W: Tensor) -> Tensor:
    """Return `X W^T` for each X of a batch `(t, m, n)`, W `(q, n)`."""
    # matmul flattens the batch or not depending on what requires a gradient, and rounds differently: flatten always.
    return (X.reshape(-1, X.shape[-1]) @ W.t()).unflatten(0, X.shape[:2])


def factorize(size: int, most: int = -1) -> tuple[int, int]:
    """Return two factors of `size`: `most` first where it divides, else the largest factor up to `most` and √size."""
    if most > 0 and size % most == 0:
        return most, size // most
    limit = math.isqrt(size) if most == -1 else min(most, math.isqrt(size))
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first
