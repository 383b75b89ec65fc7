"""Trainable tokens: some rows of the embedding train, the rest stays frozen.

    W'[i] = V[j] where i is the j-th chosen token, W[i] elsewhere        V (k, d), starts as W's own rows

For new special tokens, or for a few words that should mean something else. An output head (or another embedding) that
is tied to the embedding follows: there y = W x, and the chosen tokens' logits become V x, computed as
y + (V − W[chosen]) x, so that the start is exact. Parameters added: k · d. Merged: W with its rows replaced.

File format (PEFT's): `trainable_tokens_delta`, which holds V itself, not a difference.
https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.config import TargetedConfig
from ..contract.delta import Delta, Frozen, Kind, Site
from ..contract.patterns import named
from ..errors import TargetError, nearest
from ..ops.maps import kind_of, weight_of


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Trainable tokens: chosen rows of the embedding; PEFT's field names and defaults.

    Args:
        token_indices: numbers of the tokens that train, each at least 0 and below the size of the vocabulary.
        target_modules: names or a pattern of the embeddings; None: the model's input embedding.
        init_weights: start as the base's rows; False: random, for tests.
    """

    name: ClassVar[str] = "trainable_tokens"
    ours: ClassVar[frozenset[str]] = frozenset(
        ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"]
    )
    kinds: ClassVar[tuple[Kind, ...]] = ("embedding", "linear")
    short_names: ClassVar[dict[str, str]] = {"tokens": "token_indices", "targets": "target_modules"}

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def check(self) -> None:
        """Check that the token numbers are some."""
        super().check()
        self.require(row_numbers(self.token_indices), "token_indices", "token numbers, 0 and up, each once")

    def fill(self, model: nn.Module) -> None:
        """Fill in the name of the input embedding, as PEFT does."""
        if self.target_modules is None:
            self.target_modules = input_embedding(model)

    def further_targets(self, model: nn.Module) -> dict[str, Kind]:
        """Return what is tied to the targets."""
        return {n: p.kind for n, p in self._places(model).items() if not self._is_target(n)}

    def build_all(self, sites: Sequence[Site]) -> list[Delta]:
        """Return the deltas; tied ones share their rows."""
        found = self._places(sites[0].model) if sites else {}
        made: dict[str, Delta] = {}
        for site in sorted(sites, key=lambda s: found[s.name].owner is not None):
            made[site.name] = token_delta(site, found[site.name], made, self.init_weights)
        return [made[site.name] for site in sites]

    def _is_target(self, name: str) -> bool:
        excluded = self.exclude_modules and named(self.exclude_modules, name)
        return bool(self.target_modules and named(self.target_modules, name) and not excluded)

    def _places(self, model: nn.Module) -> dict[str, Place]:
        chosen = {n: self.token_indices for n, m in model.named_modules() if kind_of(m) and self._is_target(n)}
        return places(model, chosen, self.modules_to_save or (), told_twice=True)


class Place(NamedTuple):
    """One module in which rows train.

    Args:
        kind: "embedding" or "linear".
        rows: the numbers of the rows.
        owner: name of the module it is tied to, whose rows it shares; None: it has its own.
        told: whether a file holds the shared rows under this name, too (PEFT's method does, its LoRA does not).
    """

    kind: Kind
    rows: list[int]
    owner: str | None
    told: bool


def places(
    model: nn.Module, tokens: list[int] | Mapping[str, list[int]], whole: Collection[str], *, told_twice: bool
) -> dict[str, Place]:
    """Return the modules in which rows train, by full name; owners stand before what is tied to them.

    Args:
        model: the model.
        tokens: numbers of tokens in the input embedding; or name, or ending, of an embedding → numbers.
        whole: names of the modules trained whole, which cannot be meant, too.
        told_twice: see `Place.told`.

    Raises:
        TargetError: a name matches nothing, or is trained whole, or a number is no row.
    """
    if not isinstance(tokens, Mapping):
        tokens = {input_embedding(model): tokens}
    modules: dict[str, Any] = {n: m for n, m in model.named_modules() if kind_of(m) in ("embedding", "linear")}
    chosen: dict[str, list[int]] = {}
    for key, rows in tokens.items():
        found = [n for n in modules if named([key], n)]
        if not found:
            raise TargetError(f"trainable tokens: {key!r} matches no embedding{nearest(key, modules)}",
                              "the name of an embedding", 'the input embedding is meant by a plain list')  # fmt: skip
        chosen |= dict.fromkeys(found, rows)
    for name, rows in chosen.items():
        if any(name.endswith(w) for w in whole):
            raise TargetError(f"{name} is trained whole by modules_to_save and by its tokens, too", "one of both")
        size = weight_of(modules[name]).shape[1 if kind_of(modules[name]) == "embedding" else 0]
        if max(rows) >= size:
            raise TargetError(f"trainable tokens: {name} has no row {max(rows)}", f"numbers below {size}")
    owners: dict[int, str] = {}
    for name in sorted(chosen, key=lambda n: kind_of(modules[n]) != "embedding"):
        owners.setdefault(id(modules[name]._parameters["weight"]), name)
    found_places = {}
    for name, module in modules.items():
        owner = owners.get(id(module._parameters["weight"]))
        rows = chosen.get(name) or (chosen[owner] if owner else [])
        tied = owner is not None and owner != name and rows == chosen[owner]
        if rows:
            found_places[name] = Place(kind_of(module), rows, owner if tied else None, told_twice)  # type: ignore[arg-type]
    return dict(sorted(found_places.items(), key=lambda item: item[1].owner is not None))


def input_embedding(model: Any) -> str:
    """Return the full name of the model's input embedding; PEFT's guess where the model does not tell."""
    wanted = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((n for n, m in model.named_modules() if m is wanted), "embed_tokens")


def row_numbers(rows: Any) -> bool:
    """Return whether `rows` is a list of row numbers, each once."""
    right = isinstance(rows, list) and bool(rows) and len(set(rows)) == len(rows)
    return right and all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in rows)


def token_delta(site: Site, place: Place, made: Mapping[str, Delta], start: bool = True) -> Delta:
    """Return the delta at one place; `made` holds those of the owners, by name."""
    if place.owner is not None:
        shared: Any = made[place.owner]
        return (TiedEmbedding if site.kind == "embedding" else TiedHead)(shared, place.told)
    return (TokenEmbedding if site.kind == "embedding" else TokenHead)(site, place.rows, start)


class _Rows(Delta):
    """Holds the rows `V (k, d)` and their numbers, in V's order and sorted."""

    def __init__(self, site: Site, rows: list[int], start: bool) -> None:
        super().__init__()
        numbers = torch.tensor(rows, device=site.device)
        weight = weight_of(site.module).detach()
        if site.kind == "embedding":
            weight = weight.t()
        if start:
            values = weight[numbers].to(site.dtype)
        else:
            values = torch.randn(len(rows), weight.shape[1], dtype=weight.dtype, device=site.near)
        self.trainable_tokens_delta = nn.Parameter(values.to(site.device, site.dtype, copy=True))
        order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), device=site.device)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("ascending", numbers[order], persistent=False)

    def values(self) -> tuple[Tensor, Any]:
        """Return V and the buffers' owner."""
        return self.trainable_tokens_delta, self


class _Tied(Delta):
    """Shares another delta's rows; keeps it in a tuple, so that its parameter is registered once."""

    optional: ClassVar[frozenset[str]] = frozenset({"trainable_tokens_delta"})

    def __init__(self, owner: _Rows, told: bool) -> None:
        super().__init__()
        self.held, self.told = (owner,), told

    def values(self) -> tuple[Tensor, Any]:
        """Return V and the buffers' owner."""
        return self.held[0].values()

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of V where a file holds it under this name, too; what is read into it goes nowhere."""
        return {"trainable_tokens_delta": self.values()[0].detach().clone()} if self.told else {}


class _InEmbedding(Delta):
    values: Any

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map row numbers `x (...)` and the frozen rows `y (..., d)` to `(..., d)`."""
        V, own = self.values()
        at = torch.searchsorted(own.ascending, x).clamp(max=len(own.ascending) - 1)
        mine = F.embedding(own.order[at], V).to(y.dtype)
        return torch.where((own.ascending[at] == x)[..., None], mine, y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W (d, rows)` with its chosen columns replaced."""
        V, own = self.values()
        return weight.index_copy(1, own.numbers, V.to(weight.dtype).t()), bias


class _InHead(Delta):
    values: Any

    def around(self, frozen: Frozen, x: Tensor) -> Tensor:
        """Map `x (..., d)` to logits `(..., rows)`."""
        V, own = self.values()
        change = V - frozen.weight().detach()[own.numbers].to(V.dtype)
        return frozen(x).index_add(-1, own.numbers, F.linear(x, change.to(x.dtype)))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W (rows, d)` with its chosen rows replaced."""
        V, own = self.values()
        return weight.index_copy(0, own.numbers, V.to(weight.dtype)), bias


class TokenEmbedding(_InEmbedding, _Rows):
    """Chosen rows of an embedding."""


class TokenHead(_InHead, _Rows):
    """Chosen rows of a linear map of its own."""


class TiedEmbedding(_InEmbedding, _Tied):
    """An embedding tied to another."""


class TiedHead(_InHead, _Tied):
    """A head tied to an embedding."""
