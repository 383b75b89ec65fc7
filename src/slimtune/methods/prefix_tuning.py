"""Prefix tuning: in every layer the queries also attend to n learned keys and values.

    softmax([q Kpᵀ, q Kᵀ] · scale) [Vp, V]      Kp, Vp (kv heads, n, head size), one pair per layer

Parameters added: n · layers · 2 · kv heads · head size; with `prefix_projection` a small network computes them: a
linear layer, tanh, another linear layer. The tokens' positions start at n, as if the prefix had been read; so a prefix
can start as the keys and values of a text, and the model then answers as after that text. It cannot be merged.

Paper: https://arxiv.org/abs/2101.00190. File format: PEFT's `prompt_embeddings (n, layers · 2 · kv heads · head size)`;
with a projection also the network's own tensors, as `prompt_encoder.…`, so that training can continue.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ..adapters import prompt
from ..adapters.architectures import text_config
from ..adapters.base import AdapterModule, Site, SiteKind
from ..adapters.config import setting
from ..attention.prefix import AttentionPrefix, RowMask, find_attention_modules
from ..errors import ConfigError, UsageError


@dataclass
class PrefixTuningConfig(prompt.PromptLearningConfig):
    """Prefix tuning: learned keys and values in every layer; PEFT's field names and defaults, and a start from text."""

    name: ClassVar = "prefix_tuning"
    kinds: ClassVar = ("model", "attention")
    extension_fields: ClassVar = frozenset(["prefix_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"])
    learning_rate: ClassVar = 1e-2
    recipe_defaults: ClassVar = {
        "num_virtual_tokens": 20,
        "init_weights": lambda g: None if g.get("prefix_projection") or g.get("prefix_tuning_init_text") else "vocab",
    }

    init_weights: Literal["zero", "vocab"] | None = setting(
        None, 'start of keys and values. None: normal; "zero"; "vocab" (slimtune only): those of random tokens'
    )
    encoder_hidden_size: int | None = setting(None, "width of the projection; None: the size of a layer's keys", ge=1)
    prefix_projection: bool = setting(False, "train a small network that computes the keys and values")
    prefix_tuning_init_text: str | None = setting(None, "start as this text's keys and values; slimtune only")
    tokenizer_name_or_path: str | None = setting(None, "the tokenizer for that text")
    tokenizer_kwargs: dict | None = setting(None, "arguments for loading the tokenizer; trust_remote_code is refused")

    def check(self) -> None:
        super().check()
        vocab_fits = self.init_weights != "vocab" or not self.prefix_projection
        self.require(vocab_fits, "init_weights", "None or 'zero' with prefix_projection")
        if self.prefix_tuning_init_text is not None:
            alone = not self.prefix_projection and self.init_weights is None
            self.require(alone, "prefix_tuning_init_text", "None with prefix_projection or init_weights")
            expected = "a tokenizer, for prefix_tuning_init_text"
            self.require(bool(self.tokenizer_name_or_path), "tokenizer_name_or_path", expected)
        options = self.tokenizer_kwargs or {}
        self.require("trust_remote_code" not in options, "tokenizer_kwargs", "no trust_remote_code: it runs any code")

    def fill_from_model(self, model: Any) -> None:
        """Fill in the sizes from the model's config; heads and head size are those of the keys."""
        config = text_config(model)
        heads = getattr(config, "num_key_value_heads", None)
        if config is not None and heads is not None:
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.num_attention_heads = self.num_attention_heads or heads
            self.token_dim = self.token_dim or size * heads
            sizes = {"num_attention_heads": heads, "token_dim": size * heads}
            for name, expected in sizes.items():
                self.require(getattr(self, name) == expected, name, f"{expected}, as the model's keys")
        super().fill_from_model(model)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone, where the prefix is stored, and every attention module."""
        return {prompt.find_backbone_name(model): "model", **dict.fromkeys(find_attention_modules(model), "attention")}

    def build_all(self, sites: Sequence[Site]) -> list[AdapterModule]:
        """Return the prefix at the backbone, and each layer's part of it."""
        layers = len(sites) - 1
        self.require(self.num_layers == layers, "num_layers", f"{layers}, as the model")
        stored = StoredPrefix(sites[0], self._make_start(sites[0]), self)
        return [stored, *(LayerPrefix(stored, layer) for layer in range(layers))]

    def _make_start(self, site: Site) -> Tensor | nn.Module:
        n: Any = self.num_virtual_tokens
        ids = None
        if self.prefix_projection:
            return PrefixProjection(self, site.init_device)
        if self.prefix_tuning_init_text is not None and not site.loading:
            settings: Any = (self.prefix_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
            ids = prompt.tokenize_text(*settings)
        elif self.init_weights == "vocab" and not site.loading:
            ids = torch.randint(site.config.vocab_size, (n,)).tolist()
        if ids is not None:
            return prefix_from_cache(compute_kv_cache(site.model, torch.tensor([ids[:n]])), n)
        random = nn.Embedding(n, self.num_layers * 2 * self.token_dim, device=site.init_device).weight  # type: ignore[operator]
        return torch.zeros_like(random) if self.init_weights == "zero" else random


class StoredPrefix(prompt.LearnedEmbeddings, prompt.PositionShift):
    """The keys and values of all layers, stored at the backbone; the tokens' own positions start after them."""

    def __init__(self, site: Site, start: Tensor | nn.Module, config: Any) -> None:
        super().__init__(site, start)
        self.heads, self.layer_width = config.num_attention_heads, 2 * config.token_dim

    @property
    def n(self) -> int:
        encoder: Any = self.prompt_encoder
        return len(self.prompt_embeddings if encoder is None else encoder.embedding.weight)

    def get_layer_prefix(self, layer: int) -> AttentionPrefix:
        """Return the keys and values of one layer.

        Each call builds a graph of its own, so that activation checkpointing can run a layer again.
        """
        kv_slice = slice(layer * self.layer_width, (layer + 1) * self.layer_width)
        encoder: Any = self.prompt_encoder
        part = self.prompt_embeddings[:, kv_slice] if encoder is None else encoder(kv_slice)
        keys, values = part.view(len(part), 2, self.heads, -1).permute(1, 2, 0, 3)
        return AttentionPrefix(keys, values)


class LayerPrefix(prompt.AttentionModule):
    """A layer's part of the prefix."""

    def __init__(self, stored: StoredPrefix, layer: int) -> None:
        super().__init__()
        self.held, self.layer = (stored,), layer

    def compute_prefix_key_values(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        return self.held[0].get_layer_prefix(self.layer)


class PrefixProjection(nn.Module):
    """`n` embeddings through a linear layer, tanh and another one.

    They are created in PEFT's order, so that one seed gives the same adapter in both libraries.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__()
        dim, h = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(config.num_virtual_tokens, dim, device=device)
        first, last = nn.Linear(dim, h, device=device), nn.Linear(h, config.num_layers * 2 * dim, device=device)
        self.transform = nn.Sequential(first, nn.Tanh(), last)
        if config.init_weights == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, kv_slice: slice = slice(None)) -> Tensor:
        """Return `(n, layers · 2 · kv heads · head size)`, or some of its columns."""
        last: Any = self.transform[2]
        return F.linear(self.transform[:2](self.embedding.weight), last.weight[kv_slice], last.bias[kv_slice])


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a prefix as the keys and values of the first tokens of a text; PEFT's name and arguments.

    Args:
        model: a model with a prefix-tuning adapter.
        tokenizer: the model's tokenizer.
        text: at least num_virtual_tokens tokens long.
        adapter_name: None: the active adapter.
        num_virtual_tokens: None: the adapter's own.
        use_chat_template: read the text as a system message, if the tokenizer has a chat template.
        max_length: use at most this many tokens of the text.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        chat = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=False, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    n = num_virtual_tokens or _find_stored_prefix(model, adapter_name).n
    cache = compute_kv_cache(model, torch.tensor([ids[:max_length][:n]]))
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=n
    )


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start a prefix as the first keys and values of a cache of one row, and return it; PEFT's name and arguments.

    `past_key_values` is a transformers cache, or keys and values `(1, kv heads, length, head size)` by layer.
    """
    stored = _find_stored_prefix(model, adapter_name)
    start = prefix_from_cache(past_key_values, num_virtual_tokens or stored.n)
    have, expected = tuple(start.shape), tuple(stored.prompt_embeddings.shape)
    if have != expected:
        raise UsageError(f"the cache gives a prefix of {have}", f"{expected}, as the adapter")
    with torch.no_grad():
        stored.prompt_embeddings.copy_(start)
    return start


def _find_stored_prefix(model: Any, adapter: str | None) -> Any:
    name = adapter or model.active_adapters[0]
    found = [d for d in model.adapter_modules(name).values() if isinstance(d, StoredPrefix)]
    if not found or found[0].prompt_encoder is not None:
        raise UsageError(f"adapter {name!r} has no prefix that can be set", "prefix tuning without prefix_projection")
    return found[0]


def compute_kv_cache(model: Any, ids: Tensor) -> DynamicCache:
    """Return the cache after the frozen model has read `ids (1, length)`, complete also with sliding windows."""
    cache = DynamicCache()
    with prompt.disable_adapter_for_inference(model):
        # transformers 5.2x calls the argument cache, earlier versions past_key_values.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        model(input_ids=ids.to(model.device), use_cache=True, **{name: cache})
    return cache


def prefix_from_cache(cache: Any, n: int) -> Tensor:
    """Return the first `n` positions of a cache of one row as `(n, layers · 2 · kv heads · head size)`."""
    layers = [(c.keys, c.values) for c in cache.layers] if hasattr(cache, "layers") else [kv[:2] for kv in cache]
    tensors = [t for keys_and_values in layers for t in keys_and_values]
    rows, length = len(tensors[0]), min(t.shape[2] for t in tensors)
    if rows != 1 or length < n:
        message = f"the start has {length} tokens in {rows} rows, for a prefix of num_virtual_tokens={n}"
        raise ConfigError(message, f"one row of at least {n} tokens", f"num_virtual_tokens={length}, or a longer text")
    # (layers · 2, kv heads, n, head size) to (n, layers · 2, kv heads, head size)
    return torch.stack([t[0, :, :n] for t in tensors]).permute(2, 0, 1, 3).reshape(n, -1)
