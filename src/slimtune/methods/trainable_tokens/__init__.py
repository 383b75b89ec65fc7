"""Trainable tokens: some rows of the embedding train, the rest stays frozen.

    W'[i] = V[j] where i is the j-th chosen token, W[i] elsewhere        V (k, d), starts as W's own rows

For new special tokens, or for a few words that should mean something else. An output head (or another embedding) that
is tied to the embedding follows: there y = W x, and the chosen tokens' logits become V x, computed as
y + (V − W[chosen]) x, so that the start is exact. Parameters added: k · d. Merged: W with its rows replaced.

`places.py` finds the modules, `rows.py` holds the deltas; LoRA's `trainable_token_indices` uses both.

File format (PEFT's): `trainable_tokens_delta`, which holds V itself, not a difference.
https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ...adapters.base import AdapterModule, Site, SiteKind
from ...adapters.config import TargetedConfig
from ...adapters.targets import matches_name
from ...utils.linear_layers import layer_kind
from .places import Place, input_embedding, places, row_numbers
from .rows import token_delta


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Trainable tokens: chosen rows of the embedding; PEFT's field names and defaults.

    Args:
        token_indices: numbers of the tokens that train, each at least 0 and below the size of the vocabulary.
        target_modules: names or a pattern of the embeddings; None: the model's input embedding.
        init_weights: start as the base's rows; False: random, for tests.
    """

    name: ClassVar[str] = "trainable_tokens"
    learning_rate: ClassVar[float] = 1e-2
    extension_fields: ClassVar[frozenset[str]] = frozenset(
        ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"]
    )
    kinds: ClassVar[tuple[SiteKind, ...]] = ("embedding", "linear")
    short_names: ClassVar[dict[str, str]] = {"tokens": "token_indices", "targets": "target_modules"}

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def check(self) -> None:
        """Check that tokens are given, each once."""
        super().check()
        self.require(row_numbers(self.token_indices), "token_indices", "token numbers, 0 and up, each once")

    def infer_from_model(self, model: nn.Module) -> None:
        """Fill in the name of the input embedding, as PEFT does."""
        if self.target_modules is None:
            self.target_modules = input_embedding(model)

    def further_targets(self, model: nn.Module) -> dict[str, SiteKind]:
        """Return what is tied to the targets."""
        return {n: p.kind for n, p in self._places(model).items() if not self._is_target(n)}

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the deltas; tied ones share their rows."""
        found = self._places(sites[0].model) if sites else {}
        made: dict[str, AdapterModule] = {}
        for site in sorted(sites, key=lambda s: found[s.name].owner is not None):
            made[site.name] = token_delta(site, found[site.name], made, self.init_weights)
        return [made[site.name] for site in sites]

    def _is_target(self, name: str) -> bool:
        excluded = self.exclude_modules and matches_name(self.exclude_modules, name)
        return bool(self.target_modules and matches_name(self.target_modules, name) and not excluded)

    def _places(self, model: nn.Module) -> dict[str, Place]:
        chosen = {n: self.token_indices for n, m in model.named_modules() if layer_kind(m) and self._is_target(n)}
        return places(model, chosen, self.modules_to_save or (), told_twice=True)
