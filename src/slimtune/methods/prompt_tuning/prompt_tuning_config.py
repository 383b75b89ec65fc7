"""Prompt tuning's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import config_field
from ...extras.prompt_learning.prompt_config import PromptLearningConfig

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


class PromptTuningInit(StrEnum):
    """How the learned embeddings start (PEFT's names)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: learned embeddings in front of the sequence; PEFT's field names and defaults."""

    name: ClassVar = "prompt_tuning"
    learning_rate: ClassVar = 3e-3
    recipe_defaults: ClassVar = {
        "num_virtual_tokens": 20,
        "neutral_start": lambda g: "prompt_tuning_init" not in g,
    }
    short_names: ClassVar = {"tokens": "num_virtual_tokens", "init": "prompt_tuning_init"}

    prompt_tuning_init: PromptTuningInit | Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = config_field(
        "RANDOM", 'the start. "RANDOM": normal; "SAMPLE_VOCAB": random tokens; "TEXT": a text, cut or repeated'
    )
    prompt_tuning_init_text: str | None = config_field(None, 'the text for "TEXT"')
    tokenizer_name_or_path: str | None = config_field(None, 'the tokenizer for "TEXT"')
    tokenizer_kwargs: dict | None = config_field(None, "arguments for loading it; trust_remote_code is refused")

    def normalize(self) -> None:
        super().normalize()
        self.prompt_tuning_init = str(self.prompt_tuning_init)  # type: ignore[assignment]

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    yield FieldError(name, f"When prompt_tuning_init='TEXT', {name} can't be None")
        options = self.tokenizer_kwargs or {}
        if options and self.prompt_tuning_init != "TEXT":
            yield self.error("tokenizer_kwargs", "None unless prompt_tuning_init='TEXT'")
        if "trust_remote_code" in options:
            yield self.error("tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        from .prompt_tuning_modules import build_soft_prompt_and_attention_masks, make_initial_embeddings

        return build_soft_prompt_and_attention_masks(self, sites, make_initial_embeddings(self, sites[0]))
