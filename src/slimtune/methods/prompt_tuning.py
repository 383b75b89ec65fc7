"""Prompt tuning: n learned embeddings (virtual tokens) in front of the sequence.

    [P_1 … P_n, x_1 … x_T] → the frozen model        P (n, hidden)

Parameters added: n · hidden. P starts at random, as the embeddings of random tokens, or as those of a text: if n is the
text's number of tokens, the model then answers as after that text, up to rounding. It cannot be merged.

Paper: https://arxiv.org/abs/2104.08691. File format: PEFT's one tensor `prompt_embeddings (n, hidden)`. Unlike PEFT's,
the logits have no positions for the virtual tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters.base import Site
from ..adapters.config_fields import setting
from ..adapters.prompt import (
    LearnedEmbeddings,
    PromptLearningConfig,
    PromptModule,
    disable_adapter_for_inference,
    tokenize_text,
)


class PromptTuningInit(StrEnum):
    """How the learned embeddings start (PEFT's names)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: learned embeddings in front of the sequence; PEFT's field names and defaults."""

    name: ClassVar[str] = "prompt_tuning"
    learning_rate: ClassVar[float] = 3e-2
    recipe_defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens", "init": "prompt_tuning_init"}

    prompt_tuning_init: PromptTuningInit | Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = setting(
        "RANDOM",
        'how the embeddings start: "RANDOM": normal with std 1; "SAMPLE_VOCAB": as embeddings of random tokens; '
        '"TEXT": as those of a text, cut or repeated to num_virtual_tokens',
    )
    prompt_tuning_init_text: str | None = setting(None, 'the text for "TEXT"')
    tokenizer_name_or_path: str | None = setting(None, 'the tokenizer for "TEXT"')
    tokenizer_kwargs: dict | None = setting(
        None, 'arguments for loading the tokenizer for "TEXT"; trust_remote_code is refused'
    )

    def check(self) -> None:
        """Check that a start from text has its text and tokenizer, and other starts have no tokenizer settings."""
        super().check()
        self.prompt_tuning_init = str(self.prompt_tuning_init)  # type: ignore[assignment]
        from_text = self.prompt_tuning_init == "TEXT"
        if from_text:
            self.require(
                bool(self.prompt_tuning_init_text), "prompt_tuning_init_text", "a text, for prompt_tuning_init='TEXT'"
            )
            self.require(
                bool(self.tokenizer_name_or_path),
                "tokenizer_name_or_path",
                "a tokenizer, for prompt_tuning_init='TEXT'",
            )
        options = self.tokenizer_kwargs or {}
        self.require(not options or from_text, "tokenizer_kwargs", "None unless prompt_tuning_init='TEXT'")
        self.require("trust_remote_code" not in options, "tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def build(self, site: Site) -> SoftPrompt:
        """Return the learned embeddings at the backbone."""
        self.require(self.token_dim == site.in_features, "token_dim", f"{site.in_features}, as the model's embeddings")
        return SoftPrompt(site, self._initial_embeddings(site))

    def _initial_embeddings(self, site: Site) -> Tensor:
        n = self.num_virtual_tokens
        assert n is not None
        # PEFT draws them for every start: one seed gives the same adapter in both libraries.
        random = nn.Embedding(n, site.in_features, device=site.init_device).weight
        if self.prompt_tuning_init == "RANDOM" or site.loading or site.device.type == "meta":
            return random
        table: Any = site.model.get_input_embeddings()  # type: ignore[operator]
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, table.num_embeddings, (n,))
        else:
            assert self.prompt_tuning_init_text is not None
            assert self.tokenizer_name_or_path is not None
            text = tokenize_text(self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
            ids = torch.tensor((text * math.ceil(n / len(text)))[:n])
        with disable_adapter_for_inference(site.model):
            embeddings: Tensor = table(ids.to(table.weight.device))
        return embeddings


class SoftPrompt(LearnedEmbeddings, PromptModule):
    """Learned embeddings in front of the sequence."""

    def virtual_embeddings(self) -> Tensor:
        """Return the virtual tokens `(n, hidden)`."""
        return self.get_embeddings()
