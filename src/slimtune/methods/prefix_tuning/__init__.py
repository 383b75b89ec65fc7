"""Prefix tuning: in every layer the queries also see n learned keys and values.

    softmax([q Kpᵀ, q Kᵀ] · scale) [Vp, V]      Kp, Vp (kv heads, n, head size), a pair for each layer

Parameters added: n · layers · 2 · kv heads · head size; with `prefix_projection` they are what a small network gives:
tanh of one linear map, then another. A row's own positions start at n, as if the prefix had been read; so a prefix can
start as the keys and values of a text, and the model then says what it says after that text. Nothing is merged.

Paper: https://arxiv.org/abs/2101.00190. File format: PEFT's `prompt_embeddings (n, layers · 2 · kv heads · head size)`;
with a projection the network's own tensors beside it, as `prompt_encoder.…`, by which training goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.architectures import text_config
from ...adapters.base import AdapterModule, RowMask, Site, SiteKind
from ...adapters.prompt import (
    AttentionModule,
    LearnedEmbeddings,
    PositionShift,
    PromptLearningConfig,
    find_backbone_name,
    tokenize_text,
)
from ...attention.prefix import AttentionPrefix, find_attention_modules
from .from_text import keys_and_values, laid_out


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning: learned keys and values in every layer; PEFT's field names and defaults, and a start from text.

    Args:
        init_weights: None: normal with std 1; "zero": keys and values of zero; "vocab" (ours): those of tokens drawn
            from the vocabulary, from which training starts near the base instead of far from it.
        encoder_hidden_size: width of the projection, 1 and up; None: the size of all keys of a layer.
        prefix_projection: train a small network that gives the keys and values.
        prefix_tuning_init_text: start as the keys and values of this text's first num_virtual_tokens tokens (ours).
        tokenizer_name_or_path: the tokenizer for that text.
        tokenizer_kwargs: arguments for loading the tokenizer; never trust_remote_code.
    """

    name: ClassVar[str] = "prefix_tuning"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("model", "attention")
    extension_fields: ClassVar[frozenset[str]] = frozenset(
        ["prefix_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"]
    )
    learning_rate: ClassVar[float] = 1e-2
    recipe_defaults: ClassVar[dict[str, Any]] = {
        "num_virtual_tokens": 20,
        "init_weights": lambda given: (
            None if given.get("prefix_projection") or given.get("prefix_tuning_init_text") else "vocab"
        ),
    }

    init_weights: Literal["zero", "vocab"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    prefix_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def check(self) -> None:
        """Check the start, and that a text comes with its tokenizer."""
        super().check()
        self.require(self.init_weights in (None, "zero", "vocab"), "init_weights", "None, 'zero' or 'vocab'")
        vocab = self.init_weights == "vocab" and self.prefix_projection
        self.require(not vocab, "init_weights", "None or 'zero' beside prefix_projection")
        text, settings = self.prefix_tuning_init_text, self.tokenizer_kwargs or {}
        self.require_whole("encoder_hidden_size", none=True)
        plain = not self.prefix_projection and self.init_weights is None
        self.require(text is None or plain, "prefix_tuning_init_text", "None beside prefix_projection or init_weights")
        self.require(text is None or bool(self.tokenizer_name_or_path), "tokenizer_name_or_path",
                     "a tokenizer, for prefix_tuning_init_text")  # fmt: skip
        self.require("trust_remote_code" not in settings, "tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def infer_from_model(self, model: Any) -> None:
        """Fill in the sizes from the model's config, heads and size being those of the keys."""
        config = text_config(model)
        heads = getattr(config, "num_key_value_heads", None)
        if config is not None and heads is not None:
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.num_attention_heads = self.num_attention_heads or heads
            self.token_dim = self.token_dim or size * heads
        super().infer_from_model(model)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def further_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone, where the prefix is kept, and every attention module."""
        return {find_backbone_name(model): "model", **dict.fromkeys(find_attention_modules(model), "attention")}

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the prefix at the backbone, and each layer's view of it."""
        assert self.token_dim is not None
        assert self.num_attention_heads is not None
        self.require(self.num_layers == len(sites) - 1, "num_layers", f"{len(sites) - 1}, as the model")
        shape = len(sites) - 1, self.num_attention_heads, self.token_dim // self.num_attention_heads
        held = HeldPrefix(sites[0], self._start(sites[0], shape), shape)
        return [held, *(LayerPrefix(held, at) for at in range(shape[0]))]

    def _start(self, site: Site, shape: tuple[int, int, int]) -> Tensor | nn.Module:
        n, dim, h = self.num_virtual_tokens, self.token_dim, self.encoder_hidden_size
        assert n is not None
        assert dim is not None
        assert h is not None
        width = shape[0] * 2 * dim
        if self.prefix_projection:
            return Projection(n, dim, h, width, self.init_weights, site.init_device)
        if not site.loading and site.device.type != "meta":
            ids = None
            if self.prefix_tuning_init_text is not None:
                assert self.tokenizer_name_or_path is not None
                ids = tokenize_text(self.prefix_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
            elif self.init_weights == "vocab":
                ids = torch.randint(site.config.vocab_size, (n,)).tolist()
            if ids is not None:
                return laid_out(keys_and_values(site.model, torch.tensor([ids[:n]])), n)
        start = nn.Embedding(n, width, device=site.init_device).weight
        return torch.zeros_like(start) if self.init_weights == "zero" else start


class HeldPrefix(LearnedEmbeddings, PositionShift):
    """The keys and values of all layers, kept at the backbone; a row's own positions start behind them."""

    def __init__(self, site: Site, start: Tensor | nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__(site, start)
        self.shape = shape
        """Layers, key-value heads, head size."""

    @property
    def n(self) -> int:
        """How many positions the prefix takes."""
        encoder: Any = self.prompt_encoder
        return len(self.prompt_embeddings if encoder is None else encoder.embedding.weight)

    def layer(self, at: int) -> AttentionPrefix:
        """Return the keys and values of layer `at`: a graph of its own, so that checkpoints may run it again."""
        _, heads, size = self.shape
        width = 2 * heads * size
        columns = slice(at * width, (at + 1) * width)
        encoder: Any = self.prompt_encoder
        part = self.prompt_embeddings[:, columns] if encoder is None else encoder(columns)
        keys, values = part.view(-1, 2, heads, size).permute(1, 2, 0, 3)
        return AttentionPrefix(keys, values)


class LayerPrefix(AttentionModule):
    """A layer's part of the prefix."""

    def __init__(self, held: HeldPrefix, at: int) -> None:
        super().__init__()
        self.held, self.at = (held,), at

    def prefix(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return this layer's keys and values."""
        return self.held[0].layer(self.at)


class Projection(nn.Module):
    """`n` embeddings through a linear map, tanh and another. Made in PEFT's order: one seed gives the same in both."""

    def __init__(self, n: int, dim: int, h: int, width: int, init: str | None, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, dim, device=device)
        first, last = nn.Linear(dim, h, device=device), nn.Linear(h, width, device=device)
        self.transform = nn.Sequential(first, nn.Tanh(), last)
        if init == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, columns: slice = slice(None)) -> Tensor:
        """Return `(n, width)`, or these columns of it."""
        last: Any = self.transform[2]
        return F.linear(self.transform[:2](self.embedding.weight), last.weight[columns], last.bias[columns])
