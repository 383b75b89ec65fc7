"""OFT: y = W Rᵀ x + b, where R rotates blocks of k inputs; each block R_i (k, k) is orthogonal, or nearly so.

A block comes from a skew-symmetric Q_i, stored as its k (k - 1) / 2 values above the diagonal, by n terms of a series
or by the Cayley transform:

    R = I + 2 Q + 2 Q² + … + 2 Q^(n-2) + Q^(n-1) ≈ (I + Q) (I - Q)^-1        the default
    R = (I - Q) (I + Q)^-1                                                   use_cayley_neumann=False

The two rotate in opposite directions for the same Q: a file only works with the setting it was trained with.

A part x_i (k) of the input, as a row, becomes x_i R_i. It is computed as x_i + x_i (R_i - I), so that only the change
is rounded. Q starts at zero, so the model starts unchanged. Parameters added per layer: in · (k - 1) / 2. Merged: W Rᵀ.

At a convolution without groups R rotates the `in · kernel size` values that an output sees, as where PEFT is merged.
Its forward pass rotates overlapping patches and adds them up, which changes the output even at the start.

Papers: OFT https://arxiv.org/abs/2306.07280, OFTv2 https://arxiv.org/abs/2506.19847. File format: PEFT's
`oft_R.weight (in / k, k (k - 1) / 2)`; for an embedding, whose output is rotated, `oft_embedding_R.weight`.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, BaseForward, Site
from ..core.adapters.peft_config import BIAS_HELP, FAN_IN_FAN_OUT_HELP, TargetedConfig, setting
from ..errors import ConfigError


@dataclass
class OFTConfig(TargetedConfig):
    """OFT: an orthogonal, block-diagonal rotation of a linear layer's input; PEFT's field names and defaults."""

    name: ClassVar = "oft"
    prefix: ClassVar = "oft_"
    learning_rate: ClassVar = 4e-4
    kinds: ClassVar = ("linear", "embedding", "conv")
    short_names: ClassVar = {"block_size": "oft_block_size", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"target_modules": "all-linear"}

    r: int = setting(0, "number of blocks; 0: oft_block_size gives it; one of the two must be 0", ge=0)
    oft_block_size: int = setting(
        32, "inputs rotated together, at least 2; 0: r gives it; becomes the nearest divisor of the inputs", ge=0
    )
    module_dropout: float = setting(0.0, "fraction of the blocks that are the identity in one step", ge=0, lt=1)
    fan_in_fan_out: bool = setting(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "oft_only"] = setting("none", BIAS_HELP)
    init_weights: bool = setting(True, "True: zeros, so that R is the identity; False: normal with std 0.1, for tests")
    coft: bool = setting(False, "keep the rotation small: ‖Q_i‖ at most eps / √(number of blocks)")
    eps: float = setting(6e-5, "limit of the rotation with coft", gt=0)
    block_share: bool = setting(False, "one block for all parts of the input")
    use_cayley_neumann: bool = setting(
        True, "compute R by the series, which is faster; False: by the exact transform, which rotates the opposite way"
    )
    num_cayley_neumann_terms: int = setting(5, "terms of the series; 3 means 4, as in PEFT", ge=2, le=1000)

    def check(self) -> None:
        super().check()
        self.require(self.oft_block_size != 1, "oft_block_size", "0, or at least 2: a single input cannot rotate")
        one_given = (self.r == 0) != (self.oft_block_size == 0)
        self.require(one_given, "oft_block_size", f"above 0 where r is 0, else 0; r is {self.r}")

    def build(self, site: Site) -> AdapterModule:
        """Return the rotation at `site`; a block size of 1, which rotates nothing, is refused, and others may warn."""
        if site.kind == "conv":
            site.require_ungrouped("OFT")
        width = site.out_features if site.kind == "embedding" else site.in_features
        size = width // nearest_divisor(width, self.r) if self.r else nearest_divisor(width, self.oft_block_size)
        layer = f"{site.name} has {width} {'columns' if site.kind == 'embedding' else 'inputs'}"
        fits = size * self.r == width if self.r else size == self.oft_block_size
        if not site.loading and size == 1:  # a file keeps the size it was trained with
            smallest = next((d for d in range(2, width + 1) if width % d == 0), None)
            hint = f"{'r=0, ' if self.r else ''}oft_block_size={smallest}, or " if smallest else ""
            message = f"{layer}, which no block size near the configured one divides"
            raise ConfigError(message, "a block of at least 2", f"{hint}leave the layer out")
        if not site.loading and not fits:
            configured = f"r={self.r}" if self.r else f"oft_block_size={self.oft_block_size}"
            warnings.warn(f"{layer}: its blocks have size {size} instead of {configured}", stacklevel=2)
        cls = {"embedding": EmbeddingOft, "conv": ConvOft}.get(site.kind, LinearOft)
        return cls(BlockRotation(width, size, site, self))


class BlockRotation(nn.Module):
    """Blocks (k, k) that rotate the last dimension, `width`, of its input."""

    def __init__(self, width: int, block_size: int, site: Site, config: OFTConfig) -> None:
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

    neutral: ClassVar = {"oft_R.weight": 0.0}

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

    neutral: ClassVar = {"oft_embedding_R.weight": 0.0}

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
