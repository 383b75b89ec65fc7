"""How A and B of a LoRA start: `init_lora_weights`.

    True, "gaussian"    A random, B = 0: the model starts unchanged
    "eva"               B = 0, and `initialize_lora_eva_weights` sets A from data
    "pissa"             s · B A = the r largest singular components of W; "pissa_niter_N": by N rounds of iteration
    "olora"             B A = Q[:, :r] R[:r] of W = Q R
    "orthogonal"        A and B random, with B A = 0 up to rounding
    "mica"              B = the r smallest left singular vectors of W, and does not train; A = 0
    "corda"             s · B A = components of W that data use most or least: see `corda.py`
    "lora_ga"           A and B along the gradient of W: see `loraga.py`
    False               both random, for tests

PiSSA, OLoRA, CorDA and LoRA-GA start with B₀ A₀ ≠ 0, which PEFT subtracts from the base's weight. Here the base never
changes: A₀ and B₀ are stored beside it, and the update is

    B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀) = [B − B₀, B₀] [A; A − A₀]

one product of rank 2r, exactly zero at the start. The gradients are those of B A.

Papers: PiSSA https://arxiv.org/abs/2404.02948, OLoRA https://arxiv.org/abs/2406.01775,
MiCA https://arxiv.org/abs/2604.01694; CorDA and LoRA-GA: in their files; orthogonal: https://datta0.github.io/posts/rethink-lora-init/
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterSite
from ...errors import ConfigError
from .corda import pop_corda_a_and_b
from .init_configs import PISSA_NITER, LoraGAConfig
from .loraga import compute_loraga_factors_and_pop_gradient


@torch.no_grad()
def initialize_lora_factors(init: bool | str, A: Any, B: Any, r: int | None = None) -> None:
    """Initialize A `(r, in, ...)` and B `(out, r, ...)` without the base's weight, with PEFT's random numbers.

    `r` is the rank where A contains those of several experts.
    """
    if init is True:
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
    elif init == "gaussian":
        nn.init.normal_(A.weight, std=1 / (r or len(A.weight)))
    elif init == "orthogonal":
        r, device = A.out_features, A.weight.device
        rows, _ = torch.linalg.qr(torch.randn(r, r, device=device))
        A.weight.copy_((torch.randn(A.in_features, r // 2, device=device) @ rows[0::2]).t() / 10)
        B.weight.copy_(torch.randn(r // 2, B.out_features, device=device).t() @ rows[1::2] / 10)
    if init and init != "orthogonal":
        for zero in B.parameters():
            nn.init.zeros_(zero)


@torch.no_grad()
def make_lora_a_and_b_from_base(
    init: str, site: AdapterSite, r: int, scale: float, loraga_config: LoraGAConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return `A (r, in)` and `B (out, r)` of an initialization that is computed from the weight, or from data."""
    if init == "corda":
        return pop_corda_a_and_b(site, r, scale)
    if init == "lora_ga":
        return compute_loraga_factors_and_pop_gradient(loraga_config, site, r, scale)
    max_rank = min(site.in_features, site.out_features)
    if r > max_rank:
        title = {"mica": "MiCA", "olora": "OLoRA"}.get(init, "PiSSA")
        bound = f"`r` <= min(in_features, out_features), which is {max_rank} at {site.name}"
        raise ConfigError(f"{title} requires {bound}; r is {r}", hint="give this layer its own rank by rank_pattern")
    weight = site.weight()
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]
    iterations = PISSA_NITER.fullmatch(init)
    if iterations:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(iterations[1]))
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    if init == "mica":
        return weight.new_zeros(r, site.in_features), U[:, -r:]
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
