"""Root mean square norm of 16-bit inputs, as one autograd step.

    n = x / √(mean(x²) + ε)  in fp32,   y = w · n  in x's dtype          x, y (..., d), w (d)

Saved for the backward pass: x, and 1/√(mean(x²) + ε) of each token. Separate operations save x once more, in fp32.
A layer that takes y may save the norm's autograd node in its place and compute y again.
Outputs are the same bits as those of transformers' `LlamaRMSNorm`, gradients those of fp32 arithmetic.
Paper: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of x `(..., d)` in bf16 or fp16, scaled by a frozen weight `(d)`."""
    return _RMSNorm.apply(x, weight, eps)


def find_rms_norm_node(y: Tensor) -> Any:
    """Return the autograd node of the `rms_norm` whose output is y; None if y is anything else."""
    return y.grad_fn if hasattr(y.grad_fn, "norm_output") else None


def recompute_rms_norm_output(node: Any) -> Tensor:
    """Return a norm's output again, `(..., d)`, from its autograd node; one tensor for all that need it."""
    if node.norm_output is None:
        x, inverse, weight = node.saved_tensors
        node.norm_output = weight * (x * inverse).to(x.dtype)
    output: Tensor = node.norm_output
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight)
        ctx.norm_output = None
        return weight * wide.mul_(inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # dL/dx = inverse · g − x · inverse³ · mean(g · x),  g = w · dL/dy
        x, inverse, weight = ctx.saved_tensors
        ctx.norm_output = None  # the layers behind the norm are done with it
        wide, g = x.float(), (grad * weight).to(x.dtype).float()
        slope = (g * wide).mean(-1, keepdim=True) * inverse.pow(3)
        return g.mul_(inverse).sub_(wide.mul_(slope)).to(x.dtype), None, None
