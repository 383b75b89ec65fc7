"""LoKr's adapter modules."""

import math

import torch
from torch import Tensor

from ...core.adapters.adapter_module import AdapterSite
from ..loha.loha_modules import ConvLycorisMixin, LycorisModuleBase, compute_flat_conv_kernel
from .lokr_config import LoKrConfig


class LinearLoKr(LycorisModuleBase):
    """`y + s · (W1 ⊗ W2) x` for a linear layer."""

    def __init__(self, site: AdapterSite, config: LoKrConfig) -> None:
        super().__init__(site, config, rescale=config.rank_dropout_scale)
        kernel: tuple[int, ...] = site.module.kernel_size if site.kind == "conv" else ()  # type: ignore[assignment]
        m, n = factorize_size(site.in_features // math.prod(kernel), config.decompose_factor)
        p, q = factorize_size(site.out_features, config.decompose_factor)
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

    def get_no_op_values(self, site: AdapterSite) -> dict[str, float]:
        return {self.w1_names[0]: 0.0}

    def compute_change(self, dtype: torch.dtype) -> Tensor:
        """Return `s · W1 ⊗ W2`."""
        w2 = self.get_factors(self.w2_names, dtype)
        if len(w2) == 3:
            w2 = [compute_flat_conv_kernel(w2[2], w2[0], w2[1])]
        w1, W2 = self._get_scaled_w1(dtype), w2[0] @ w2[1] if len(w2) == 2 else w2[0]
        # Of a W2 (q, n, k) PEFT multiplies the last two dimensions by W1, so a Conv1d's weight has another order.
        return (
            torch.kron(w1, W2).reshape(w1.shape[0] * W2.shape[0], -1)
            if W2.dim() == 3
            else torch.kron(w1, W2.flatten(1))
        )


class ConvLoKr(LinearLoKr, ConvLycorisMixin):
    """`y + s · (W1 ⊗ W2) ∗ x` for a convolution."""


def _times(W: Tensor, X: Tensor) -> Tensor:
    """Return `W X` for each X of a batch `(t, m, n)`, W `(p, m)`."""
    return torch.einsum("pm,tmn->tpn", W, X)


def _times_transposed(X: Tensor, W: Tensor) -> Tensor:
    """Return `X W^T` for each X of a batch `(t, m, n)`, W `(q, n)`."""
    # matmul flattens the batch or not depending on what requires a gradient, and rounds differently: flatten always.
    return (X.reshape(-1, X.shape[-1]) @ W.t()).unflatten(0, X.shape[:2])


def factorize_size(size: int, preferred: int = -1) -> tuple[int, int]:
    """Return factors of `size`: `preferred` first where it divides, else the largest up to `preferred` and √size."""
    if preferred > 0 and size % preferred == 0:
        return preferred, size // preferred
    limit = math.isqrt(size) if preferred == -1 else min(preferred, math.isqrt(size))
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first
