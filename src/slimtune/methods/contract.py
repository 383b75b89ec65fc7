"""The contract between a method and the one adapted layer.

A method that changes a map is a **delta**: `forward(x, y) -> y'` beside the frozen `y = W x + b`, and, where the method
can, `merged(W) -> W'`. It never sees another adapter, a quantized weight or a transposed layout: the adapted layer
(`adapt/layer.py`) owns those. Shapes: `x (..., in)`, `y (..., out)`, `W (out, in)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One place in the base where a method may add a delta.

    Args:
        name: dotted name of the module in the base.
        kind: `"linear"`: `x (..., in)` is real; `"embedding"`: `x (...)` holds row numbers below `in_features`.
        in_features: columns of `W`.
        out_features: rows of `W`.
        device: where the base's weight lies.
        dtype: dtype the adapter's parameters get.
    """

    name: str
    kind: Literal["linear", "embedding"]
    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype


class Delta(nn.Module):
    """What a method adds beside one frozen map."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map the input `x (..., in)` and the frozen output `y (..., out)` to the adapted output `(..., out)`."""
        raise TypeError(f"{type(self).__name__} defines no forward(x, y)")

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight `(out, in)` that alone does what `weight` and this delta do together, as a new tensor.

        Raises:
            MergeRefused: the method's change is no change of a weight.
        """
        raise MergeRefused(f"{type(self).__name__} cannot be merged into a weight")


class MergeRefused(ValueError):
    """A delta is no change of a weight."""
