"""Prefix tuning's settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.adapters.architectures import get_text_config
from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import config_field
from ...errors import ModelError, format_names
from ...extras.prompt_learning.prompt_config import PromptLearningConfig

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite, SiteKind


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: learned keys and values in every layer; PEFT's field names and defaults, and a start from text."""

    name: ClassVar = "prefix_tuning"
    kinds: ClassVar = ("model", "attention")
    fields_not_in_peft: ClassVar = PromptLearningConfig.fields_not_in_peft | {
        "prefix_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    }  # fmt: skip
    learning_rate: ClassVar = 1e-2
    recipe_defaults: ClassVar = {
        "num_virtual_tokens": 20,
        "neutral_start": lambda g: not {"init_weights", "prefix_tuning_init_text"} & g.keys(),
    }

    init_weights: Literal["zero", "vocab"] | None = config_field(
        None, 'start of keys and values. None: normal; "zero"; "vocab" (slimtune only): those of random tokens'
    )
    encoder_hidden_size: int | None = config_field(
        None, "width of the projection; None: the size of a layer's keys", ge=1
    )
    prefix_projection: bool = config_field(False, "train a small network that computes the keys and values")
    prefix_tuning_init_text: str | None = config_field(None, "start as this text's keys and values; slimtune only")
    tokenizer_name_or_path: str | None = config_field(None, "the tokenizer for that text")
    tokenizer_kwargs: dict | None = config_field(
        None, "arguments for loading the tokenizer; trust_remote_code is refused"
    )

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.init_weights == "vocab" and self.prefix_projection:
            yield self.error("init_weights", "None or 'zero' with prefix_projection")
        if self.prefix_tuning_init_text is not None:
            if self.prefix_projection or self.init_weights is not None:
                yield self.error("prefix_tuning_init_text", "None with prefix_projection or init_weights")
            if not self.tokenizer_name_or_path:
                yield self.error("tokenizer_name_or_path", "a tokenizer, for prefix_tuning_init_text")
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            yield self.error("tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def fill_from_model(self, model: Any) -> None:
        """Fill in the sizes from the model's config; heads and head size are those of the keys."""
        from ...extras.prompt_learning import prompt_modules as prompt
        from .prefix_tuning_modules import find_layer_count_heads_and_head_size

        found = prompt.require_backbone_names(model)
        layers, heads, size = find_layer_count_heads_and_head_size(model, found.decoder or found.reader)
        self.num_layers = self.num_layers or max(
            layers, get_text_config(model).num_hidden_layers if found.decoder else 0
        )
        self.num_attention_heads = self.num_attention_heads or heads
        self.token_dim = self.token_dim or size * heads
        for name, expected in {"num_attention_heads": heads, "token_dim": size * heads}.items():
            self.require(getattr(self, name) == expected, name, f"{expected}, as the model's keys")
        fits = self.num_layers >= layers if found.decoder else self.num_layers == layers
        self.require(fits, "num_layers", f"{layers}, as the model")
        if not found.causal:
            alone = self.init_weights != "vocab" and self.prefix_tuning_init_text is None
            self.require(alone, "init_weights", "None or 'zero', and no start from text, for a model with an encoder")
        super().fill_from_model(model)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone, where the prefix is stored, and every attention module that can take its part."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        from ...core.attention.attention_functions import find_layer_types_without_attention, has_attention_interface
        from ...extras.prompt_learning import prompt_modules as prompt
        from ...extras.prompt_learning.learned_prefix import find_attention_module_names

        found = prompt.require_backbone_names(model)
        name = found.decoder or found.reader
        backbone = model.get_submodule(name)
        parameters = inspect.signature(type(backbone).forward).parameters
        if found.causal and found.decoder is None and "position_ids" in parameters and has_attention_interface(model):
            return {name: "model", **dict.fromkeys(find_attention_module_names(model), "attention")}
        if other := find_layer_types_without_attention(get_text_config(model)):
            message = f"a {type(backbone).__name__} has layers without keys and values: {format_names(other)}"
            raise ModelError(message, hint="tune this model with prompt tuning, LoRA or IA3")
        encodes = not found.causal and found.decoder is None
        family = model.config.model_type
        if not prompt.CACHES & set(parameters) or (encodes and family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            message = f"a {type(backbone).__name__} takes neither a cache nor learned keys and values"
            raise ModelError(message, hint="tune this model with prompt tuning, LoRA or IA3")
        return {name: "model"}

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        """Return the prefix at the backbone, and each layer's part of it."""
        from .prefix_tuning_modules import (
            AllLayersPrefix,
            BackbonePastKeyValuesPrefix,
            LayerPrefix,
            make_initial_prefix_or_encoder,
        )

        start = make_initial_prefix_or_encoder(self, sites[0])
        if len(sites) == 1:
            return [BackbonePastKeyValuesPrefix(sites[0], start, self)]
        stored = AllLayersPrefix(sites[0], start, self)
        return [stored, *(LayerPrefix(stored, layer) for layer in range(len(sites) - 1))]
