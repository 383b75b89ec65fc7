"""HiRA: y = (W + W ⊙ (B A)) x + b, with W and b frozen: a change of high rank from factors of low rank.

A (r, in), B (out, r). B starts at zero, so the model starts unchanged; at an embedding A starts at zero and B
normal. Parameters added per layer: r · (in + out). Merged: W ⊙ (1 + B A).

Paper: https://openreview.net/pdf?id=TwJrTz9cRS. File format: PEFT's `hira_A`, `hira_B`; for an embedding
`hira_embedding_A (r, rows)`, `hira_embedding_B (dim, r)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import AdapterModule, BaseForward, Site, SiteKind
from ..adapters.config import TargetedConfig
from ..adapters.targets import get_pattern_value
from ..kernels.dropout import dropout
from ..utils.linear_layers import is_quantized


@dataclass
class HiraConfig(TargetedConfig):
    """HiRA: the weight times a low-rank matrix, entry by entry; PEFT's field names and defaults.

    Args:
        r: rank of the factors, 1 and up; typically 8 to 64.
        hira_dropout: probability in [0, 1) of dropping an input of the change while training.
        fan_in_fan_out: the base stores its weights as (in, out); known by itself for GPT-2's Conv1D.
        init_weights: True: Kaiming-uniform A, zero B; "gaussian": normal A with std 1/r, zero B; at an embedding both
            mean zero A, normal B; False: A and B both random, for tests.
        rank_pattern: name or pattern of a layer → its own rank; ranks, 1 and up.
    """

    name: ClassVar[str] = "hira"
    learning_rate: ClassVar[float] = 3e-3
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear", "embedding")
    short_names: ClassVar[dict[str, str]] = {"rank": "r", "dropout": "hira_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar[dict[str, Any]] = {"target_modules": "all-linear"}

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Check ranges: ranks of 1 and up, dropout in [0, 1), a known start."""
        super().check()
        self.rank_pattern = self.rank_pattern or {}
        self.require_whole("r")
        self.require_ranks("rank_pattern")
        self.require_share("hira_dropout")
        self.require(self.init_weights in (True, False, "gaussian"), "init_weights", "True, 'gaussian' or False")

    @property
    def patterns(self) -> dict[str, dict]:
        """The fields that map layer patterns to values; each pattern must match a target."""
        return {"rank_pattern": self.rank_pattern}

    def build(self, site: Site) -> AdapterModule:
        """Return the change of the weight at `site`, with the layer's own rank."""
        r = get_pattern_value(self.rank_pattern, site.name, self.r)
        return (EmbeddingHira if site.kind == "embedding" else LinearHira)(site, r, self)


class LinearHira(AdapterModule):
    """`W x + b + (W ⊙ (B A)) dropout(x)`."""

    def __init__(self, site: Site, r: int, config: HiraConfig) -> None:
        super().__init__()
        self.hira_dropout = dropout(config.hira_dropout)
        # Made and filled in PEFT's order, so that one seed gives the same adapter in both.
        A, B = (
            torch.randn(r, site.in_features, device=site.init_device),
            torch.randn(site.out_features, r, device=site.init_device),
        )
        if config.init_weights:
            gaussian = config.init_weights == "gaussian"
            nn.init.normal_(A, std=1 / r) if gaussian else nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B.zero_()
        self.hira_A = nn.Parameter(A.to(site.device, site.dtype))
        self.hira_B = nn.Parameter(B.to(site.device, site.dtype))

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., in)` to `(..., out)`."""
        y, weight = frozen(x), frozen.weight()
        # A dequantized weight is made again for the backward pass; another is the base's own tensor.
        again = frozen.weight if is_quantized(frozen.module) and not weight.requires_grad else None
        # In y's dtype, which autocast chooses, the weight apart: a copy of it would be kept for the backward pass.
        A, B = self.hira_A.to(y.dtype), self.hira_B.to(y.dtype)
        return y + _Hadamard.apply(self.hira_dropout(x).to(y.dtype), A, B, weight, again)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W ⊙ (1 + B A)` and the bias as it is."""
        return weight + weight * (self.hira_B.to(weight.dtype) @ self.hira_A.to(weight.dtype)), bias


class EmbeddingHira(AdapterModule):
    """`y ⊙ (1 + (B A)[:, x])` for an embedding whose rows `x` numbers."""

    def __init__(self, site: Site, r: int, config: HiraConfig) -> None:
        super().__init__()
        A, B = (
            torch.randn(r, site.in_features, device=site.init_device),
            torch.randn(site.out_features, r, device=site.init_device),
        )
        if config.init_weights:
            A.zero_()
            nn.init.normal_(B)
        self.hira_embedding_A = nn.Parameter(A.to(site.device, site.dtype))
        self.hira_embedding_B = nn.Parameter(B.to(site.device, site.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map row numbers `x (...)` and their rows `y (..., dim)` to `(..., dim)`."""
        return y + y * F.linear(F.embedding(x, self.hira_embedding_A.t()), self.hira_embedding_B).to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W ⊙ (1 + B A)` for `W (dim, rows)`."""
        A, B = self.hira_embedding_A.to(weight.dtype), self.hira_embedding_B.to(weight.dtype)
        return weight + weight * (B @ A), bias


class _Hadamard(torch.autograd.Function):
    """`(W ⊙ (B A)) x`; what is of W's size is made, used and dropped, in both passes, and not kept between them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, again: Callable[[], Tensor] | None
    ) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(x, A, B, None if again else weight)
        return F.linear(x, (B @ A).mul_(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight = ctx.saved_tensors
        weight = ctx.again() if ctx.again else weight
        of_x = grad @ (B @ A).mul_(weight) if ctx.needs_input_grad[0] else None
        of_change = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        of_weight = (of_change * (B @ A)).to(weight.dtype) if ctx.needs_input_grad[3] else None
        of_change.mul_(weight)
        return of_x, B.t() @ of_change, of_change @ A.t(), of_weight, None
