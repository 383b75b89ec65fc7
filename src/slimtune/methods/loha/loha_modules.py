"""LoHa's adapter modules."""

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.kernels.dropout import draw_output_dropout_mask
from ...core.kernels.recompute import linear_recomputing_weight
from .loha_config import LoHaConfig, LycorisConfig

_FACTORS, _KERNELS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")


class LycorisModuleBase(AdapterModule):
    """The rank, scale and dropout that LoHa and LoKr share."""

    def __init__(self, site: AdapterSite, config: LycorisConfig, *, rescale: bool) -> None:
        super().__init__()
        self.r, self.rescale = config.get_rank(site.name), rescale
        self.scale = config.get_alpha(site.name) / self.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def draw_module_dropout(self) -> bool:
        """Draw whether this training step leaves the whole update out."""
        return bool(self.training and self.module_dropout and torch.rand(1).item() <= self.module_dropout)

    def drop_outputs(self, update: Tensor) -> Tensor:
        """Return an update `(..., out)` with some outputs set to zero while training."""
        if not (self.training and self.rank_dropout):
            return update
        return update * draw_output_dropout_mask(
            update.shape[-1], self.rank_dropout, rescale_to_mean_one=self.rescale
        ).to(update)

    def add_factors(self, site: AdapterSite, shapes: Mapping[str, tuple[int, ...]], zero: str | None) -> None:
        """Create the factors, Kaiming-uniform except `zero`, in PEFT's order: one seed gives equal adapters in both."""
        for name, shape in shapes.items():
            factor = nn.Parameter(torch.zeros(shape, device=site.init_device))
            if name != zero:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            self.register_parameter(name, factor)
        self.to(site.device, site.dtype)

    def get_factors(self, names: Iterable[str], dtype: torch.dtype) -> list[Tensor]:
        """Return some of the factors; under FSDP1 they are plain tensors."""
        return [getattr(self, name).to(dtype) for name in names]

    def compute_change(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix `(out, in / groups · kernel size)` that is added to the weight."""
        raise NotImplementedError

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.compute_change(weight.dtype), bias


class ConvLycorisMixin(LycorisModuleBase):
    """Mixed into the class for linear layers: the update is a convolution with the matrix of the update."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        y = base(x)
        if self.draw_module_dropout():
            return y
        return y + base.convolve(x, self.drop_outputs(self.compute_change(x.dtype).t()).t())


class LinearLoHa(LycorisModuleBase):
    """`y + s · ((W1a W1b) ⊙ (W2a W2b)) x` for a linear layer."""

    no_op_values: ClassVar = {"hada_w2_b": 0.0}

    def __init__(self, site: AdapterSite, config: LoHaConfig) -> None:
        super().__init__(site, config, rescale=True)
        out, in_, r = site.out_features, site.in_features, self.r
        self.low_rank = r * r * (in_ + out) <= in_ * out
        shapes: dict[str, tuple[int, ...]] = {n: (out, r) if n.endswith("a") else (r, in_) for n in _FACTORS}
        if kernel := config.effective_kernel(site):
            self.low_rank, channels = False, in_ // math.prod(kernel)
            shapes = {n: (r, out if n.endswith("a") else channels) for n in _FACTORS}
            shapes |= dict.fromkeys(_KERNELS, (r, r, *kernel))
        self.add_factors(site, shapes, zero="hada_w2_b" if config.init_weights else None)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.draw_module_dropout():
            return y
        factors = self.get_factors(_FACTORS, x.dtype)
        if self.low_rank:
            A, B = _as_low_rank(*factors)
            update = x @ A.t() @ B.t()
        else:
            update = linear_recomputing_weight(_multiply, x, *factors)
        return torch.add(y, self.drop_outputs(update), alpha=self.scale)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A (r², in), B (out, r²), scale)` where r² is small and dropout is off."""
        if not self.low_rank or (self.training and (self.rank_dropout or self.module_dropout)):
            return None
        return *_as_low_rank(*self.get_factors(_FACTORS, next(self.parameters()).dtype)), self.scale

    def compute_change(self, dtype: torch.dtype) -> Tensor:
        """Return `s · (W1a W1b) ⊙ (W2a W2b)`."""
        w1a, w1b, w2a, w2b = self.get_factors(_FACTORS, dtype)
        if not hasattr(self, "hada_t1"):
            return self.scale * _multiply(w1a, w1b, w2a, w2b)
        t1, t2 = self.get_factors(_KERNELS, dtype)
        return self.scale * compute_flat_conv_kernel(t1, w1a, w1b) * compute_flat_conv_kernel(t2, w2a, w2b)


class ConvLoHa(LinearLoHa, ConvLycorisMixin):
    """`y + s · ((W1a W1b) ⊙ (W2a W2b)) ∗ x` for a convolution."""


def compute_flat_conv_kernel(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix `Σ_pq a_po t_pqk b_qi (out, in · k1 · k2)` of `t (r, r, k1, k2)`, `a (r, out)`, `b (r, in)`."""
    return torch.einsum("pqkl,po,qi->oikl", t, a, b).flatten(1)


def _multiply(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
    return (w1a @ w1b) * (w2a @ w2b)


def _as_low_rank(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> tuple[Tensor, Tensor]:
    A = (w1b[:, None] * w2b[None]).flatten(0, 1)
    B = (w1a[:, :, None] * w2a[:, None]).flatten(1)
    return A, B
