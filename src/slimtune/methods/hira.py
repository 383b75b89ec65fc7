"""HiRA: y = (W + W ⊙ (B A)) x + b, with W and b frozen: a high-rank change from low-rank factors.

A (r, in), B (out, r). B starts at zero, so the model starts unchanged; at an embedding A starts at zero and B
normal. Parameters added per layer: r · (in + out). Merged: W ⊙ (1 + B A).

At a convolution without groups A is (r, in, *kernel) and B (out, r, 1, …): as matrices, the factors of its weight's.

Paper: https://openreview.net/pdf?id=TwJrTz9cRS. File format: PEFT's `hira_A`, `hira_B`; for an embedding
`hira_embedding_A (r, rows)`, `hira_embedding_B (dim, r)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, BaseForward, Site
from ..core.adapters.name_patterns import get_pattern_value
from ..core.adapters.peft_config import FAN_IN_FAN_OUT_HELP, TargetedConfig, setting
from ..core.kernels.dropout import dropout
from ..core.kernels.linear_layers import is_quantized


@dataclass
class HiraConfig(TargetedConfig):
    """HiRA: the weight times a low-rank matrix, elementwise; PEFT's field names and defaults."""

    name: ClassVar = "hira"
    prefix: ClassVar = "hira_"
    learning_rate: ClassVar = 3e-3
    kinds: ClassVar = ("linear", "embedding", "conv")
    short_names: ClassVar = {"rank": "r", "dropout": "hira_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"target_modules": "all-linear"}

    r: int = setting(32, "rank of the factors; typically 8 to 64", ge=1)
    hira_dropout: float = setting(0.0, "probability of dropping an input of the update while training", ge=0, lt=1)
    fan_in_fan_out: bool = setting(False, FAN_IN_FAN_OUT_HELP)
    init_weights: bool | Literal["gaussian"] = setting(
        True,
        'True: Kaiming-uniform A; "gaussian": normal A; both with zero B (embeddings: zero A, normal B); False: random',
    )
    rank_pattern: dict[str, int] = setting(default_factory=dict, help="rank of single layers, by name or pattern", ge=1)

    @property
    def patterns(self) -> dict[str, dict]:
        """The fields that map layer patterns to values; each pattern must match a target."""
        return {"rank_pattern": self.rank_pattern}

    def build(self, site: Site) -> AdapterModule:
        r = get_pattern_value(self.rank_pattern, site.name, self.r)
        # Random numbers are drawn in PEFT's order: one seed gives the same adapter in both libraries.
        kernel = site.require_ungrouped("HiRA") if site.kind == "conv" else ()
        A = torch.randn(r, site.in_features // math.prod(kernel), *kernel, device=site.init_device)
        B = torch.randn(site.out_features, r, *[1] * len(kernel), device=site.init_device)
        if site.kind == "embedding" and self.init_weights:
            A.zero_()
            nn.init.normal_(B)
        elif self.init_weights:
            B.zero_()
            if self.init_weights == "gaussian" and site.kind == "linear":  # at convolutions PEFT knows one start
                nn.init.normal_(A, std=1 / r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        A, B = A.to(site.device, site.dtype), B.to(site.device, site.dtype)
        if site.kind == "embedding":
            return EmbeddingHira(A, B)
        return (ConvHira if site.kind == "conv" else LinearHira)(A, B, self.hira_dropout)


class LinearHira(AdapterModule):
    """`W x + b + (W ⊙ (B A)) dropout(x)`."""

    neutral: ClassVar = {"hira_B": 0.0}

    def __init__(self, A: Tensor, B: Tensor, dropout_p: float) -> None:
        super().__init__()
        self.hira_A, self.hira_B, self.hira_dropout = nn.Parameter(A), nn.Parameter(B), dropout(dropout_p)

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        y, weight = base(x), base.weight()
        # A dequantized weight is computed again in the backward pass; a plain one is the base's own tensor.
        recompute = base.weight if is_quantized(base.module) and not weight.requires_grad else None
        # A and B are cast to y's dtype, which autocast chooses, but not the weight: autograd would keep the copy.
        A, B = self.hira_A.to(y.dtype), self.hira_B.to(y.dtype)
        return y + _HadamardLinear.apply(self.hira_dropout(x).to(y.dtype), A, B, weight, recompute)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.hira_A.to(weight.dtype).flatten(1), self.hira_B.to(weight.dtype).flatten(1)
        return weight + weight * (B @ A), bias


class ConvHira(LinearHira):
    """`W ∗ x + b + (W ⊙ (B A)) ∗ dropout(x)`."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        y = base(x)
        A, B = self.hira_A.to(y.dtype).flatten(1), self.hira_B.to(y.dtype).flatten(1)
        return y + base.convolve(self.hira_dropout(x), base.weight().to(y.dtype) * (B @ A))


class EmbeddingHira(AdapterModule):
    """`y ⊙ (1 + (B A)[:, x])` for an embedding, `x (...)` being token ids."""

    neutral: ClassVar = {"hira_embedding_A": 0.0}

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.hira_embedding_A, self.hira_embedding_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + y * F.linear(F.embedding(x, self.hira_embedding_A.t()), self.hira_embedding_B).to(y.dtype)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * (self.hira_embedding_B.to(weight.dtype) @ self.hira_embedding_A.to(weight.dtype)), bias


class _HadamardLinear(torch.autograd.Function):
    """`(W ⊙ (B A)) x`. Matrices of W's size exist only during a pass: autograd would keep two of them per layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, recompute: Callable[[], Tensor] | None
    ) -> Tensor:
        ctx.recompute = recompute
        ctx.save_for_backward(x, A, B, None if recompute else weight)
        return F.linear(x, (B @ A).mul_(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight = ctx.saved_tensors
        weight = ctx.recompute() if ctx.recompute else weight
        grad_x = grad @ (B @ A).mul_(weight) if ctx.needs_input_grad[0] else None
        grad_product = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        grad_weight = (grad_product * (B @ A)).to(weight.dtype) if ctx.needs_input_grad[3] else None
        grad_product.mul_(weight)
        return grad_x, B.t() @ grad_product, grad_product @ A.t(), grad_weight, None
