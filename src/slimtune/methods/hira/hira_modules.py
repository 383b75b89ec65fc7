"""HiRA's adapter modules."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, BaseForward
from ...core.kernels.dropout import make_dropout
from ...core.kernels.linear_layers import is_quantized


class LinearHira(AdapterModule):
    """`W x + b + (W ⊙ (B A)) dropout(x)`."""

    no_op_values: ClassVar = {"hira_B": 0.0}

    def __init__(self, A: Tensor, B: Tensor, dropout_p: float) -> None:
        super().__init__()
        self.hira_A, self.hira_B, self.hira_dropout = nn.Parameter(A), nn.Parameter(B), make_dropout(dropout_p)

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

    no_op_values: ClassVar = {"hira_embedding_A": 0.0}

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
