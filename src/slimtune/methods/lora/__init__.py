"""LoRA: y = W x + b + s · B A x, with W frozen.

    A (r, in), B (out, r), s = alpha / r, or alpha / √r with rsLoRA. B starts at zero, so the model starts unchanged.
    Parameters added per layer: r · (in + out). Merged: W + s · B A.

Papers: LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732. File format: PEFT's
`lora_A.weight`, `lora_B.weight`; for an embedding `lora_embedding_A (r, rows)`, `lora_embedding_B (dim, r)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...contract.config import TargetedConfig
from ...contract.delta import Delta, Kind, Site
from ...contract.patterns import pattern_key


@dataclass
class LoraConfig(TargetedConfig):
    """LoRA: low-rank matrices beside frozen linear maps; PEFT's field names and defaults.

    Args:
        r: rank, 1 and up; typically 4 to 64.
        lora_alpha: scale numerator; the update is scaled by lora_alpha / r.
        lora_dropout: probability in [0, 1) of dropping an input of A while training.
        fan_in_fan_out: the base stores its weights as (in, out); known by itself for GPT-2's Conv1D.
        bias: which biases of the base train too: "none", "lora_only" (of adapted layers) or "all".
        use_rslora: scale by lora_alpha / √r instead.
        init_lora_weights: True: Kaiming-uniform A, zero B; "gaussian": normal A with std 1/r, zero B; False: A and B
            both random, for tests.
        rank_pattern: name or pattern of a layer → its own rank.
        alpha_pattern: name or pattern of a layer → its own alpha.
    """

    name: ClassVar[str] = "lora"
    elsewhere: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"), False),
        **dict.fromkeys(
            (
                "megatron_config",
                "trainable_token_indices",
                "eva_config",
                "corda_config",
                "lora_ga_config",
                "velora_config",
                "alora_invocation_tokens",
                "monteclora_config",
                "layer_replication",
                "target_parameters",
                "use_bdlora",
                "arrow_config",
                "kasa_config",
            )
        ),
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
    }
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding")
    ships_as_lora: ClassVar[bool] = True
    short_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "targets": "target_modules",
    }
    recipe_defaults: ClassVar[dict[str, Any]] = {
        "r": 16,
        "lora_alpha": lambda given: 2 * given["r"],
        "target_modules": "all-linear",
    }

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Check ranges: ranks of 1 and up, dropout in [0, 1), a known bias and initialisation."""
        super().check()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        whole = isinstance(self.r, int) and not isinstance(self.r, bool)
        self.require(whole and self.r > 0, "r", "a whole number, 1 and up")
        ranks = self.rank_pattern.values()
        self.require(all(isinstance(r, int) and r > 0 for r in ranks), "rank_pattern", "ranks of 1 and up")
        self.require(0 <= self.lora_dropout < 1, "lora_dropout", "a probability in [0, 1)")
        self.require(self.bias in ("none", "all", "lora_only"), "bias", "'none', 'all' or 'lora_only'")
        known = self.init_lora_weights in (True, False, "gaussian")
        self.require(known, "init_lora_weights", "True, 'gaussian' or False")

    @property
    def patterns(self) -> dict[str, dict]:
        """The fields that map layer patterns to values; each pattern must match a target."""
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def build(self, site: Site) -> Delta:
        """Return the low-rank delta at `site`, with the layer's own rank and alpha."""
        r = self.rank_pattern.get(pattern_key(self.rank_pattern, site.name) or "", self.r)
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, site.name) or "", self.lora_alpha)
        scale = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        kind = EmbeddingLora if site.kind == "embedding" else LinearLora
        return kind(site, r, scale, self.lora_dropout, self.init_lora_weights)


class LinearLora(Delta):
    """`y + s · B A dropout(x)` for a linear map."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float, init: bool | str) -> None:
        super().__init__()
        self.scale = scale
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # Made and filled in PEFT's order, so that one seed gives the same adapter in both.
        self.lora_A = nn.Linear(site.in_features, r, bias=False, device=site.near)
        self.lora_B = nn.Linear(r, site.out_features, bias=False, device=site.near)
        if init is True:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        elif init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / r)
        if init:
            nn.init.zeros_(self.lora_B.weight)
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)`, `y (..., out)` to `(..., out)`; computes in x's dtype whatever the adapter is kept in."""
        z = F.linear(self.lora_dropout(x), self.lora_A.weight.to(x.dtype))
        B = self.lora_B.weight.to(x.dtype)
        # Product, scale and sum in one pass over y, and nothing of y's size kept for the backward pass.
        rows = y.reshape(-1, y.shape[-1])
        return torch.addmm(rows, z.reshape(-1, z.shape[-1]), B.t(), alpha=self.scale).view_as(y)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(A (r, in), B (out, r), scale)`: the update is `scale · B A`."""
        return self.lora_A.weight, self.lora_B.weight, self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · B A` and the bias as it is."""
        return add_low_rank(weight, *self.factors()), bias


class EmbeddingLora(Delta):
    """`y + s · (B A)[:, x]` for an embedding whose rows `x` numbers."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float, init: bool | str) -> None:
        super().__init__()
        self.scale = scale
        self.lora_embedding_A = nn.Parameter(torch.randn(r, site.in_features, device=site.near))
        self.lora_embedding_B = nn.Parameter(torch.randn(site.out_features, r, device=site.near))
        if init:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map row numbers `x (...)` and the frozen rows `y (..., dim)` to `(..., dim)`."""
        A, B, scale = self.factors()
        return y + F.linear(F.embedding(x, A.t()), B).to(y.dtype) * scale

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(A (r, rows), B (dim, r), scale)`."""
        return self.lora_embedding_A, self.lora_embedding_B, self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · B A` for `W (dim, rows)`."""
        return add_low_rank(weight, *self.factors()), bias


def add_low_rank(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `W (out, in) + s · B (out, r) A (r, in)` in W's dtype."""
    return weight + (B.to(weight.dtype) @ A.to(weight.dtype)) * scale
