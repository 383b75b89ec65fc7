"""Cross-entropy from hidden states, in chunks of rows, without keeping logits.

    z = s · (h Wᵀ + b),  with a soft cap z ← c · tanh(z / c),  loss = logsumexp(z) − z[target]

A token's loss depends only on its own hidden state. So its gradient is computed in the forward pass, while the logits
exist, and saved as one tensor of h's size; the backward pass only scales its rows. Peak memory: one chunk of fp32
logits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..foundation.device import get_real_or_simulated_device_type
from .frozen_product import multiply_by_transposed_weight, multiply_by_weight

Head = Callable[[Tensor], Tensor]
"""A map of hidden states `(n, d)` to logits `(n, vocabulary)`."""
CHUNK, CHUNK_ON_GPU = 1 << 22, 1 << 25
"""Logits per chunk. A CPU keeps small chunks in its cache; a GPU would wait for reading the head's weight."""
ENOUGH_ROWS = 96
"""Rows of a chunk on a CPU below which reading the head's weight takes longer than the products."""


def chunked_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Return the negative log-likelihood of each target `(n)`, in nats, fp32 or wider.

    Args:
        h: hidden states `(n, d)` after the last norm.
        weight: the head's weight `(vocabulary, d)`, frozen.
        targets: token ids `(n)`.
        bias: the head's bias `(vocabulary)`, frozen, or None.
        scale: factor on the logits.
        cap: soft cap on the logits; None: none.
    """
    return _CrossEntropy.apply(
        h, weight, targets, bias, scale, cap, count_rows_per_logit_chunk(weight.shape[0], h.device)
    )


def compute_target_nll(
    h: Tensor, head: Head, targets: Tensor, logits_per_row: int, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Return the negative log-likelihoods `(n)` for any head; it runs again in the backward pass, so it may train."""

    def chunk_loss(states: Tensor, wanted: Tensor) -> Tensor:
        logits = scale_and_cap_logits(head(states).to(_wide_dtype(states)), scale, cap)
        return F.cross_entropy(logits, wanted, reduction="none")

    rows = count_rows_per_logit_chunk(logits_per_row, h.device)
    chunks = zip(h.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk_loss(*c) for c in chunks])
    return torch.cat([checkpoint(chunk_loss, *c, use_reentrant=False) for c in chunks])


@torch.no_grad()
def compute_target_nlls_and_hits(
    h: Tensor, head: Head, targets: Tensor, logits_per_row: int, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return each target's negative log-likelihood `(n)`, and whether it is the most likely token `(n)`."""
    rows = count_rows_per_logit_chunk(logits_per_row, h.device)
    losses, correct = [h.new_zeros(0, dtype=_wide_dtype(h))], [targets.new_zeros(0, dtype=torch.bool)]
    for states, wanted in zip(h.split(rows), targets.split(rows), strict=True):
        logits = scale_and_cap_logits(head(states).to(_wide_dtype(states)), scale, cap)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        correct.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(correct)


def count_rows_per_logit_chunk(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits make a chunk."""
    on_gpu, most = get_real_or_simulated_device_type(device) == "cuda", CHUNK_ON_GPU // vocabulary
    return max(16, most if on_gpu else max(CHUNK // vocabulary, min(ENOUGH_ROWS, most)))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        cap: float | None,
        chunk: int,
    ) -> Tensor:
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, h.shape[0], chunk):
            rows, wanted = h[start : start + chunk], targets[start : start + chunk, None]
            logits = scale_and_cap_logits(multiply_by_weight(rows, weight, bias).to(_wide_dtype(h)), scale, cap)
            cap_slope = None if cap is None or grad is None else 1 - (logits / cap).square()
            # The largest probability is at least 1 / vocabulary, so its logarithm is safe and softmax is enough.
            largest, index = logits.max(-1, keepdim=True)
            p = torch.softmax(logits, -1)
            losses.append((largest - logits.gather(1, wanted) - p.gather(1, index).log())[:, 0])
            del logits
            if grad is not None:
                p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
                if cap_slope is not None:
                    p *= cap_slope
                multiply_by_transposed_weight(p.to(h.dtype), weight, out=grad[start : start + chunk])
                if scale != 1:
                    grad[start : start + chunk] *= scale
        ctx.save_for_backward(grad)
        return torch.cat(losses) if losses else h.new_zeros(0, dtype=_wide_dtype(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None, None, None, None, None


def _wide_dtype(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def scale_and_cap_logits(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """Return logits times a scale, soft-capped; see the head of the module."""
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap
