"""−log p of chosen tokens from hidden states: the head's product and the softmax in chunks, no logits kept.

    z = s · (h Wᵀ + b),  soft-capped z ← c · tanh(z / c),  nats = logsumexp(z) − z[target]

A token's nats depend on its own hidden state alone, so their gradient is found where the logits are at hand and kept as
one tensor of h's size; the backward pass only scales its rows. Most bytes at once: a chunk of logits in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..utils.simulated_device import device_type

CHUNK, CHUNK_ON_GPU = 1 << 24, 1 << 25
"""Logits at once. With fewer rows a GPU waits for the head's weight to be read, not for the product."""


def chunked_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return −log p of each target `(n)`, in nats and in fp32 at least.

    Args:
        h: hidden states `(n, d)` after the last norm.
        weight: the head's `(vocabulary, d)`, frozen.
        targets: token ids `(n)`.
        bias: the head's `(vocabulary)` or None, frozen.
        scale: logits are multiplied by this.
        cap: soft cap on the logits; None: none.
        chunk: rows at once; None: as `rows_at_once`.
    """
    return _Nats.apply(h, weight, targets, bias, scale, cap, chunk or rows_at_once(weight.shape[0], h.device))


def target_nll(
    h: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    vocabulary: int,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """The same for a head that is adapted or trains: any map of `(n, d)` to `(n, vocabulary)`, run again backwards."""

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        logits = _shaped(head(states).to(_wide(states)), scale, cap)
        return F.cross_entropy(logits, wanted, reduction="none")

    rows = rows_at_once(vocabulary, h.device)
    pieces = zip(h.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([part(*p) for p in pieces])
    return torch.cat([checkpoint(part, *p, use_reentrant=False) for p in pieces])


@torch.no_grad()
def nll_and_accuracy(
    h: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    vocabulary: int,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return −log p of each target `(n)` and whether it is the likeliest token `(n)`: one chunk of logits at a time."""
    rows = rows_at_once(vocabulary, h.device)
    nats, hits = [h.new_zeros(0, dtype=_wide(h))], [targets.new_zeros(0, dtype=torch.bool)]
    for states, wanted in zip(h.split(rows), targets.split(rows), strict=True):
        logits = _shaped(head(states).to(_wide(states)), scale, cap)
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(nats), torch.cat(hits)


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits make a chunk."""
    return max(16, (CHUNK_ON_GPU if device_type(device) == "cuda" else CHUNK) // vocabulary)


class _Nats(torch.autograd.Function):
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
        nats = []
        for at in range(0, h.shape[0], chunk):
            rows, wanted = h[at : at + chunk], targets[at : at + chunk, None]
            logits = F.linear(rows, weight, bias).to(_wide(h))
            logits = _shaped(logits, scale, cap)
            slope = None if cap is None or grad is None else 1 - (logits / cap).square()
            # The largest p is at least 1 / vocabulary: its logarithm is safe, and softmax is the one pass needed.
            highest, there = logits.max(-1, keepdim=True)
            p = torch.softmax(logits, -1)
            nats.append((highest - logits.gather(1, wanted) - p.gather(1, there).log())[:, 0])
            del logits
            if grad is not None:
                p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
                if slope is not None:
                    p *= slope
                torch.mm(p.to(h.dtype), weight, out=grad[at : at + chunk])
                if scale != 1:
                    grad[at : at + chunk] *= scale
        ctx.save_for_backward(grad)
        return torch.cat(nats) if nats else h.new_zeros(0, dtype=_wide(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None, None, None, None, None


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _shaped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap
