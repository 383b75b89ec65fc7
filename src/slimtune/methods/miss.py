"""MiSS: y = W x + b + Dᵀ S x, where S x is the sum of the input's parts of r values each.

D (r, out), S x = Σ_i x[i r : (i + 1) r]; an input whose size r does not divide is padded with zeros. Every r-th column
of the weight gets the same update: a matrix of rank r. Parameters added per layer: r · out, half of LoRA's where
in = out. D starts at zero, so the model starts unchanged. Merged: W + Dᵀ S.

    "mini"  D (r, mini_r), repeated along the outputs: r · mini_r parameters
    "bat"   D (out / r, r, r): the block W_oi (r, r) of the weight becomes W_oi + W_oi D_o + D_o: an update that depends
            on the weight. r · out parameters; it reads and changes the whole weight in each forward pass.

Paper: https://arxiv.org/abs/2409.15371. File format: PEFT's `miss_block`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, BaseForward, Site
from ..core.adapters.peft_config import BIAS_HELP, TargetedConfig, setting
from ..core.kernels.dropout import dropout
from ..core.kernels.linear_layers import is_quantized
from ..core.kernels.recompute import recompute_linear
from ..errors import ConfigError


@dataclass
class MissConfig(TargetedConfig):
    """MiSS: one low-rank update shared by every part of the input; PEFT's field names and defaults."""

    name: ClassVar = "miss"
    prefix: ClassVar = "miss_"
    learning_rate: ClassVar = 5e-4
    short_names: ClassVar = {"rank": "r", "dropout": "miss_dropout", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"r": 32, "target_modules": "all-linear"}

    r: int = setting(64, "length of a part of the input, and rank; at most the layers' inputs", ge=1)
    miss_dropout: float = setting(0.0, 'probability of dropping an input of the update; not with "bat"', ge=0, lt=1)
    mini_r: int = setting(1, 'outputs after which "mini" repeats D; must divide the layers\' outputs', ge=1)
    init_weights: bool | Literal["bat", "mini"] = setting(
        True,
        'True: plain; "mini": D repeated along the outputs; "bat": an update that depends on W; False: random start',
    )
    bias: Literal["none", "all", "MiSS_only"] = setting("none", BIAS_HELP)

    def check(self) -> None:
        super().check()
        self.require(not (self.init_weights == "bat" and self.miss_dropout), "miss_dropout", "0 with 'bat'")

    def build(self, site: Site) -> AdapterModule:
        in_, out, r, bat = site.in_features, site.out_features, self.r, self.init_weights == "bat"
        layer = f"{site.name} ({in_} inputs, {out} outputs)"
        if r > in_:
            message = f"`r` ({r}) must be less than or equal to in_features ({in_}) of {site.name}"
            raise ConfigError(message, hint=f"r={in_}")
        if bat and (in_ % r or out % r):
            hint = f"r={math.gcd(in_, out)}"
            raise ConfigError(f"r is {r}, at {layer}", "a divisor of both with init_weights='bat'", hint)
        if self.init_weights == "mini" and out % self.mini_r:
            hint = f"mini_r={math.gcd(out, self.mini_r)}"
            raise ConfigError(f"mini_r is {self.mini_r}, at {layer}", "a divisor of the outputs", hint)
        return (LinearBat if bat else LinearMiss)(site, self)


class LinearMiss(AdapterModule):
    """`y + Dᵀ S x` for a linear layer."""

    neutral: ClassVar = {"miss_block": 0.0}

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
        r, width = self.miss_block.shape
        x = F.pad(x, (0, -x.shape[-1] % r)) if x.shape[-1] % r else x
        part_sum = self.miss_dropout(x).unflatten(-1, (-1, r)).sum(-2)
        update = part_sum @ self.miss_block.to(x.dtype)
        if width == self.out_features:
            return y + update
        return (y.unflatten(-1, (-1, width)) + update.unsqueeze(-2)).flatten(-2)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(S (r, in), Dᵀ (out, r), 1)`."""
        r, width = self.miss_block.shape
        S = torch.eye(r, dtype=self.miss_block.dtype, device=self.miss_block.device)
        S = S.repeat(1, -(-self.in_features // r))[:, : self.in_features]
        return S, self.miss_block.repeat(1, self.out_features // width).t(), 1.0


class LinearBat(AdapterModule):
    """`y + (W D + D) x`, block by block."""

    neutral: ClassVar = {"miss_block": 0.0}

    def __init__(self, site: Site, config: MissConfig) -> None:
        super().__init__()
        blocks = site.out_features // config.r
        self.miss_block = nn.Parameter(torch.zeros(blocks, config.r, config.r, device=site.init_device))
        self.to(site.device, site.dtype)

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        y = base(x)
        # The backward pass computes the weight's update again; with a quantized base it dequantizes again, too.
        if is_quantized(base.module) and not base.inner_modules:
            return y + recompute_linear(lambda D: _block_update(base.weight(), D), x, self.miss_block)
        return y + recompute_linear(_block_update, x, base.weight(), self.miss_block)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + _block_update(weight, self.miss_block), bias


def _block_update(weight: Tensor, D: Tensor) -> Tensor:
    """Return `W_oi D_o + D_o` for the blocks `(r, r)` of a weight `(out, in)`, `D (out / r, r, r)`."""
    r = D.shape[-1]
    D = D.to(weight.dtype)
    blocks = weight.reshape(-1, r, weight.shape[1] // r, r).transpose(1, 2)
    return (blocks @ D[:, None] + D[:, None]).transpose(1, 2).reshape(weight.shape)
