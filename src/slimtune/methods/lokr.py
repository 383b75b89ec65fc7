"""LoKr: y = W x + b + s · (W1 ⊗ W2) x, a Kronecker product.

W1 (p, m), W2 (q, n), p·q = out, m·n = in, each pair as near to a square as the sizes (or `decompose_factor`) allow;
s = alpha / r. A matrix that is large beside r is a product of two: W2 = W2a (q, r) W2b (r, n), and with
`decompose_both` W1 = W1a (p, r) W1b (r, m). W1 starts at zero, so the model starts unchanged. Parameters added per
layer: p·m + r·(q + n), or fewer. Merged: W + s · W1 ⊗ W2.

At a convolution the factors of `in` are those of in / groups, and W2 (q, n · kernel size) is stored with its kernel, or
as W2a (q, r) W2b (r, n · kernel size), or with `use_effective_conv2d` as in `loha.py`: T2, W2a (r, q), W2b (r, n).

At a linear layer the forward pass never builds the product: with x reshaped to X (m, n), (W1 ⊗ W2) x is W1 X W2^T
(p, q).

Papers: LyCORIS https://arxiv.org/abs/2309.14859, FedPara https://arxiv.org/abs/2108.06098. File format: PEFT's
`lokr_w1`, `lokr_w2`, or `lokr_w1_a`, `lokr_w1_b`, `lokr_w2_a`, `lokr_w2_b`, `lokr_t2`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.adapters.adapter_module import AdapterModule, Site
from ..core.adapters.peft_config import setting
from .loha import ConvLycoris, LycorisConfig, LycorisModule, rebuild_kernel


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr: a Kronecker product beside frozen layers; PEFT's field names and defaults."""

    name: ClassVar = "lokr"
    prefix: ClassVar = "lokr_"
    learning_rate: ClassVar = 3e-3

    decompose_both: bool = setting(False, "make W1 a product too, where r is below half its larger side")
    decompose_factor: int = setting(-1, "largest size of W1; -1: as near to a square as the layer allows", ge=-1)
    rank_dropout_scale: bool = setting(False, "rescale the outputs that rank_dropout leaves, so that their mean stays")
    init_weights: bool | Literal["lycoris"] = setting(True, 'W1 starts at zero; "lycoris": W2; False: none, for tests')

    def check(self) -> None:
        super().check()
        self.require(self.decompose_factor != 0, "decompose_factor", "-1, or at least 1")

    def build(self, site: Site) -> AdapterModule:
        return (ConvLoKr if site.kind == "conv" else LinearLoKr)(site, self)


class LinearLoKr(LycorisModule):
    """`y + s · (W1 ⊗ W2) x` for a linear layer."""

    def __init__(self, site: Site, config: LoKrConfig) -> None:
        super().__init__(site, config, rescale=config.rank_dropout_scale)
        kernel: tuple[int, ...] = site.module.kernel_size if site.kind == "conv" else ()  # type: ignore[assignment]
        m, n = factorize(site.in_features // math.prod(kernel), config.decompose_factor)
        p, q = factorize(site.out_features, config.decompose_factor)
        self.shape = (p, q, m, n)
        w1 = {"lokr_w1": (p, m)}
        if config.decompose_both and self.r < max(p, m) / 2:
            w1 = {"lokr_w1_a": (p, self.r), "lokr_w1_b": (self.r, m)}
        w2: dict[str, tuple[int, ...]] = {"lokr_w2": (q, n, *kernel)}
        if self.r < max(q, n) / 2:
            w2 = {"lokr_w2_a": (q, self.r), "lokr_w2_b": (self.r, n * math.prod(kernel))}
            if effective := config.effective_kernel(site):
                w2 = {"lokr_w2_a": (self.r, q), "lokr_w2_b": (self.r, n), "lokr_t2": (self.r, self.r, *effective)}
        self.w1_names, self.w2_names = tuple(w1), tuple(w2)
        zero = {True: self.w1_names[0], "lycoris": self.w2_names[:2][-1], False: None}[config.init_weights]
        self.add_factors(site, w1 | w2, zero)

    def _get_scaled_w1(self, dtype: torch.dtype) -> Tensor:
        """Return `s · W1 (p, m)`."""
        w1 = self.get_factors(self.w1_names, dtype)
        return (w1[0] @ w1[1] if len(w1) == 2 else w1[0]) * self.scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.draw_module_dropout():
            return y
        p, q, m, n = self.shape
        w1, w2 = self._get_scaled_w1(x.dtype), self.get_factors(self.w2_names, x.dtype)
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

    def neutral_values(self, site: Site) -> dict[str, float]:
        return {self.w1_names[0]: 0.0}

    def compute_change(self, dtype: torch.dtype) -> Tensor:
        """Return `s · W1 ⊗ W2`."""
        w2 = self.get_factors(self.w2_names, dtype)
        if len(w2) == 3:
            w2 = [rebuild_kernel(w2[2], w2[0], w2[1])]
        w1, W2 = self._get_scaled_w1(dtype), w2[0] @ w2[1] if len(w2) == 2 else w2[0]
        # Of a W2 (q, n, k) PEFT multiplies the last two dimensions by W1, so a Conv1d's weight has another order.
        return (
            torch.kron(w1, W2).reshape(w1.shape[0] * W2.shape[0], -1)
            if W2.dim() == 3
            else torch.kron(w1, W2.flatten(1))
        )


class ConvLoKr(LinearLoKr, ConvLycoris):
    """`y + s · (W1 ⊗ W2) ∗ x` for a convolution."""


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
