"""Prefix tuning's adapter modules."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from ...core.adapters.adapter_module import AdapterSite, BaseForward
from ...core.adapters.architectures import get_text_config
from ...core.attention.packed_layout import RowMask
from ...core.foundation.chat_rendering import render_chat_template
from ...errors import ConfigError, UsageError
from ...extras.chat_templates import is_built_in_template
from ...extras.prompt_learning import prompt_modules as prompt
from ...extras.prompt_learning.learned_prefix import AttentionPrefix


class AllLayersPrefix(prompt.LearnedPromptEmbeddingsMixin, prompt.PrefixPositionShift):
    """The keys and values of all layers, stored at the backbone; the tokens' own positions start after them."""

    def __init__(self, site: AdapterSite, start_or_encoder: Tensor | nn.Module, config: Any) -> None:
        super().__init__(site, start_or_encoder, config.task_type)
        self.heads, self.layer_width = config.num_attention_heads, 2 * config.token_dim
        self.layers = config.num_layers
        self.stride = config.num_transformer_submodules

    @property
    def n(self) -> int:
        encoder: Any = self.prompt_encoder
        return len(encoder.embedding.weight)

    def embed_tokens(self, model: Any, ids: Sequence[int]) -> Tensor:
        return _make_prefix_from_cache(_compute_kv_cache(model, torch.tensor([ids])), len(ids))

    def get_layer_prefix(self, layer: int) -> AttentionPrefix:
        """Return the keys and values of one layer.

        Each call builds a graph of its own, so that activation checkpointing can run a layer again.
        """
        # PEFT deals the parts to the two halves of an encoder-decoder in turn, and only the decoder takes its own.
        part = layer * self.stride % self.layers
        kv_slice = slice(part * self.layer_width, (part + 1) * self.layer_width)
        embeddings = self.prompt_encoder(kv_slice)
        keys, values = embeddings.view(len(embeddings), 2, self.heads, -1).permute(1, 2, 0, 3)
        return AttentionPrefix(keys, values)

    def get_prompt(self, batch_size: int) -> Any:
        """Return a cache with the prefix, for each row of a batch."""
        cache = DynamicCache()
        for layer in range(self.layers):
            keys, values = (t.expand(batch_size, -1, -1, -1) for t in self.get_layer_prefix(layer)[:2])
            cache.update(keys, values, layer)
        return cache if self.stride == 1 else EncoderDecoderCache(cache, DynamicCache())


class BackbonePastKeyValuesPrefix(AllLayersPrefix):
    """A prefix that the backbone reads from its cache, as PEFT does, where its attention cannot take one."""

    def __init__(self, site: AdapterSite, start_or_encoder: Tensor | nn.Module, config: Any) -> None:
        super().__init__(site, start_or_encoder, config)
        found = prompt.require_backbone_names(site.model)
        self.causal = found.causal or found.decoder is not None
        self.decoder_layers = find_layer_count_heads_and_head_size(site.model, site.name)[0]

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        if rows is not None:
            message = f"adapter_names is given, but all rows of a {type(base.module).__name__} have the same prefix"
            raise UsageError(message, hint="set_adapter, and one call for each adapter")
        prefix = [self.get_layer_prefix(layer)[:2] for layer in range(self.decoder_layers)]
        call = self.start_call(base, args, kwargs)
        return call.run_with_cached_prefix(base, self, prefix, causal=self.causal)


class LayerPrefix(prompt.PrefixAttentionModule):
    """A layer's part of the prefix."""

    no_op_values: ClassVar = {}

    def __init__(self, all_layers_prefix: AllLayersPrefix, layer: int) -> None:
        super().__init__()
        self.shared, self.layer = (all_layers_prefix,), layer

    def compute_prefix_key_values(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        return self.shared[0].get_layer_prefix(self.layer)


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

    def compute_last_inputs(self) -> Tensor:
        """Return the inputs of the last linear layer `(n, h)`."""
        return self.transform[:2](self.embedding.weight)

    def forward(self, kv_slice: slice = slice(None)) -> Tensor:
        """Return `(n, layers · 2 · kv heads · head size)`, or some of its columns."""
        last: Any = self.transform[2]
        return F.linear(self.compute_last_inputs(), last.weight[kv_slice], last.bias[kv_slice])


def find_layer_count_heads_and_head_size(model: Any, backbone_name: str) -> tuple[int, int, int]:
    """Return the layers of a backbone, and the heads and the head size of its keys, by the model's config."""
    config = get_text_config(model)
    decodes = "decoder" in backbone_name.split(".")
    names = ("num_decoder_layers", "decoder_layers") if decodes else ()
    layers = next((v for n in names if (v := getattr(config, n, None))), config.num_hidden_layers)
    all_heads = (getattr(config, "decoder_attention_heads", None) if decodes else None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // all_heads
    return layers, getattr(config, "num_key_value_heads", None) or all_heads, size


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
    own = getattr(tokenizer, "chat_template", None)
    if use_chat_template and own and not is_built_in_template(own):
        chat = [{"role": "system", "content": text}]
        ids = tokenizer(render_chat_template(tokenizer, chat), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    n = num_virtual_tokens or _find_stored_prefix(model, adapter_name).n
    cache = _compute_kv_cache(model, torch.tensor([ids[:max_length][:n]]))
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
    start = _make_prefix_from_cache(past_key_values, num_virtual_tokens or stored.n)
    table = stored.prompt_encoder.embedding.weight
    have, expected = tuple(start.shape), tuple(table.shape)
    if have != expected:
        raise UsageError(f"the cache gives a prefix of {have}", f"{expected}, as the adapter")
    with torch.no_grad():
        table.copy_(start)
    return start


def _find_stored_prefix(model: Any, adapter: str | None) -> Any:
    name = adapter or model.active_adapters[0]
    found = [d for d in model.adapter_modules(name).values() if isinstance(d, AllLayersPrefix)]
    if not found or not isinstance(found[0].prompt_encoder, prompt.PromptEmbeddingTable):
        raise UsageError(f"adapter {name!r} has no prefix that can be set", "prefix tuning without prefix_projection")
    return found[0]


def _compute_kv_cache(model: Any, ids: Tensor) -> DynamicCache:
    """Return the cache after the frozen model has read `ids (1, length)`, complete also with sliding windows."""
    cache = DynamicCache()
    with prompt.disable_adapter_in_eval_no_grad(model):
        # transformers 5.2x calls the argument cache, earlier versions past_key_values.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        model(input_ids=ids.to(model.device), use_cache=True, **{name: cache})
    return cache


def _make_prefix_from_cache(cache: Any, n: int) -> Tensor:
    """Return the first `n` positions of a cache of one row as `(n, layers · 2 · kv heads · head size)`."""
    layers = [(c.keys, c.values) for c in cache.layers] if hasattr(cache, "layers") else [kv[:2] for kv in cache]
    tensors = [t for keys_and_values in layers for t in keys_and_values]
    rows, length = len(tensors[0]), min(t.shape[2] for t in tensors)
    if rows != 1 or length < n:
        message = f"the start has {length} tokens in {rows} rows, for a prefix of num_virtual_tokens={n}"
        raise ConfigError(message, f"one row of at least {n} tokens", f"num_virtual_tokens={length}, or a longer text")
    # (layers · 2, kv heads, n, head size) to (n, layers · 2, kv heads, head size)
    return torch.stack([t[0, :, :n] for t in tensors]).permute(2, 0, 1, 3).reshape(n, -1)


def make_initial_prefix_or_encoder(config: Any, site: AdapterSite) -> Tensor | nn.Module:
    """Return the keys and values that a new prefix starts as, or the network that computes them."""
    n: Any = config.num_virtual_tokens
    ids = None
    if config.prefix_projection:
        return PrefixProjection(config, site.init_device)
    if config.prefix_tuning_init_text is not None and not site.skip_init:
        settings: Any = (config.prefix_tuning_init_text, config.tokenizer_name_or_path, config.tokenizer_kwargs)
        ids = prompt.tokenize_prompt_text(*settings)
    elif config.init_weights == "vocab" and not site.skip_init:
        ids = torch.randint(site.config.vocab_size, (n,)).tolist()
    if ids is not None:
        return _make_prefix_from_cache(_compute_kv_cache(site.model, torch.tensor([ids[:n]])), n)
    random = nn.Embedding(n, config.num_layers * 2 * config.token_dim, device=site.init_device).weight
    return torch.zeros_like(random) if config.init_weights == "zero" else random
