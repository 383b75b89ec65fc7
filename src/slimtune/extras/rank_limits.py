"""The largest rank that a layer of a size can be meant to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..core.adapters.adapter_module import AdapterSite

MOST_FREE_RANK, RANKS_PER_WIDTH = 4096, 16
"""A rank above both, 4096 and 16 times a layer's larger side, is a typing error: no low-rank update of a layer needs
more ranks than its smaller side."""


def require_rank_fitting_layer_size(site: AdapterSite, rank: int, field: str = "r") -> int:
    """Return the rank; raise ConfigError, which names its field, if the factors of that rank dwarf the layer."""
    largest = max(MOST_FREE_RANK, RANKS_PER_WIDTH * max(site.in_features, site.out_features))
    if rank > largest:
        raise ConfigError(
            f"{field} is {rank:,} for {site.name}, a layer of {site.in_features:,} inputs and "
            f"{site.out_features:,} outputs",
            f"up to {largest:,}",
            field=field,
        )
    return rank
