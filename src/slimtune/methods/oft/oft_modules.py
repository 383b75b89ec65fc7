"""OFT's adapter modules."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from .oft_config import OFTConfig


class BlockRotation(nn.Module):
    """Blocks (k, k) that rotate the last dimension, `width`, of its input."""

    def __init__(self, width: int, block_size: int, site: AdapterSite, config: OFTConfig) -> None:
        super().__init__()
        self.block_size = block_size
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.eps, self.dropout = config.eps if config.coft else None, config.module_dropout
        blocks = 1 if config.block_share else width // block_size
        values = torch.zeros(blocks, block_size * (block_size - 1) // 2, device=site.init_device)
        self.weight = nn.Parameter(values if config.init_weights else values.normal_(std=0.1))
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor, drop: bool = True) -> Tensor:
        """Map `x (..., width)` to `x R`, block by block; without `drop` no block is dropped while training."""
        change = self.rotation_minus_identity(drop=drop).to(x.dtype)
        parts = x.reshape(-1, x.shape[-1] // self.block_size, self.block_size)
        if len(change) == 1:
            flat = parts.reshape(-1, self.block_size)
            return torch.addmm(flat, flat, change[0]).view_as(x)
        by_block = parts.transpose(0, 1)
        return torch.baddbmm(by_block, by_block, change).transpose(0, 1).reshape(x.shape)

    def rotate_weight(self, weight: Tensor, drop: bool = False) -> Tensor:
        """Return `W Rᵀ` for `W (..., width)`."""
        parts, change = weight.unflatten(-1, (-1, self.block_size)), self.rotation_minus_identity(weight.dtype, drop)
        change = change.expand(parts.shape[-2], -1, -1)
        return weight + torch.einsum("orc,rkc->ork", parts, change).flatten(-2)

    def rotation_minus_identity(self, min_dtype: torch.dtype = torch.float32, drop: bool = False) -> Tensor:
        """Return R - I for each block, `(blocks or 1, k, k)`, in `min_dtype` or a wider dtype."""
        values = self.weight if self.eps is None else self._limit_values(self.eps)
        values = values.to(torch.promote_types(values.dtype, min_dtype))
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1, device=values.device)
        Q = values.new_zeros(len(values), self.block_size, self.block_size)
        Q[:, rows, columns] = values
        change = self._cayley(Q - Q.mT)
        if drop and self.training and self.dropout and len(change) > 1:
            dropped = torch.arange(len(change)) < int(self.dropout * len(change))
            kept = ~dropped[torch.randperm(len(change))].to(change.device)
            change = change * kept[:, None, None]
        return change

    def _cayley(self, Q: Tensor) -> Tensor:
        if self.terms is None:
            identity = torch.eye(self.block_size, dtype=Q.dtype, device=Q.device)
            return torch.linalg.solve(identity + Q, -2 * Q, left=False)
        if self.terms == 2:
            return 2 * Q
        change, power = 2 * Q, Q
        for _ in range(max(self.terms, 4) - 3):
            power = power @ Q
            change = change + 2 * power
        return change + power @ Q

    def _limit_values(self, eps: float) -> Tensor:
        """Return COFT's values: Q's nearest ones within its limit, which replace them while training."""
        with torch.no_grad():
            # Frobenius norms of Q, which contains each value twice.
            norm = self.weight.norm(dim=1, keepdim=True) * 2**0.5
            limit = eps / len(norm) ** 0.5
            projected = torch.where(norm <= limit, self.weight, self.weight * (limit / norm))
            if self.training:
                self.weight.copy_(projected)
        return projected + (self.weight - self.weight.detach())  # the projected values with the weight's gradient


class LinearOft(AdapterModule):
    """A linear layer with a rotated input."""

    no_op_values: ClassVar = {"oft_R.weight": 0.0}

    def __init__(self, rotation: BlockRotation) -> None:
        super().__init__()
        self.oft_R = rotation

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        return base(self.oft_R(x))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.oft_R.rotate_weight(weight), bias


class ConvOft(LinearOft):
    """A convolution with a rotated weight."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        y, weight = base(x), base.weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # A 16-bit rotated weight would lose small rotations.
        return y + base.convolve(x, (self.oft_R.rotate_weight(wide, drop=True) - wide).to(x.dtype))


class EmbeddingOft(AdapterModule):
    """An embedding with rotated rows."""

    no_op_values: ClassVar = {"oft_embedding_R.weight": 0.0}

    def __init__(self, rotation: BlockRotation) -> None:
        super().__init__()
        self.oft_embedding_R = rotation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.oft_embedding_R(y)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.oft_embedding_R(weight.t(), drop=False).t(), bias


def nearest_divisor(size: int, target: int) -> int:
    """Return the divisor of `size` nearest to `target`; of two the smaller one (PEFT's rule)."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - target), d))
