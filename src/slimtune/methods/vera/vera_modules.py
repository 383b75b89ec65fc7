"""VeRA's adapter modules."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, SharedParameterHolder
from ...core.kernels.dropout import make_dropout
from .vera_config import VeraConfig


class SharedRandomProjections(SharedParameterHolder):
    """A `(r, in)` and B `(out, r)`, random and frozen."""

    def __init__(self, site: AdapterSite, config: VeraConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        # In the dtype the base computes in, so that no layer needs a copy in another dtype.
        dtype = next((p.dtype for p in site.module.parameters() if p.dtype.is_floating_point), site.dtype)
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, shape in (("vera_A", (config.r, in_features)), ("vera_B", (out_features, config.r))):
            drawn = torch.empty(shape, dtype=torch.float32, device=site.init_device)
            if not drawn.is_meta:
                bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
                drawn.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(site.device, dtype), persistent=config.save_projection)


class LinearVera(AdapterModule):
    """`y + λ_b ⊙ B (λ_d ⊙ A dropout(x))`."""

    no_op_values: ClassVar = {"vera_lambda_b": 0.0}
    peft_values: ClassVar = {"vera_A": "vera_A", "vera_B": "vera_B"}
    vera_A = property(lambda self: self.shared[0].vera_A)
    vera_B = property(lambda self: self.shared[0].vera_B)

    def __init__(self, site: AdapterSite, config: VeraConfig, shared: SharedRandomProjections) -> None:
        super().__init__()
        self.shared = (shared,)
        self.sizes = site.in_features, site.out_features
        self.vera_dropout = make_dropout(config.vera_dropout)
        # PEFT draws λ_d even where it starts constant: one seed gives the same adapter in both libraries.
        b, d = torch.ones(site.out_features, device=site.init_device), torch.randn(config.r, device=site.init_device)
        if config.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, config.d_initial)
        self.vera_lambda_b = nn.Parameter(b.to(site.device, site.dtype))
        self.vera_lambda_d = nn.Parameter(d.to(site.device, site.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self._get_projections(x)
        z = F.linear(self.vera_dropout(x), A) * self.vera_lambda_d.to(x.dtype)
        return _AddScaled.apply(y, z.to(y), self.vera_lambda_b.to(y), B.to(y))

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(diag(λ_d) A (r, in), diag(λ_b) B (out, r), 1)`."""
        A, B = self._get_projections(self.vera_lambda_d)
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B, 1.0

    def _get_projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return this layer's part of A and B, with the device and dtype of a tensor."""
        return self.vera_A[:, : self.sizes[0]].to(like), self.vera_B[: self.sizes[1]].to(like)


class _AddScaled(torch.autograd.Function):
    """`y + λ ⊙ B z`. It saves z `(..., r)` for the backward pass; autograd would also save a tensor of y's size."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, scale: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(z, scale, B)
        return F.linear(z, B).mul_(scale).add_(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, scale, B = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_scale = ((flat_grad.t() @ z.reshape(-1, z.shape[-1])) * B).sum(1)
        return grad, (grad * scale) @ B, grad_scale, None
