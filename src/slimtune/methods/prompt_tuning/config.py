"""Prompt tuning's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.adapters.peft_config import setting
from ...core.adapters.prompt_config import PromptLearningConfig
from ...errors import ConfigError

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, Site


class PromptTuningInit(StrEnum):
    """How the learned embeddings start (PEFT's names)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: learned embeddings in front of the sequence; PEFT's field names and defaults."""

    name: ClassVar = "prompt_tuning"
    learning_rate: ClassVar = 3e-2
    recipe_defaults: ClassVar = {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}
    short_names: ClassVar = {"tokens": "num_virtual_tokens", "init": "prompt_tuning_init"}

    prompt_tuning_init: PromptTuningInit | Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = setting(
        "RANDOM", 'the start. "RANDOM": normal; "SAMPLE_VOCAB": random tokens; "TEXT": a text, cut or repeated'
    )
    prompt_tuning_init_text: str | None = setting(None, 'the text for "TEXT"')
    tokenizer_name_or_path: str | None = setting(None, 'the tokenizer for "TEXT"')
    tokenizer_kwargs: dict | None = setting(None, "arguments for loading it; trust_remote_code is refused")

    def check(self) -> None:
        super().check()
        self.prompt_tuning_init = str(self.prompt_tuning_init)  # type: ignore[assignment]
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be None")
        options = self.tokenizer_kwargs or {}
        allowed = not options or self.prompt_tuning_init == "TEXT"
        self.require(allowed, "tokenizer_kwargs", "None unless prompt_tuning_init='TEXT'")
        self.require("trust_remote_code" not in options, "tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        from .modules import build_prompt, make_start

        return build_prompt(self, sites, make_start(self, sites[0]))
