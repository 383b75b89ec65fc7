"""VeRA: y = W x + b + λ_b ⊙ B (λ_d ⊙ A x), with W frozen, and random frozen A and B that all layers share.

A (r, in) is the first columns of one shared A, B (out, r) the first rows of one shared B; both are as large as the
largest layer needs and drawn from a seed. λ_d (r) and λ_b (out) train. λ_b starts at zero, so the model starts
unchanged. Parameters added per layer: r + out. Merged: W + diag(λ_b) B diag(λ_d) A.

Paper: https://arxiv.org/abs/2310.11454. File format: PEFT's `vera_lambda_d`, `vera_lambda_b`, and, unless
`save_projection` is off, `base_model.vera_A`, `base_model.vera_B`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, SharedParameterHolder, Site, SiteKind
from ..core.adapters.architectures import DEFAULT_TARGETS
from ..core.adapters.peft_config import BIAS_HELP, FAN_IN_FAN_OUT_HELP, TargetedConfig, setting
from ..core.adapters.prompt import find_backbone_name
from ..core.kernels.dropout import dropout
from ..errors import TargetError


@dataclass
class VeraConfig(TargetedConfig):
    """VeRA: two trained vectors per layer around random matrices shared by all; PEFT's field names and defaults."""

    name: ClassVar = "vera"
    prefix: ClassVar = "vera_lambda_"
    extension_fields: ClassVar = frozenset(["exclude_modules"])
    learning_rate: ClassVar = 1e-2
    architecture_targets: ClassVar = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}
    short_names: ClassVar = {"rank": "r", "dropout": "vera_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"target_modules": "all-linear"}

    r: int = setting(256, "rank; larger than LoRA's, typically 128 to 1024", ge=1)
    projection_prng_key: int = setting(0, "seed of A and B", le=2**63 - 1)
    save_projection: bool = setting(
        True, "write A and B into the file; False: draw them again from the seed, which may differ in another torch"
    )
    vera_dropout: float = setting(0.0, "probability of dropping an input of A while training", ge=0, lt=1)
    d_initial: float = setting(0.1, "start of λ_d; usually 0.1 or less")
    fan_in_fan_out: bool = setting(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "vera_only"] = setting("none", BIAS_HELP)
    init_weights: bool = setting(True, "True: λ_b zero, λ_d d_initial; False: λ_b one, λ_d normal, for tests")

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone, where A and B are stored."""
        return {find_backbone_name(model): "model"}

    def file_key(self, key: str) -> str:
        """Return PEFT's key; those of A and B name no module of the model."""
        name = key.rpartition(".")[2]
        return f"base_model.{name}" if name in ("vera_A", "vera_B") else key

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the trained vectors of each layer, and A and B at the backbone."""
        layers = [s for s in sites if s.kind != "model"]
        if not layers:
            raise TargetError(f"target_modules={self.target_modules!r} matches no module", "linear layers")
        widest = max(s.in_features for s in layers), max(s.out_features for s in layers)
        shared = next(Projections(s, self, *widest) for s in sites if s.kind == "model")
        return [shared if s.kind == "model" else LinearVera(s, self, shared) for s in sites]


class Projections(SharedParameterHolder):
    """A `(r, in)` and B `(out, r)`, random and frozen."""

    def __init__(self, site: Site, config: VeraConfig, in_features: int, out_features: int) -> None:
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

    neutral: ClassVar = {"vera_lambda_b": 0.0}
    peft_values: ClassVar = {"vera_A": "vera_A", "vera_B": "vera_B"}
    vera_A = property(lambda self: self.held[0].vera_A)
    vera_B = property(lambda self: self.held[0].vera_B)

    def __init__(self, site: Site, config: VeraConfig, shared: Projections) -> None:
        super().__init__()
        self.held = (shared,)
        self.sizes = site.in_features, site.out_features
        self.vera_dropout = dropout(config.vera_dropout)
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
        held: Any = self.held[0]
        return held.vera_A[:, : self.sizes[0]].to(like), held.vera_B[: self.sizes[1]].to(like)


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
