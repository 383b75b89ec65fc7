"""MiSS: y = W x + b + Dᵀ S x, with S x the sum of the input's parts of r values each.

D (r, out), S x = Σ_i x[i r : (i + 1) r], an input that r does not divide being filled up with zeros. Every r-th column
of the weight shares one update: a matrix of rank r. Parameters added per layer: r · out, half of LoRA's where in = out.
D starts at zero, so the model starts unchanged. Merged: W + Dᵀ S.

    "mini"  D (r, mini_r), repeated along the outputs: r · mini_r parameters
    "bat"   D (out / r, r, r): the block W_oi (r, r) of the weight becomes W_oi + W_oi D_o + D_o: an update that depends
            on the weight. r · out parameters; it reads and changes the whole weight in each forward pass.

Paper: https://arxiv.org/abs/2409.15371. File format: PEFT's `miss_block`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import AdapterModule, BaseForward, Site
from ..adapters.config import TargetedConfig
from ..errors import ConfigError
from ..kernels.dropout import dropout
from ..kernels.recompute_linear import recompute_linear
from ..utils.linear_layers import is_quantized


@dataclass
class MissConfig(TargetedConfig):
    """MiSS: one low-rank update shared by every part of the input; PEFT's names and defaults.

    Args:
        r: length of a part of the input, and rank, 1 up to the layers' inputs.
        miss_dropout: probability in [0, 1) of dropping an input of the update while training; not with "bat".
        mini_r: outputs after which "mini" repeats itself, 1 and up; must divide the layers' outputs.
        init_weights: True: the plain form; "mini" or "bat": see the top of the method's file; False: the plain form
            with a random start, for tests.
        bias: which biases of the base train too: "none", "MiSS_only" (of adapted layers) or "all".
    """

    name: ClassVar[str] = "miss"
    learning_rate: ClassVar[float] = 5e-4
    short_names: ClassVar[dict[str, str]] = {"rank": "r", "dropout": "miss_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar[dict[str, object]] = {"r": 32, "target_modules": "all-linear"}

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: Literal["none", "all", "MiSS_only"] = "none"

    def check(self) -> None:
        """Check ranges: sizes of 1 and up, dropout in [0, 1), a known form."""
        super().check()
        self.require_whole("r")
        self.require_whole("mini_r")
        self.require_share("miss_dropout")
        self.require(self.init_weights in (True, False, "bat", "mini"), "init_weights", "True, 'bat', 'mini' or False")
        self.require(not (self.init_weights == "bat" and self.miss_dropout), "miss_dropout", "0 with 'bat'")
        self.require(self.bias in ("none", "all", "MiSS_only"), "bias", "'none', 'MiSS_only' or 'all'")

    def build(self, site: Site) -> AdapterModule:
        """Return the delta at `site`; a size that the layer's do not allow is refused by name."""
        in_, out, r, bat = site.in_features, site.out_features, self.r, self.init_weights == "bat"
        at = f"{site.name} ({in_} inputs, {out} outputs)"
        if r > in_ or (bat and (in_ % r or out % r)):
            wanted = "a divisor of both with init_weights='bat'" if bat else f"at most {in_}"
            raise ConfigError(f"r is {r}, at {at}", wanted, f"r={math.gcd(in_, out) if bat else in_}")
        if self.init_weights == "mini" and out % self.mini_r:
            fix = f"mini_r={math.gcd(out, self.mini_r)}"
            raise ConfigError(f"mini_r is {self.mini_r}, at {at}", "a divisor of the outputs", fix)
        return (Bat if bat else LinearMiss)(site, self)


class LinearMiss(AdapterModule):
    """`y + Dᵀ S x` for a linear map."""

    def __init__(self, site: Site, config: MissConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = site.in_features, site.out_features
        self.miss_dropout = dropout(config.miss_dropout)
        width = config.mini_r if config.init_weights == "mini" else site.out_features
        self.miss_block = nn.Parameter(torch.zeros(config.r, width, device=site.init_device))
        if config.init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)`, `y (..., out)` to `(..., out)`."""
        r, width = self.miss_block.shape
        x = F.pad(x, (0, -x.shape[-1] % r)) if x.shape[-1] % r else x
        summed = self.miss_dropout(x).unflatten(-1, (-1, r)).sum(-2)
        update = summed @ self.miss_block.to(x.dtype)
        if width == self.out_features:
            return y + update
        return (y.unflatten(-1, (-1, width)) + update.unsqueeze(-2)).flatten(-2)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(S (r, in), Dᵀ (out, r), 1)`."""
        r, width = self.miss_block.shape
        S = torch.eye(r, dtype=self.miss_block.dtype, device=self.miss_block.device)
        S = S.repeat(1, -(-self.in_features // r))[:, : self.in_features]
        return S, self.miss_block.repeat(1, self.out_features // width).t(), 1.0

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + Dᵀ S` and the bias as it is."""
        r, width = self.miss_block.shape
        columns = self.miss_block.to(weight.dtype).repeat(1, self.out_features // width).t()
        return weight + columns.repeat(1, -(-self.in_features // r))[:, : self.in_features], bias


class Bat(AdapterModule):
    """`y + (W D + D) x`, block by block."""

    def __init__(self, site: Site, config: MissConfig) -> None:
        super().__init__()
        r = config.r
        self.miss_block = nn.Parameter(torch.zeros(site.out_features // r, r, r, device=site.init_device))
        self.to(site.device, site.dtype)

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., in)` to `(..., out)`; the weight's change is made again in the backward pass, not kept."""
        y = frozen(x)
        if is_quantized(frozen.module) and not frozen.inner_modules:  # nor is a dequantized weight
            return y + recompute_linear(lambda D: _change(frozen.weight(), D), x, self.miss_block)
        return y + recompute_linear(_change, x, frozen.weight(), self.miss_block)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + W D + D`, block by block, and the bias as it is."""
        return weight + _change(weight, self.miss_block), bias


def _change(weight: Tensor, D: Tensor) -> Tensor:
    """Return `W_oi D_o + D_o` for the blocks `(r, r)` of a weight `(out, in)`, `D (out / r, r, r)`."""
    r = D.shape[-1]
    D = D.to(weight.dtype)
    blocks = weight.reshape(-1, r, weight.shape[1] // r, r).transpose(1, 2)
    return (blocks @ D[:, None] + D[:, None]).transpose(1, 2).reshape(weight.shape)
