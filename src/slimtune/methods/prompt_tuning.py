"""Prompt tuning: n learned embeddings (virtual tokens) in front of the sequence.

    [P_1 … P_n, x_1 … x_T] → the frozen model        P (n, hidden)

Parameters added: n · hidden. P starts at random, as the embeddings of random tokens, or as those of a text: if n is the
text's number of tokens, the model then answers as after that text, up to rounding. It cannot be merged.

Paper: https://arxiv.org/abs/2104.08691. File format: PEFT's one tensor `prompt_embeddings (n, hidden)`. Unlike PEFT's,
the logits have no positions for the virtual tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.adapters import prompt
from ..core.adapters.adapter_module import AdapterModule, Site
from ..core.adapters.peft_config import setting
from ..errors import ConfigError


class PromptTuningInit(StrEnum):
    """How the learned embeddings start (PEFT's names)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(prompt.PromptLearningConfig):
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
        return build_prompt(self, sites, self._make_start(sites[0]))

    def _make_start(self, site: Site) -> Tensor:
        n: Any = self.num_virtual_tokens * self.num_transformer_submodules  # type: ignore[operator]
        # PEFT draws them for every start: one seed gives the same adapter in both libraries.
        random = nn.Embedding(n, self.token_dim, device=site.init_device).weight  # type: ignore[arg-type]
        if self.prompt_tuning_init == "RANDOM" or site.loading:
            return random
        table: Any = site.module.get_input_embeddings()  # type: ignore[operator]
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, table.num_embeddings, (n,))
        else:
            settings: Any = (self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
            text = prompt.tokenize_text(*settings)
            ids = torch.tensor((text * math.ceil(n / len(text)))[:n])
        with prompt.disable_adapter_for_inference(site.model):
            return table(ids.to(table.weight.device))


class SoftPrompt(prompt.LearnedEmbeddings, prompt.PromptModule):
    """Learned embeddings, or those that a small network computes, in front of the sequence.

    PEFT's adapter of an encoder-decoder (`num_transformer_submodules` 2) has twice as many and uses the first half.
    """

    def __init__(self, site: Site, start: Tensor | nn.Module, config: Any) -> None:
        super().__init__(site, start, site, config.task_type)
        self.n = config.num_virtual_tokens

    def virtual_embeddings(self) -> Tensor:
        return self.get_embeddings()[: self.n]


def build_prompt(config: Any, sites: Sequence[Site], start: Tensor | nn.Module) -> list[AdapterModule]:
    """Return the virtual tokens at the first site, and what makes them visible to a decoder at the second."""
    width = prompt.embedding_width(sites[0].module)
    config.require(config.token_dim == width, "token_dim", f"{width}, as the model's embeddings")
    return [SoftPrompt(sites[0], start, config), *(prompt.EncoderMask(config.num_virtual_tokens) for _ in sites[1:])]
