"""Prompt tuning: the model reads n learned embeddings in front of the sequence.

    [P_1 … P_n, x_1 … x_T] → the frozen model        P (n, hidden)

Parameters added: n · hidden. Start: random, the embeddings of random tokens, or those of a text: where n is the text's
number of tokens, the model then says what it says after that text, to rounding. Nothing is merged: positions are no
weights.

Paper: https://arxiv.org/abs/2104.08691. File format: PEFT's one tensor `prompt_embeddings (n, hidden)`. In PEFT the
logits keep n more positions in front; here they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import Site
from ..adapters.prompt import LearnedEmbeddings, PromptLearningConfig, PromptModule, frozen_base, tokenize_text


class PromptTuningInit(StrEnum):
    """How the learned embeddings start (PEFT's names)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: learned embeddings in front of the sequence; PEFT's field names and defaults.

    Args:
        prompt_tuning_init: "RANDOM": normal with std 1; "SAMPLE_VOCAB": embeddings of random tokens; "TEXT": those of
            a text, cut or repeated to num_virtual_tokens.
        prompt_tuning_init_text: the text for "TEXT".
        tokenizer_name_or_path: the tokenizer for "TEXT".
        tokenizer_kwargs: arguments for loading the tokenizer for "TEXT"; never trust_remote_code.
    """

    name: ClassVar[str] = "prompt_tuning"
    learning_rate: ClassVar[float] = 3e-2
    recipe_defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens", "init": "prompt_tuning_init"}

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def check(self) -> None:
        """Check that a start from text has its text and its tokenizer, and another start has not."""
        super().check()
        known = self.prompt_tuning_init in list(PromptTuningInit)
        self.require(known, "prompt_tuning_init", "'RANDOM', 'SAMPLE_VOCAB' or 'TEXT'")
        self.prompt_tuning_init = str(PromptTuningInit(self.prompt_tuning_init))
        by_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        self.require(not by_text or bool(self.prompt_tuning_init_text), "prompt_tuning_init_text",
                     "a text, for prompt_tuning_init='TEXT'")  # fmt: skip
        self.require(not by_text or bool(self.tokenizer_name_or_path), "tokenizer_name_or_path",
                     "a tokenizer, for prompt_tuning_init='TEXT'")  # fmt: skip
        settings = self.tokenizer_kwargs or {}
        self.require(not settings or by_text, "tokenizer_kwargs", "None but for prompt_tuning_init='TEXT'")
        self.require("trust_remote_code" not in settings, "tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def build(self, site: Site) -> SoftPrompt:
        """Return the learned embeddings at the backbone."""
        self.require(self.token_dim == site.in_features, "token_dim", f"{site.in_features}, as the model's embeddings")
        return SoftPrompt(site, self._start(site))

    def _start(self, site: Site) -> Tensor:
        n = self.num_virtual_tokens
        assert n is not None
        # Drawn whatever the start is, as in PEFT, so that one seed gives the same adapter in both.
        random = nn.Embedding(n, site.in_features, device=site.init_device).weight
        if self.prompt_tuning_init == PromptTuningInit.RANDOM or site.loading or site.device.type == "meta":
            return random
        table: Any = site.model.get_input_embeddings()  # type: ignore[operator]
        if self.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, table.num_embeddings, (n,))
        else:
            assert self.prompt_tuning_init_text is not None
            assert self.tokenizer_name_or_path is not None
            text = tokenize_text(self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
            ids = torch.tensor((text * math.ceil(n / len(text)))[:n])
        with frozen_base(site.model):
            rows: Tensor = table(ids.to(table.weight.device))
        return rows


class SoftPrompt(LearnedEmbeddings, PromptModule):
    """Learned embeddings in front of the sequence."""

    def virtual_embeddings(self) -> Tensor:
        """Return the learned positions `(n, hidden)`."""
        return self.get_embeddings()
