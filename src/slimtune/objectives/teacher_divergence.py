"""The divergence of a student's next-token distribution from its teacher's, in chunks of tokens.

    p    student's distribution, softmax(z / T)            q    teacher's, at the same token of the answer
    m    β q + (1 − β) p

    β = 0        KL(q ‖ p)                                 forward KL
    0 < β < 1    β KL(q ‖ m) + (1 − β) KL(p ‖ m)           generalized Jensen-Shannon (Agarwal et al. 2023, 2306.13649)
    β = 1        KL(p ‖ q)                                 reverse KL

Of a teacher elsewhere only its likeliest tokens are known. The forward KL is then that over them and one bucket with
all others, whose probabilities are r and s (`loss_top_k` and `loss_add_tail` of TRL's `ServerDistillationTrainer`):

    Σ q log(q / p) over the likeliest tokens + r log(r / s)

A token's divergence depends only on its own two hidden states. So its gradient is computed in the forward pass, while
the logits exist, as for cross-entropy (core/kernels/cross_entropy.py): memory holds one chunk of both models' logits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.kernels.cross_entropy import count_rows_per_logit_chunk, scale_and_cap_logits
from ..core.models.lm_head import LMHead

CompareLogits = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Returns the divergence of each row of the student's logits, which are those of a slice of tokens, and its slopes."""


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
    shared = min(student_head.vocabulary, teacher_head.vocabulary)

    def compare(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        # No name keeps the teacher's logits: they are freed as soon as they are not needed.
        return compute_divergences_and_slopes(logits, compute_logits(teacher_head, teacher[tokens])[:, :shared], beta)

    found: Tensor = _TokenDivergence.apply(student, student_head, shared, compare)
    return found


def compute_top_k_divergences(student: Tensor, student_head: LMHead, top_ids: Tensor, top_logps: Tensor) -> Tensor:
    """Return the forward KL of each token `(n)` over the teacher's likeliest tokens and the rest as one bucket.

    Args:
        student: the student's hidden states before its head `(n, d)`.
        student_head: frozen.
        top_ids: the teacher's likeliest tokens `(n, k)`; those that the student lacks are padding, and are left out.
        top_logps: their log-probabilities `(n, k)` under the teacher; −Inf where there are fewer.
    """
    is_padding = top_ids >= student_head.vocabulary
    padding = top_logps.exp().masked_fill(~is_padding, 0).sum(-1, keepdim=True)
    top_logps = top_logps.masked_fill(is_padding, -math.inf) - torch.log1p(-padding)
    top_ids = top_ids.long().masked_fill(top_logps == -math.inf, 0)

    def compare(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        return compute_top_k_divergences_and_slopes(logits, top_ids[tokens], top_logps[tokens])

    found: Tensor = _TokenDivergence.apply(student, student_head, student_head.vocabulary, compare)
    return found


def compute_logits(head: LMHead, states: Tensor) -> Tensor:
    """Return the logits of hidden states `(n, vocabulary)`, fp32 or wider."""
    logits = head.module(states)
    return scale_and_cap_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), head.scale, head.cap)


def compute_divergences_and_slopes(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row of logits `(n)`, and its derivative by the student's logits `(n, V)`.

    Both logits are overwritten: each of the at most four tensors here is as large as the logits of a chunk.
    """
    s, t = normalize_logits(student), normalize_logits(teacher)
    if beta == 0:
        q = t.exp()
        return t.sub_(s).mul_(q).sum(-1), s.exp_().sub_(q)
    weight, from_teacher = 1 - beta or 1.0, s.new_zeros(len(s))
    if beta < 1:
        mixture, q = s + math.log1p(-beta), t + math.log(beta)
        torch.logaddexp(mixture, q, out=mixture)
        torch.exp(t, out=q)
        from_teacher = t.sub_(mixture).mul_(q).sum(-1)
        t, p = mixture, torch.exp(s, out=q)
    else:
        p = s.exp()
    terms = s.sub_(t).mul_(p)
    own = terms.sum(-1)
    return weight * own + beta * from_teacher, terms.sub_(p.mul_(own[:, None])).mul_(weight)


def normalize_logits(logits: Tensor) -> Tensor:
    """Turn logits `(n, V)` into log-probabilities in place; `log_softmax` would make another tensor of their size."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def compute_top_k_divergences_and_slopes(logits: Tensor, ids: Tensor, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `compute_top_k_divergences` says of rows of logits `(n, V)`, and its derivative by them `(n, V)`.

    The logits are overwritten, as above.
    """
    s, t = normalize_logits(logits), logps.to(logits.dtype)
    q, is_known = t.exp(), t > -math.inf
    is_rest = torch.zeros_like(s).scatter_add_(1, ids, is_known.to(s.dtype)) == 0
    others = s.masked_fill(~is_rest, -math.inf)
    highest = others.amax(-1, keepdim=True).nan_to_num(neginf=0)
    others.sub_(highest).exp_()  # `logsumexp` would need another tensor of this size
    total, rest = others.sum(-1), (1 - q.sum(-1)).clamp_min(0)
    # Where the teacher gives the others no probability, or there are none, only the likeliest tokens are compared.
    rest, total = torch.where(total > 0, rest, 0), torch.where(total > 0, total, 1)
    found = torch.where(is_known, q * (t - s.gather(1, ids)), 0).sum(-1)
    found += torch.xlogy(rest, rest) - rest * (total.log() + highest[:, 0])
    slopes = s.exp_().mul_((q.sum(-1) + rest)[:, None]).sub_(others.mul_((rest / total)[:, None]))
    return found, slopes.scatter_add_(1, ids, -q)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, head: LMHead, vocabulary: int, compare: CompareLogits) -> Tensor:
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        rows = count_rows_per_logit_chunk(head.vocabulary, student.device)
        losses = []
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(grad is not None):
                states = student[part].detach().requires_grad_(grad is not None)
                logits = compute_logits(head, states)[:, :vocabulary]
            found, slopes = compare(logits.detach(), part)  # in place: no gradient of a head needs its logits
            losses.append(found)
            if grad is not None:
                (grad[part],) = torch.autograd.grad(logits, states, slopes)
        ctx.save_for_backward(grad)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None, None
