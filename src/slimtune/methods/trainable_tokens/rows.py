"""Rows that train in place of the base's, at an embedding and at a head; tied modules share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.base import AdapterModule, BaseForward, Site
from ...utils.linear_layers import get_weight
from .places import Place


def token_delta(site: Site, place: Place, made: Mapping[str, AdapterModule], start: bool = True) -> AdapterModule:
    """Return the delta at one place; `made` holds those of the owners, by name."""
    owner: Any = None if place.owner is None else made[place.owner]
    return (TokenEmbedding if site.kind == "embedding" else TokenHead)(site, place, start, owner)


class _Rows(AdapterModule):
    """Holds the rows `V (k, d)` and their numbers, in V's order and sorted.

    Args:
        site: where.
        place: which rows, and whether a file holds shared ones under this name, too.
        start: start as the base's rows.
        owner: the delta whose rows are shared; None: these are its own.
    """

    def __init__(self, site: Site, place: Place, start: bool, owner: _Rows | None = None) -> None:
        super().__init__()
        # In a tuple, so that the owner's parameter is registered once.
        self.held, self.told = () if owner is None else (owner,), place.told
        if owner is not None:
            self.optional = frozenset({"trainable_tokens_delta"})  # type: ignore[misc]
            return
        rows = place.rows
        numbers = torch.tensor(rows, device=site.device)
        weight = get_weight(site.module).detach()
        if site.kind == "embedding":
            weight = weight.t()
        if start:
            values = weight[numbers].to(site.dtype)
        else:
            values = torch.randn(len(rows), weight.shape[1], dtype=weight.dtype, device=site.init_device)
        self.trainable_tokens_delta = nn.Parameter(values.to(site.device, site.dtype, copy=True))
        order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), device=site.device)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("ascending", numbers[order], persistent=False)

    def values(self) -> tuple[Tensor, Any]:
        """Return V and the delta that holds it."""
        return self.held[0].values() if self.held else (self.trainable_tokens_delta, self)

    def tensors(self) -> dict[str, Tensor]:
        """Return V; where it is shared a copy, if a file holds it under this name, too: what is read in is dropped."""
        if not self.held:
            return super().tensors()
        return {"trainable_tokens_delta": self.values()[0].detach().clone()} if self.told else {}


class TokenEmbedding(_Rows):
    """Chosen rows of an embedding."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map row numbers `x (...)` and the frozen rows `y (..., d)` to `(..., d)`."""
        V, own = self.values()
        at = torch.searchsorted(own.ascending, x).clamp(max=len(own.ascending) - 1)
        mine = F.embedding(own.order[at], V).to(y.dtype)
        return torch.where((own.ascending[at] == x)[..., None], mine, y)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W (d, rows)` with its chosen columns replaced."""
        V, own = self.values()
        return weight.index_copy(1, own.numbers, V.to(weight.dtype).t()), bias


class TokenHead(_Rows):
    """Chosen rows of a linear map."""

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., d)` to logits `(..., rows)`."""
        V, own = self.values()
        change = V - frozen.weight().detach()[own.numbers].to(V.dtype)
        return frozen(x).index_add(-1, own.numbers, F.linear(x, change.to(x.dtype)))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W (rows, d)` with its chosen rows replaced."""
        V, own = self.values()
        return weight.index_copy(0, own.numbers, V.to(weight.dtype)), bias
