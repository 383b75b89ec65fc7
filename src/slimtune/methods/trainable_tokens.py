"""Trainable tokens: some rows of the embedding train, the others stay frozen.

    W'[i] = V[j] where i is the j-th chosen token, W[i] elsewhere        V (k, d), starts as W's own rows

For new special tokens, or to change the meaning of a few words. An output head (or another embedding) that is tied to
the embedding follows: there y = W x, and the chosen tokens' logits become V x, computed as y + (V − W[chosen]) x, so
that the start is exact. Parameters added: k · d. Merged: W with its rows replaced.

File format: PEFT's `trainable_tokens_delta`, which holds V itself, not a difference. LoRA's `trainable_token_indices`
uses the modules of this file. https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import AdapterModule, BaseForward, Site, SiteKind
from ..adapters.config import TargetedConfig
from ..adapters.config_fields import setting
from ..adapters.targets import matches_name
from ..errors import TargetError, nearest
from ..utils.linear_layers import get_weight, layer_kind


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Trainable tokens: chosen rows of the embedding; PEFT's field names and defaults."""

    name: ClassVar[str] = "trainable_tokens"
    learning_rate: ClassVar[float] = 1e-2
    extension_fields: ClassVar[frozenset[str]] = frozenset(
        ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"]
    )
    kinds: ClassVar[tuple[SiteKind, ...]] = ("embedding", "linear")
    short_names: ClassVar[dict[str, str]] = {"tokens": "token_indices", "targets": "target_modules"}

    target_modules: list[str] | str | None = setting(
        None, "names or a regular expression of the embeddings; None: the model's input embedding"
    )
    token_indices: list[int] = setting(
        default_factory=list, help="ids of the tokens that train, below the size of the vocabulary", ge=0
    )
    init_weights: bool = setting(True, "start as the base's rows; False: random, for tests")

    def check(self) -> None:
        """Check that tokens are given, each once."""
        super().check()
        self.require(are_token_ids(self.token_indices), "token_indices", "a list of token ids, each once")

    def infer_from_model(self, model: nn.Module) -> None:
        """Fill in the name of the input embedding, as PEFT does."""
        if self.target_modules is None:
            self.target_modules = find_input_embedding(model)

    def extra_targets(self, model: nn.Module) -> dict[str, SiteKind]:
        """Return the modules that are tied to the targets."""
        return {n: rows.kind for n, rows in self._trained_rows(model).items() if not self._is_target(n)}

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the adapter modules; tied ones share their rows."""
        trained = self._trained_rows(sites[0].model) if sites else {}
        built: dict[str, AdapterModule] = {}
        for site in sorted(sites, key=lambda s: trained[s.name].owner is not None):
            built[site.name] = build_token_module(site, trained[site.name], built, self.init_weights)
        return [built[site.name] for site in sites]

    def _is_target(self, name: str) -> bool:
        excluded = self.exclude_modules and matches_name(self.exclude_modules, name)
        return bool(self.target_modules and matches_name(self.target_modules, name) and not excluded)

    def _trained_rows(self, model: nn.Module) -> dict[str, TrainedRows]:
        tokens = {n: self.token_indices for n, m in model.named_modules() if layer_kind(m) and self._is_target(n)}
        return find_trained_rows(model, tokens, self.modules_to_save or (), save_shared=True)


# --- which modules have trained rows ----------------------------------------------------------------------------------


class TrainedRows(NamedTuple):
    """The trained rows of one module.

    Args:
        kind: "embedding" or "linear".
        ids: the numbers of the rows.
        owner: name of the module it is tied to, whose rows it shares; None: it has its own.
        save_shared: whether a file also stores shared rows under this module's name (PEFT's method does, its LoRA does
            not).
    """

    kind: SiteKind
    ids: list[int]
    owner: str | None
    save_shared: bool


def find_trained_rows(
    model: nn.Module,
    tokens: list[int] | Mapping[str, list[int]],
    modules_to_save: Collection[str],
    *,
    save_shared: bool,
) -> dict[str, TrainedRows]:
    """Return the modules whose rows train, by full name; owners come before the modules tied to them.

    Args:
        model: the model.
        tokens: ids of tokens in the input embedding, or such lists by the name, or ending, of an embedding.
        modules_to_save: names of the modules trained in full, which cannot have trained rows too.
        save_shared: see `TrainedRows`.

    Raises:
        TargetError: a name matches nothing or is in modules_to_save, or an id is outside the embedding.
    """
    if not isinstance(tokens, Mapping):
        tokens = {find_input_embedding(model): tokens}
    modules: dict[str, Any] = {n: m for n, m in model.named_modules() if layer_kind(m) in ("embedding", "linear")}
    chosen: dict[str, list[int]] = {}
    for key, ids in tokens.items():
        names = [n for n in modules if matches_name([key], n)]
        if not names:
            raise TargetError(
                f"trainable_token_indices: {key!r} matches no embedding{nearest(key, modules)}",
                "the name of an embedding",
                "for the input embedding give a plain list of ids",
            )
        chosen |= dict.fromkeys(names, ids)
    for name, ids in chosen.items():
        if any(name.endswith(w) for w in modules_to_save):
            raise TargetError(
                f"{name} is in modules_to_save and also has trainable tokens", "one of the two", "take it out of one"
            )
        size = get_weight(modules[name]).shape[1 if layer_kind(modules[name]) == "embedding" else 0]
        if max(ids) >= size:
            raise TargetError(f"trainable tokens: {name} has no row {max(ids)}", f"ids below {size}")
    owners: dict[int, str] = {}
    for name in sorted(chosen, key=lambda n: layer_kind(modules[n]) != "embedding"):
        owners.setdefault(id(modules[name]._parameters["weight"]), name)
    trained = {}
    for name, module in modules.items():
        owner = owners.get(id(module._parameters["weight"]))
        ids = chosen.get(name) or (chosen[owner] if owner else [])
        tied = owner is not None and owner != name and ids == chosen[owner]
        if ids:
            trained[name] = TrainedRows(layer_kind(module), ids, owner if tied else None, save_shared)  # type: ignore[arg-type]
    return dict(sorted(trained.items(), key=lambda item: item[1].owner is not None))


def find_input_embedding(model: Any) -> str:
    """Return the full name of the model's input embedding; PEFT's guess for models without get_input_embeddings."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((n for n, m in model.named_modules() if m is embedding), "embed_tokens")


def are_token_ids(ids: Any) -> bool:
    """Return whether `ids` is a list of token ids, each once."""
    valid = isinstance(ids, list) and bool(ids) and len(set(ids)) == len(ids)
    return valid and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)


# --- what trains there ------------------------------------------------------------------------------------------------


def build_token_module(
    site: Site, rows: TrainedRows, built: Mapping[str, AdapterModule], start_as_base: bool = True
) -> AdapterModule:
    """Return the adapter module of one site; `built` holds those of the owners, by name."""
    owner: Any = None if rows.owner is None else built[rows.owner]
    return (TokenEmbedding if site.kind == "embedding" else TokenHead)(site, rows, start_as_base, owner)


class _TokenRows(AdapterModule):
    """Holds the rows `V (k, d)` and their ids, unless `owner` holds them."""

    def __init__(self, site: Site, rows: TrainedRows, start_as_base: bool, owner: _TokenRows | None = None) -> None:
        super().__init__()
        # In a tuple, so that the owner's parameter is not registered here too.
        self.held, self.save_shared = () if owner is None else (owner,), rows.save_shared
        if owner is not None:
            self.optional = frozenset({"trainable_tokens_delta"})  # type: ignore[misc]
            return
        ids = torch.tensor(rows.ids, device=site.device)
        weight = get_weight(site.module).detach()
        if site.kind == "embedding":
            weight = weight.t()
        if start_as_base:
            values = weight[ids].to(site.dtype)
        else:
            values = torch.randn(len(ids), weight.shape[1], dtype=weight.dtype, device=site.init_device)
        self.trainable_tokens_delta = nn.Parameter(values.to(site.device, site.dtype, copy=True))
        order = torch.tensor(sorted(range(len(ids)), key=rows.ids.__getitem__), device=site.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("sorted_ids", ids[order], persistent=False)

    def rows_and_owner(self) -> tuple[Tensor, Any]:
        """Return V and the module that holds it."""
        return self.held[0].rows_and_owner() if self.held else (self.trainable_tokens_delta, self)

    def tensors(self) -> dict[str, Tensor]:
        """Return V; where it is shared nothing, or a copy if files store it twice (loading ignores the copy)."""
        if not self.held:
            return super().tensors()
        return {"trainable_tokens_delta": self.rows_and_owner()[0].detach().clone()} if self.save_shared else {}


class TokenEmbedding(_TokenRows):
    """Trained rows of an embedding."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map token ids `x (...)` and the frozen rows `y (..., d)` to `(..., d)`."""
        V, owner = self.rows_and_owner()
        index = torch.searchsorted(owner.sorted_ids, x).clamp(max=len(owner.sorted_ids) - 1)
        trained = F.embedding(owner.order[index], V).to(y.dtype)
        return torch.where((owner.sorted_ids[index] == x)[..., None], trained, y)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W (d, rows)` with its chosen columns replaced."""
        V, owner = self.rows_and_owner()
        return weight.index_copy(1, owner.ids, V.to(weight.dtype).t()), bias


class TokenHead(_TokenRows):
    """Trained rows of a linear layer."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., d)` to logits `(..., rows)`."""
        V, owner = self.rows_and_owner()
        change = V - base.weight().detach()[owner.ids].to(V.dtype)
        return base(x).index_add(-1, owner.ids, F.linear(x, change.to(x.dtype)))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W (rows, d)` with its chosen rows replaced."""
        V, owner = self.rows_and_owner()
        return weight.index_copy(0, owner.ids, V.to(weight.dtype)), bias
