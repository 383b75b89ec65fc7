"""MiSS's adapter modules."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.kernels.dropout import make_dropout
from ...core.kernels.linear_layers import is_quantized
from ...core.kernels.recompute import linear_recomputing_weight
from .miss_config import MissConfig


class LinearMiss(AdapterModule):
    """`y + Dᵀ S x` for a linear layer."""

    no_op_values: ClassVar = {"miss_block": 0.0}

    def __init__(self, site: AdapterSite, config: MissConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = site.in_features, site.out_features
        self.miss_dropout = make_dropout(config.miss_dropout)
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

    no_op_values: ClassVar = {"miss_block": 0.0}

    def __init__(self, site: AdapterSite, config: MissConfig) -> None:
        super().__init__()
        blocks = site.out_features // config.r
        self.miss_block = nn.Parameter(torch.zeros(blocks, config.r, config.r, device=site.init_device))
        self.to(site.device, site.dtype)

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        y = base(x)
        # The backward pass computes the weight's update again; with a quantized base it dequantizes again, too.
        if is_quantized(base.module) and not base.inner_modules:
            return y + linear_recomputing_weight(lambda D: _block_update(base.weight(), D), x, self.miss_block)
        return y + linear_recomputing_weight(_block_update, x, base.weight(), self.miss_block)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + _block_update(weight, self.miss_block), bias


def _block_update(weight: Tensor, D: Tensor) -> Tensor:
    """Return `W_oi D_o + D_o` for the blocks `(r, r)` of a weight `(out, in)`, `D (out / r, r, r)`."""
    r = D.shape[-1]
    D = D.to(weight.dtype)
    blocks = weight.reshape(-1, r, weight.shape[1] // r, r).transpose(1, 2)
    return (blocks @ D[:, None] + D[:, None]).transpose(1, 2).reshape(weight.shape)
