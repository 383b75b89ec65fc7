"""The settings that prompt-learning methods share; `prompt_modules.py` has their modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.adapters.architectures import get_text_config
from ...core.adapters.config_fields import FieldError, config_field
from ...core.adapters.peft_config import DataInitialization, PeftConfig, SiteKind
from ...errors import ModelError, format_names

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields that prompt-learning methods share; sizes that are not given are taken from the model."""

    mergeable: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("model",)
    is_prompt_learning: ClassVar[bool] = True
    fields_not_in_peft: ClassVar[frozenset[str]] = frozenset(["neutral_start"])
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens"}

    num_virtual_tokens: int | None = config_field(None, "number of virtual tokens, typically 10 to 100", ge=1)
    token_dim: int | None = config_field(
        None, "size of a virtual token: of the embeddings, or of all keys of a layer; None: the model's", ge=1
    )
    num_transformer_submodules: int | None = config_field(
        None, "1, or 2 for PEFT's files of an encoder-decoder; None: 2 for task_type SEQ_2_SEQ_LM", ge=1, le=2
    )
    num_attention_heads: int | None = config_field(None, "number of key heads; None: the model's", ge=1)
    num_layers: int | None = config_field(None, "number of layers; None: the model's", ge=1)
    neutral_start: bool = config_field(
        False, "start at a text that changes little; in a run alone, which has a tokenizer; slimtune only"
    )
    modules_to_save: list[str] | None = config_field(
        None, "modules trained in full beside the adapter (a new head) and saved with it"
    )

    def find_missing(self) -> Iterator[FieldError]:
        if self.num_virtual_tokens is None:
            yield self.error("num_virtual_tokens", "an integer, at least 1")

    def defer_initialization(self) -> DataInitialization | None:
        if not self.neutral_start:
            return None
        from .neutral_text import initialize_from_neutral_text

        self.neutral_start = False  # an adapter that is read back is not initialized again
        return initialize_from_neutral_text

    def fill_from_model(self, model: Any) -> None:
        self.require(not self.neutral_start, "neutral_start", "False outside of a run")
        from .prompt_modules import get_embedding_width, require_backbone_names

        found = require_backbone_names(model)
        text = get_text_config(model)
        seq2seq = self.task_type == "SEQ_2_SEQ_LM"
        self.num_transformer_submodules = self.num_transformer_submodules or (2 if seq2seq else 1)
        fits = self.num_transformer_submodules == 1 or found.decoder is not None
        self.require(fits, "num_transformer_submodules", f"1, since a {type(model).__name__} is no encoder-decoder")
        self.num_layers = self.num_layers or getattr(text, "num_hidden_layers", None)
        self.num_attention_heads = self.num_attention_heads or getattr(text, "num_attention_heads", None)
        self.token_dim = self.token_dim or get_embedding_width(model.get_submodule(found.reader))

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the module that reads the embeddings, and the decoder that attends to its output."""
        from .prompt_modules import require_backbone_names

        found = require_backbone_names(model)
        return dict.fromkeys([found.reader, *([] if found.decoder is None else [found.decoder])], "model")

    def require_reached(self, modules: Mapping[str, AdapterModule]) -> None:
        """Raise ModelError if a forward pass of the model did not call the backbone that has the virtual tokens."""
        from .learned_prefix import OTHER_METHODS
        from .prompt_modules import BackboneAdapterModule

        missed = [n for n, m in modules.items() if isinstance(m, BackboneAdapterModule) and not m.calls]
        if missed:
            names = format_names([n or "the model's own" for n in missed])
            message = f"the model ran without calling the forward of {names}, so its adapter did nothing"
            raise ModelError(message, "a model that calls its backbone", OTHER_METHODS)

    def file_key(self, key: str) -> str:
        """Return PEFT's keys: learned tensors without a module name, modules trained in full with a shorter prefix."""
        learned = re.search(r"\.(prompt_embeddings|prompt_encoder\..+)$", key)
        return learned[1] if learned else key.replace("base_model.model.", "base_model.", 1)
