"""DoRA: the rows of the adapted weight get a length of their own, m.

    y = c ⊙ (W + s · B A) x + b        c = m / n,  n_i = ‖(W + s · B A)_i‖

m (out) starts as n, so that c is 1 bit for bit and the model starts unchanged. n follows A and B, but no gradient
flows through it (§4.3 of the paper, and PEFT). Nothing of size (out, in) is formed:

    n_i² = ‖W_i‖² + 2s · B_i · (W Aᵀ)_i + s² · B_i (A Aᵀ) B_iᵀ

‖W_i‖² is found once. Computed as y + (c − 1)(y − b) + s · z (c ⊙ B)ᵀ with y = W x + b and z = A x. For the backward
pass z and the output are kept: what comes next mostly keeps that same tensor, and the gradient of m needs no other,

    dL/dm_i = Σ g_i ((W + s · B A) x)_i / n_i = Σ g_i (out_i − b_i) / m_i

With dropout the low-rank part alone sees dropped inputs; PEFT runs the frozen map a second time, on dropped inputs.

Paper: https://arxiv.org/abs/2402.09353. File format: PEFT's, LoRA's keys and `lora_magnitude_vector`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...adapters.base import AdapterModule, BaseForward, Site
from ...kernels.low_rank import add_low_rank
from ...utils.linear_layers import get_weight
from .plain import EmbeddingLora, LinearLora


class _Magnitude(AdapterModule):
    """What both kinds share; beside a class with `low_rank` and `scale`."""

    scale: float
    low_rank: Any

    def _measure(self, site: Site) -> None:
        self._kept: tuple[Any, Tensor] | None = None
        if site.loading:
            lengths = torch.ones(site.out_features, device=site.device, dtype=site.dtype)
        else:
            weight = get_weight(site.module).detach()
            A, B = self.low_rank()
            lengths = row_lengths(self._squares_of(site.module, weight), weight, A, B, self.scale)
        self.lora_magnitude_vector = nn.Parameter(lengths.to(site.dtype))

    def _squares_of(self, module: Any, weight: Tensor) -> Tensor:
        """Return `‖W_i‖²` of the base's own weight, found once; one moved, converted or written is another."""
        own = module.weight
        key = (id(own), None if own.is_inference() else own._version, own.dtype, own.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, _squares(weight.detach()))
        return self._kept[1]

    def _scaled(self, frozen: BaseForward, y: Tensor, z: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Map the frozen output `y (..., out)` and `z = A x (..., r)` to the adapted output."""
        weight, bias = frozen.weight_and_bias()
        weight = weight.detach()
        squares = _squares(weight) if frozen.inner_modules else self._squares_of(frozen.module, weight)
        m = self.lora_magnitude_vector
        # As m is kept, so that m / n is 1 at the start whatever that dtype is.
        n = row_lengths(squares, weight, A, B, self.scale).to(m.dtype)
        rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]).to(y.dtype)
        return _Scaled.apply(rows, z, B, m, n, bias, self.scale).view(y.shape)

    def low_rank_factors(self) -> None:
        """Return None: the change is no update of low rank."""

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `c ⊙ (W + s · B A)` and the bias as it is."""
        A, B = self.low_rank()
        magnitude = self.lora_magnitude_vector
        lengths = row_lengths(_squares(weight), weight, A, B, self.scale).to(magnitude.dtype)
        c = magnitude.to(weight.dtype) / lengths.to(weight.dtype)
        return add_low_rank(weight, A, B, self.scale) * c[:, None], bias


class LinearDora(_Magnitude, LinearLora):
    """DoRA at a linear map."""

    def __init__(self, site: Site, config: Any, r: int, scale: float) -> None:
        LinearLora.__init__(self, site, config, r, scale)
        self._measure(site)

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., in)` to `(..., out)`."""
        A, B = self.low_rank()
        return self._scaled(frozen, frozen(x), F.linear(self.lora_dropout(x), A.to(x.dtype)), A, B)


class EmbeddingDora(_Magnitude, EmbeddingLora):
    """DoRA at an embedding; m holds one length for each of its columns."""

    def __init__(self, site: Site, config: Any, r: int, scale: float) -> None:
        EmbeddingLora.__init__(self, site, config, r, scale)
        self._measure(site)

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map row numbers `x (...)` to `(..., dim)`."""
        A, B = self.low_rank()
        return self._scaled(frozen, frozen(x), F.embedding(x, A.t()), A, B)


@torch.no_grad()
def row_lengths(squares: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the lengths `(out)` of the rows of `W + s · B A`, in the dtype of `squares`, which are W's rows'."""
    across = (weight @ A.t().to(weight.dtype)).to(squares.dtype)
    A, B = A.to(squares.dtype), B.to(squares.dtype)
    inner = across * (2 * scale) + B @ (A @ A.t()) * scale**2
    # A row of zeros has no direction: any length above zero will do.
    return (squares + (B * inner).sum(1)).clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _squares(weight: Tensor) -> Tensor:
    """Return `‖W_i‖² (out)`, in fp32 at least."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)


class _Scaled(torch.autograd.Function):
    """`y + (c − 1)(y − b) + s · z (c ⊙ B)ᵀ` with `y (T, out)`, `z (T, r)`, `B (out, r)`, `c = m / n`, and b or None."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, B: Tensor, m: Tensor, n: Tensor, b: Tensor | None, s: float) -> Tensor:
        ctx.s = s
        more = _change(m, n)
        # c − 1, not c: near 1 a 16-bit c would round the whole change away.
        d = more.to(y.dtype)
        out = torch.addcmul(y, y, d)
        if b is not None:
            out -= (more * b).to(y.dtype)
        out.addmm_(z, _times(B, more, y.dtype).t(), alpha=s)
        ctx.save_for_backward(z, B, m, n, b, out if ctx.needs_input_grad[3] else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, B, m, n, b, out = ctx.saved_tensors
        for_y, for_z, for_B, for_m, _, for_b, _ = ctx.needs_input_grad
        more = _change(m, n)
        wide = more.dtype
        gy = torch.addcmul(g, g, more.to(g.dtype)) if for_y else None
        gz = (g @ _times(B, more, g.dtype)) * ctx.s if for_z else None
        gB = ((g.t() @ z).to(wide) * ((more + 1) * ctx.s)[:, None]).to(B.dtype) if for_B else None
        total = g.sum(0, dtype=wide) if b is not None and (for_m or for_b) else None
        gm = None
        if for_m:
            gm = (g * out).sum(0, dtype=wide)
            gm = gm if total is None or b is None else gm - total * b
            # A length of exactly zero hides what it multiplies, and stays.
            gm = torch.where(m == 0, torch.zeros_like(gm), gm / m).to(m.dtype)
        gb = (total * -more).to(b.dtype) if for_b and total is not None and b is not None else None
        return gy, gz, gB, gm, None, gb, None


def _change(m: Tensor, n: Tensor) -> Tensor:
    """Return `c − 1` in fp32 at least."""
    wide = torch.promote_types(m.dtype, torch.float32)
    return m.to(wide) / n.to(wide) - 1


def _times(B: Tensor, more: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `c ⊙ B`."""
    return (B * (more + 1)[:, None]).to(dtype)
