"""How A and B of a LoRA start: `init_lora_weights`.

    True, "gaussian"    A random, B = 0: the model starts unchanged
    "eva"               B = 0, and A is set from data by `initialize_lora_eva_weights`
    "pissa"             s · B A = the r largest singular parts of W; "pissa_niter_N": found by N rounds of iteration
    "olora"             B A = Q[:, :r] R[:r] of W = Q R
    "orthogonal"        A and B random, with B A = 0 up to rounding
    "mica"              B = the r smallest left singular vectors of W, and does not train; A = 0
    False               both random, for tests

PiSSA and OLoRA start with B₀ A₀ ≠ 0, which PEFT takes out of the base's weight. The base is never written here:
A₀ and B₀ are kept beside, and the update is

    B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀) = [B − B₀, B₀] [A; A − A₀]

one product of rank 2r, zero bit for bit at the start. The gradients are those of B A.

Papers: PiSSA https://arxiv.org/abs/2404.02948, OLoRA https://arxiv.org/abs/2406.01775,
MiCA https://arxiv.org/abs/2604.01694; orthogonal: https://datta0.github.io/posts/rethink-lora-init/
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import Site
from ...errors import ConfigError

NAMED = ("gaussian", "eva", "pissa", "olora", "orthogonal", "mica", "loftq")
_NITER = re.compile(r"pissa_niter_(\d+)")


def is_known(init: Any) -> bool:
    """Return whether `init` is a start there is."""
    return isinstance(init, bool) or (isinstance(init, str) and (init in NAMED or bool(_NITER.fullmatch(init))))


def is_in_weight(init: Any) -> bool:
    """Return whether the start is a part of the base's weight, so that it has to be taken out again."""
    return isinstance(init, str) and (init.startswith("pissa") or init == "olora")


@torch.no_grad()
def fill(init: bool | str, A: nn.Linear, B: nn.Linear) -> None:
    """Fill the weights `(r, in)` and `(out, r)` with what needs no base weight; draws as PEFT does."""
    if init is True:
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
    elif init == "gaussian":
        nn.init.normal_(A.weight, std=1 / A.out_features)
    elif init == "orthogonal":
        r, near = A.out_features, A.weight.device
        rows, _ = torch.linalg.qr(torch.randn(r, r, device=near))
        A.weight.copy_((torch.randn(A.in_features, r // 2, device=near) @ rows[0::2]).t() / 10)
        B.weight.copy_(torch.randn(r // 2, B.out_features, device=near).t() @ rows[1::2] / 10)
        return
    if init:
        nn.init.zeros_(B.weight)
        if B.bias is not None:
            nn.init.zeros_(B.bias)


@torch.no_grad()
def from_weight(init: str, site: Site, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `A (r, in)` and `B (out, r)` of a start that comes from the frozen weight.

    Raises:
        ConfigError: the rank is larger than the weight's.
    """
    smallest = min(site.in_features, site.out_features)
    if r > smallest:
        raise ConfigError(
            f"r is {r} at {site.name}, whose weight has rank {smallest}",
            f"a rank of at most {smallest} with init_lora_weights={init!r}",
            "give this layer its own rank by rank_pattern",
        )
    weight = site.weight()
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]
    if init == "mica":
        U, _, _ = torch.linalg.svd(weight, full_matrices=False)
        return weight.new_zeros(r, site.in_features), U[:, -r:]
    rounds = _NITER.fullmatch(init)
    if rounds:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(rounds[1]))
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def stacked(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(2r, in)` and `(out, 2r)`, whose product is `B A − B₀ A₀`; see the top of this file."""
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
