"""OFT: y = W Rᵀ x + b, with the input turned by blocks R_i (k, k) that are orthogonal, or nearly so.

A block is made from a skew-symmetric Q_i, kept as its k (k - 1) / 2 values above the diagonal, by n terms of a series
or by the Cayley map:

    R = I + 2 Q + 2 Q² + … + 2 Q^(n-2) + Q^(n-1) ≈ (I + Q) (I - Q)^-1        the default
    R = (I - Q) (I + Q)^-1                                                   use_cayley_neumann=False

The two turn opposite ways for one Q: a file is right only with the setting it was trained with.

A part x_i (k) of the input, as a row, becomes x_i R_i. It is run as x_i + x_i (R_i - I), which rounds the change alone;
Q starts at zero, so the model starts unchanged. Parameters added per layer: in · (k - 1) / 2. Merged: W Rᵀ.

Papers: OFT https://arxiv.org/abs/2306.07280, OFTv2 https://arxiv.org/abs/2506.19847. File format: PEFT's
`oft_R.weight (in / k, k (k - 1) / 2)`, for an embedding, whose output is turned, `oft_embedding_R.weight`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterModule, BaseForward, Site, SiteKind
from ..adapters.config import TargetedConfig
from ..errors import ConfigError


@dataclass
class OFTConfig(TargetedConfig):
    """OFT: an orthogonal, block-diagonal turn of the input of frozen linear maps; PEFT's names and defaults.

    Args:
        r: number of blocks, 1 and up; 0: `oft_block_size` says it. One of the two is 0.
        oft_block_size: inputs turned together, 2 and up; 0: `r` says it. Either becomes the nearest number that divides
            a layer's inputs, with a warning; a block of 1, which turns nothing, is refused.
        module_dropout: probability in [0, 1): this share of a layer's blocks is the identity for one training step.
        fan_in_fan_out: the base stores its weights as (in, out); known by itself for GPT-2's Conv1D.
        bias: which biases of the base train too: "none", "oft_only" (of adapted layers) or "all".
        init_weights: True: zeros, the identity; False: normal with std 0.1, for tests.
        coft: keep the turn small: ‖Q_i‖ at most eps / √(number of blocks).
        eps: see coft, above 0.
        block_share: one block for all parts of the input.
        use_cayley_neumann: the series, faster and orthogonal up to its last term; False: the exact map, which solves a
            system of k equations for each block, and turns the other way.
        num_cayley_neumann_terms: terms of the series, 2 and up; 3 are 4, as in PEFT.
    """

    name: ClassVar[str] = "oft"
    learning_rate: ClassVar[float] = 4e-4
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear", "embedding")
    short_names: ClassVar[dict[str, str]] = {"block_size": "oft_block_size", "targets": "target_modules"}
    recipe_defaults: ClassVar[dict[str, Any]] = {"target_modules": "all-linear"}

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def check(self) -> None:
        """Check ranges, and that one of `r` and `oft_block_size` is 0."""
        super().check()
        # PEFT reads the meaning of the series from this: it was another before 0.18.
        self.peft_version = self.peft_version or "0.18.0"
        for name, least in (("r", 0), ("oft_block_size", 0), ("num_cayley_neumann_terms", 2)):
            self.require_whole(name, least)
        self.require(self.oft_block_size != 1, "oft_block_size", "0, or 2 and up: one input alone cannot turn")
        one = (self.r == 0) != (self.oft_block_size == 0)
        self.require(one, "oft_block_size", f"above 0 where r is 0, and 0 where it is not: r is {self.r}")
        self.require_share("module_dropout")
        self.require(self.bias in ("none", "all", "oft_only"), "bias", "'none', 'all' or 'oft_only'")
        self.require(self.init_weights in (True, False), "init_weights", "True or False")
        self.require_above_zero("eps")

    def build(self, site: Site) -> AdapterModule:
        """Return the turn at `site`.

        Raises:
            ConfigError: the nearest block is one of 1, which turns nothing.
        """
        width = site.out_features if site.kind == "embedding" else site.in_features
        block = width // divisor(width, self.r) if self.r else divisor(width, self.oft_block_size)
        if not site.loading:  # a file is taken as it was trained
            self._tell(site, width, block)
        return EmbeddingOft(site, block, self) if site.kind == "embedding" else LinearOft(site, block, self)

    def _tell(self, site: Site, width: int, block: int) -> None:
        """Refuse blocks of 1, and warn where they are not of the size asked for."""
        what = f"{width} {'columns' if site.kind == 'embedding' else 'inputs'}"
        if block == 1:
            least = next((d for d in range(2, width + 1) if width % d == 0), None)
            size = f"{'r=0, ' if self.r else ''}oft_block_size={least}, or " if least else ""
            raise ConfigError(
                f"{site.name} has {what}, of which no block near the size asked for can be made",
                "a block of 2 and up",
                f"{size}leave the layer out",
            )
        if block * self.r != width if self.r else block != self.oft_block_size:
            asked = f"r={self.r}" if self.r else f"oft_block_size={self.oft_block_size}"
            warnings.warn(f"{site.name} has {what}: its blocks are of {block}, not as {asked} asks", stacklevel=2)


class Turn(nn.Module):
    """Blocks (k, k) that turn the last dimension, `width`, of what it is called with."""

    def __init__(self, width: int, block: int, site: Site, config: OFTConfig) -> None:
        super().__init__()
        self.block = block
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.eps, self.dropout = config.eps if config.coft else None, config.module_dropout
        count = 1 if config.block_share else width // self.block
        values = torch.zeros(count, self.block * (self.block - 1) // 2, device=site.init_device)
        self.weight = nn.Parameter(values if config.init_weights else values.normal_(std=0.1))
        self.to(site.device, site.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., width)`, parts of k, to `x R`."""
        change = self.change().to(x.dtype)
        parts = x.reshape(-1, x.shape[-1] // self.block, self.block)
        if len(change) == 1:
            flat = parts.reshape(-1, self.block)
            return torch.addmm(flat, flat, change[0]).view_as(x)
        by_block = parts.transpose(0, 1)
        return torch.baddbmm(by_block, by_block, change).transpose(0, 1).reshape(x.shape)

    def turned(self, weight: Tensor) -> Tensor:
        """Return `W Rᵀ` for `W (..., width)`."""
        parts, change = weight.unflatten(-1, (-1, self.block)), self.change(weight.dtype)
        change = change.expand(parts.shape[-2], -1, -1)
        return weight + torch.einsum("orc,rkc->ork", parts, change).flatten(-2)

    def change(self, wide: torch.dtype = torch.float32) -> Tensor:
        """Return R - I for each block, `(blocks or 1, k, k)`, in this precision at least."""
        values = self._values()
        values = values.to(torch.promote_types(values.dtype, wide))
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=values.device)
        Q = values.new_zeros(len(values), self.block, self.block)
        Q[:, rows, columns] = values
        change = self._cayley(Q - Q.mT)
        if self.training and self.dropout and len(change) > 1:
            dropped = torch.arange(len(change)) < int(self.dropout * len(change))
            kept = ~dropped[torch.randperm(len(change))].to(change.device)
            change = change * kept[:, None, None]
        return change

    def _cayley(self, Q: Tensor) -> Tensor:
        if self.terms is None:
            return torch.linalg.solve(torch.eye(self.block, dtype=Q.dtype, device=Q.device) + Q, -2 * Q, left=False)
        if self.terms == 2:
            return 2 * Q
        change, power = 2 * Q, Q
        for _ in range(max(self.terms, 4) - 3):
            power = power @ Q
            change = change + 2 * power
        return change + power @ Q

    def _values(self) -> Tensor:
        """Return Q's values; with COFT the nearest that it allows, which training goes on from."""
        if self.eps is None:
            return self.weight
        with torch.no_grad():
            # Frobenius norms of Q, which holds each value twice.
            norm = self.weight.norm(dim=1, keepdim=True) * 2**0.5
            most = self.eps / len(norm) ** 0.5
            near = torch.where(norm <= most, self.weight, self.weight * (most / norm))
            if self.training:
                self.weight.copy_(near)
        return near + (self.weight - self.weight.detach())  # its values, the gradient of the weight


class LinearOft(AdapterModule):
    """The map of a turned input."""

    def __init__(self, site: Site, block: int, config: OFTConfig) -> None:
        super().__init__()
        self.oft_R = Turn(site.in_features, block, site, config)

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Turn `x (..., in)`, then map it."""
        return frozen(self.oft_R(x))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W Rᵀ` and the bias as it is."""
        return self.oft_R.turned(weight), bias


class EmbeddingOft(AdapterModule):
    """The turned rows of an embedding."""

    def __init__(self, site: Site, block: int, config: OFTConfig) -> None:
        super().__init__()
        self.oft_embedding_R = Turn(site.out_features, block, site, config)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Turn the rows `y (..., dim)`."""
        return self.oft_embedding_R(y)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight `(dim, rows)` with its rows turned."""
        return self.oft_embedding_R(weight.t()).t(), bias


def divisor(size: int, near: int) -> int:
    """Return the divisor of `size` next to `near`, the smaller of two as near (PEFT's rule)."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - near), d))
