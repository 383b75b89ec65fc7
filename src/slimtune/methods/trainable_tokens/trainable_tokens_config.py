"""Trainable tokens's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import TargetedConfig, config_field

if TYPE_CHECKING:
    from torch import nn

    from ...core.adapters.adapter_module import AdapterModule, AdapterSite, SiteKind
    from .trainable_tokens_modules import TrainableRowsSpec


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Trainable tokens: chosen rows of the embedding; PEFT's field names and defaults."""

    name: ClassVar = "trainable_tokens"
    prefix: ClassVar = "trainable_tokens_"
    learning_rate: ClassVar = 1e-2
    fields_not_in_peft: ClassVar = frozenset(
        ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"]
    )
    kinds: ClassVar = ("embedding", "linear")
    short_names: ClassVar = {"tokens": "token_indices", "targets": "target_modules"}

    target_modules: list[str] | str | None = config_field(None, "the embeddings; None: the model's input embedding")
    token_indices: list[int] = config_field([], "ids of the tokens that train", ge=0)
    init_weights: bool = config_field(True, "start as the base's rows; False: random, for tests")

    def find_missing(self) -> Iterator[FieldError]:
        if not are_valid_unique_token_ids(self.token_indices):
            yield self.error("token_indices", "a list of token ids, each once")

    def fill_from_model(self, model: nn.Module) -> None:
        """Fill in the name of the input embedding, as PEFT does."""
        from .trainable_tokens_modules import find_or_guess_input_embedding_name

        if self.target_modules is None:
            self.target_modules = find_or_guess_input_embedding_name(model)

    def extra_targets(self, model: nn.Module) -> dict[str, SiteKind]:
        """Return the modules that are tied to the targets."""
        return {n: rows.kind for n, rows in self._find_trainable_rows(model).items() if not self._is_target(n)}

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        from .trainable_tokens_modules import build_trainable_row_modules

        trained = self._find_trainable_rows(sites[0].model) if sites else {}
        built = build_trainable_row_modules(sites, trained, save_shared=True, start_as_base=self.init_weights)
        return [built[site.name] for site in sites]

    def _is_target(self, name: str) -> bool:
        from ...core.adapters.targets import matches_regex_or_names

        excluded = self.exclude_modules and matches_regex_or_names(self.exclude_modules, name)
        return bool(self.target_modules and matches_regex_or_names(self.target_modules, name) and not excluded)

    def _find_trainable_rows(self, model: nn.Module) -> dict[str, TrainableRowsSpec]:
        from ...core.kernels.linear_layers import get_base_layer_type
        from .trainable_tokens_modules import map_trainable_row_specs_by_module

        tokens = {
            n: self.token_indices for n, m in model.named_modules() if get_base_layer_type(m) and self._is_target(n)
        }
        return map_trainable_row_specs_by_module(model, tokens, self.modules_to_save or ())


def are_valid_unique_token_ids(ids: list[int]) -> bool:
    """Return whether `ids` contains token ids, each once."""
    return bool(ids) and min(ids) >= 0 and len(set(ids)) == len(ids)
