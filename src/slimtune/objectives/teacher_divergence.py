"""The divergence of a student's next-token distribution from its teacher's, over the whole vocabulary, in chunks.

    p    student's distribution, softmax(z / T)            q    teacher's, at the same token of the answer
    m    β q + (1 − β) p

    β = 0        KL(q ‖ p)                                 forward KL
    0 < β < 1    β KL(q ‖ m) + (1 − β) KL(p ‖ m)           generalized Jensen-Shannon (Agarwal et al. 2023, 2306.13649)
    β = 1        KL(p ‖ q)                                 reverse KL

A token's divergence depends only on its own two hidden states. So its gradient is computed in the forward pass, while
the logits exist, as for cross-entropy (core/kernels/cross_entropy.py): memory holds one chunk of both models' logits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.kernels.cross_entropy import count_rows_per_logit_chunk, scale_and_cap_logits
from ..core.models.lm_head import LMHead


def compute_token_divergences(
    student: Tensor, student_head: LMHead, teacher: Tensor, teacher_head: LMHead, beta: float
) -> Tensor:
    """Return the divergence of each token `(n)`, in nats, fp32 or wider; its gradient goes to the student's states.

    Args:
        student: the student's hidden states before its head `(n, d)`.
        student_head: frozen.
        teacher: the teacher's hidden states for the same tokens `(n, d')`; they get no gradient.
        teacher_head: frozen, with the same tokens; logits that only one of both has are padding, and are left out.
        beta: 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence.
    """
    found: Tensor = _TokenDivergence.apply(student, student_head, teacher, teacher_head, beta)
    return found


def compute_logits(head: LMHead, states: Tensor) -> Tensor:
    """Return the logits of hidden states `(n, vocabulary)`, fp32 or wider."""
    logits = head.module(states)
    return scale_and_cap_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), head.scale, head.cap)


def compute_divergences_and_slopes(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row of logits `(n)`, and its derivative by the student's logits `(n, V)`."""
    # In place as far as it goes: each of these tensors is as large as the logits of a chunk.
    s, t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    del student, teacher
    if beta == 0:
        q = t.exp()
        return t.sub_(s).mul_(q).sum(-1), s.exp_().sub_(q)
    p, weight = s.exp(), 1 - beta or 1.0
    if beta < 1:
        mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
        q = t.exp()
        from_teacher = t.sub_(mixture).mul_(q).sum(-1)
        terms = s.sub_(mixture).mul_(p)
    else:
        from_teacher = p.new_zeros(len(p))
        terms = s.sub_(t).mul_(p)
    own = terms.sum(-1)
    return weight * own + beta * from_teacher, terms.sub_(p.mul_(own[:, None])).mul_(weight)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, student_head: LMHead, teacher: Tensor, teacher_head: LMHead, beta: float
    ) -> Tensor:
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        rows = count_rows_per_logit_chunk(student_head.vocabulary, student.device)
        shared = min(student_head.vocabulary, teacher_head.vocabulary)
        losses = []
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(grad is not None):
                states = student[part].detach().requires_grad_(grad is not None)
                logits = compute_logits(student_head, states)[:, :shared]
            found, slopes = compute_divergences_and_slopes(
                logits.detach(), compute_logits(teacher_head, teacher[part])[:, :shared], beta
            )
            losses.append(found)
            if grad is not None:
                (grad[part],) = torch.autograd.grad(logits, states, slopes)
        ctx.save_for_backward(grad)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None, None, None
