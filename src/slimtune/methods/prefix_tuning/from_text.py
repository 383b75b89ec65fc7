"""Where a prefix starts as the keys and values of a text, or of a cache: the model then says what it says after it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...adapters.prompt import frozen_base
from ...errors import ConfigError, UsageError


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
    """Let a prefix start as the keys and values of the first tokens of a text; PEFT's name and arguments.

    Args:
        model: a model with a prefix-tuning adapter.
        tokenizer: the model's tokenizer.
        text: at least num_virtual_tokens tokens long.
        adapter_name: None: the active adapter.
        num_virtual_tokens: None: the adapter's own.
        use_chat_template: read the text as a system message, where the tokenizer has a chat template.
        max_length: use at most so many tokens of the text.

    Returns:
        What was loaded, `(n, layers · 2 · kv heads · head size)`.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        chat = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=False, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    n = num_virtual_tokens or _held(model, adapter_name).n
    cache = keys_and_values(model, torch.tensor([ids[:max_length][:n]]))
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=n
    )


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a prefix start as the first keys and values of a cache of one row; PEFT's name and arguments.

    Args:
        model: a model with a prefix-tuning adapter.
        adapter_name: None: the active adapter.
        past_key_values: a cache of transformers', or keys and values `(1, kv heads, length, head size)` by layer.
        num_virtual_tokens: None: the adapter's own.

    Returns:
        What was loaded, `(n, layers · 2 · kv heads · head size)`.
    """
    held = _held(model, adapter_name)
    start = laid_out(past_key_values, num_virtual_tokens or held.n)
    if start.shape != held.prompt_embeddings.shape:
        raise UsageError(
            f"the cache gives a prefix of {tuple(start.shape)}",
            f"{tuple(held.prompt_embeddings.shape)}, as the adapter",
        )
    with torch.no_grad():
        held.prompt_embeddings.copy_(start)
    return start


def _held(model: Any, adapter: str | None) -> Any:
    name = adapter or model.active_adapter
    found = [d for d in model.adapter_modules(name).values() if hasattr(d, "layer")]
    if not found or found[0].prompt_encoder is not None:
        raise UsageError(
            f"adapter {name!r} is no prefix that can be set",
            "prefix tuning without prefix_projection",
        )
    return found[0]


def keys_and_values(model: Any, ids: Tensor) -> DynamicCache:
    """Return the cache after the frozen model has read `ids (1, length)`; whole, also where windows slide."""
    cache = DynamicCache()
    with frozen_base(model):
        # transformers 5.2x calls it cache, before that past_key_values.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        model(input_ids=ids.to(model.device), use_cache=True, **{name: cache})
    return cache


def laid_out(cache: Any, n: int) -> Tensor:
    """Return the first `n` positions of a cache of one row as `(n, layers · 2 · kv heads · head size)`."""
    layers = [(c.keys, c.values) for c in cache.layers] if hasattr(cache, "layers") else [kv[:2] for kv in cache]
    rows, length = layers[0][0].shape[0], min(t.shape[2] for kv in layers for t in kv)
    if rows != 1 or length < n:
        raise ConfigError(
            f"a start of {length} tokens in {rows} rows, for a prefix of num_virtual_tokens={n}",
            f"one row of {n} tokens and up",
            f"num_virtual_tokens={length}, or a longer text",
        )
    # (layers · 2, kv heads, n, size) to (n, layers · 2, kv heads, size)
    return torch.stack([t[0, :, :n] for kv in layers for t in kv]).permute(2, 0, 1, 3).reshape(n, -1)
