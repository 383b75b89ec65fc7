"""Prompt tuning's adapter modules."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite
from ...extras.prompt_learning import prompt_modules as prompt


class SoftPrompt(prompt.LearnedPromptEmbeddingsMixin, prompt.BackboneVirtualTokenModule):
    """Learned embeddings, or those that a small network computes, in front of the sequence.

    PEFT's adapter of an encoder-decoder (`num_transformer_submodules` 2) has twice as many and uses the first half.
    """

    def __init__(self, site: AdapterSite, start_or_encoder: Tensor | nn.Module, config: Any) -> None:
        super().__init__(site, start_or_encoder, site, config.task_type)
        self.n = config.num_virtual_tokens

    def virtual_embeddings(self) -> Tensor:
        return self.get_embeddings()[: self.n]


def build_soft_prompt_and_attention_masks(
    config: Any, sites: Sequence[AdapterSite], start_or_encoder: Tensor | nn.Module
) -> list[AdapterModule]:
    """Return the virtual tokens at the first site, and what makes them visible to a decoder at the second."""
    width = prompt.get_embedding_width(sites[0].module)
    config.require(config.token_dim == width, "token_dim", f"{width}, as the model's embeddings")
    return [
        SoftPrompt(sites[0], start_or_encoder, config),
        *(prompt.VirtualTokenCrossAttentionMask(config.num_virtual_tokens) for _ in sites[1:]),
    ]


def make_initial_embeddings(config: Any, site: AdapterSite) -> Tensor:
    """Return the embeddings that a new prompt starts as `(n, hidden)`."""
    n: Any = config.num_virtual_tokens * config.num_transformer_submodules
    # PEFT draws them for every start: one seed gives the same adapter in both libraries.
    random = nn.Embedding(n, config.token_dim, device=site.init_device).weight
    if config.prompt_tuning_init == "RANDOM" or site.skip_init:
        return random
    table: Any = site.module.get_input_embeddings()  # type: ignore[operator]
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(0, table.num_embeddings, (n,))
    else:
        settings: Any = (config.prompt_tuning_init_text, config.tokenizer_name_or_path, config.tokenizer_kwargs)
        text = prompt.tokenize_prompt_text(*settings)
        ids = torch.tensor((text * math.ceil(n / len(text)))[:n])
    with prompt.disable_adapter_in_eval_no_grad(site.model):
        return table(ids.to(table.weight.device))
