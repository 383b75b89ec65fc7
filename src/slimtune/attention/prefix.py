"""Learned keys and values in the attention of each layer: what prefix tuning and LLaMA-Adapter put there.

    joint   softmax([q Kpᵀ, q Kᵀ] · scale) [Vp, V]                     the prefix stands before the sequence
    gated   softmax(q Kᵀ · scale) V + g · softmax(q Kpᵀ · scale) Vp    beside it, from zero on

The prefix enters where transformers' attention modules call their attention function, after the cache: so the cache
holds the sequence alone, activation checkpointing, padding, packing and generation need nothing, and every row of a
pack sees the prefix and itself. A module with such a delta reads its config through a view that names our function
(`config_of`); ours takes the prefixes from the call's keyword arguments, extends keys, values and mask, and hands on to
the function the user chose.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ModelError
from .packed_layout import LAYOUT_KWARG, SUPPORTED_ATTENTION, get_attention_function, original_attention

_NAME = "slimtune_prefix"
PREFIX_KWARG = "slimtune_prefixes"


RowMask = Tensor | None
"""Rows of a batch that a module applies to, as a bool tensor `(batch,)`; None means all rows."""


class AttentionPrefix(NamedTuple):
    """What one delta adds to the attention of a layer.

    Args:
        keys: `(key-value heads, n, head size)`, as they are after any rotation.
        values: the same shape.
        gate: None joins them to the sequence's softmax; a scalar tensor gives them a softmax of their own, times it.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None


def find_attention_modules(model: Any) -> list[str]:
    """Return the names of the self-attention modules that call transformers' attention interface, in layer order.

    Raises:
        ModelError: the model's attention cannot take a prefix; the reason is given.
    """
    require_decoder(model)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"the attention of a {type(model).__name__} cannot take learned keys and values",
            "a decoder whose attention calls transformers' attention interface (Llama, Mistral, Qwen, Gemma, GPT-2 …)",
            "tune this model by LoRA, IA3 or bottleneck adapters",
        )
    found = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if "config" in vars(module) and isinstance(index, int) and "attention" in type(module).__name__.lower():
            found[name] = index
    if sorted(found.values()) != list(range(len(found))) or not found:
        raise ModelError(
            f"the layers of a {type(model).__name__} have attention at {sorted(found.values())}",
            "one attention module in every layer",
            "tune this model by LoRA, IA3 or bottleneck adapters",
        )
    return sorted(found, key=found.__getitem__)


def require_decoder(model: Any) -> None:
    """Raise ModelError where a model does not read from left to right: learned positions stand before what is read."""
    config = getattr(model, "config", None)
    generates = hasattr(model, "can_generate") and model.can_generate()
    causal = any(getattr(m, "is_causal", False) for m in model.modules() if "attention" in type(m).__name__.lower())
    if config is None or getattr(config, "is_encoder_decoder", False) or not (generates or causal):
        raise ModelError(
            f"a {type(model).__name__} takes no learned positions here",
            "a decoder (Llama, Mistral, Qwen, Gemma, GPT-2 …)",
            "tune this model by LoRA, IA3 or bottleneck adapters",
        )


def make_prefix_config_view(module: nn.Module) -> Any:
    """Return a copy of an attention module's config that names our attention function, or the config as it is."""
    plain = vars(module)["config"]
    chosen = getattr(plain, "_attn_implementation", None)
    if original_attention(chosen) not in SUPPORTED_ATTENTION:
        return plain
    held = vars(module).get("_view")
    if held is None or held[0] is not plain or held[1] != chosen:
        view = copy.copy(plain)
        view.__dict__["_attn_implementation_internal"] = _NAME
        held = module.__dict__["_view"] = (plain, chosen, view)
    return held[2]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stand in for an attention function: `query (batch, heads, q, size)`, `key, value (batch, kv heads, k, size)`."""
    prefixes = kwargs.pop(PREFIX_KWARG, ())
    chosen = vars(module)["config"]._attn_implementation
    for prefix, _ in prefixes:
        _fits(module, prefix, key, kwargs)
    joint = [(p, rows) for p, rows in prefixes if p.gate is None]
    run, keys, values, mask = get_attention_function(module, chosen), key, value, attention_mask
    if joint:
        batch = query.shape[0]
        if LAYOUT_KWARG in kwargs:
            kwargs[LAYOUT_KWARG] = kwargs[LAYOUT_KWARG].behind_keys(sum(p.keys.shape[1] for p, _ in joint))
        else:
            mask = _extended(module, query, keys.shape[2], mask, joint, kwargs)
        keys = torch.cat([*(_batched(p.keys, batch, key) for p, _ in joint), keys], dim=2)
        values = torch.cat([*(_batched(p.values, batch, value) for p, _ in joint), values], dim=2)
    out, weights = run(module, query, keys, values, mask, **kwargs)
    for prefix, rows in prefixes:
        if prefix.gate is not None:
            out = out + gated_prefix_attention(query, prefix, rows, kwargs.get("scaling"))
    return out, weights


def _batched(prefix: Tensor, batch: int, like: Tensor) -> Tensor:
    return prefix.to(device=like.device, dtype=like.dtype).expand(batch, *prefix.shape)


def _extended(
    module: nn.Module, query: Tensor, k: int, mask: Tensor | None, joint: list, kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the mask `(batch, heads, q, n + k)`: each row sees its prefixes, as far as the layer's window goes."""
    batch, q, window = query.shape[0], query.shape[2], kwargs.get("sliding_window")
    if mask is None:
        if q == 1 and window is None and all(rows is None for _, rows in joint):
            return None
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # Without a mask several queries are the first ones of the sequence: what a static cache keeps behind is empty.
        seen = torch.ones(1, 1, q, k, dtype=torch.bool, device=query.device)
        mask = as_mask(seen.tril() if causal and q > 1 else seen, _mask_dtype(module, query))
    mask = mask[..., :k]
    # A window of w shows a query itself and w - 1 positions before it: its own first, then the prefix from its end.
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    room = None if window is None else window - shown.sum(-1, keepdim=True)
    parts = [mask]
    for prefix, rows in reversed(joint):
        n = prefix.keys.shape[1]
        seen = torch.ones(1, 1, 1, n, dtype=torch.bool, device=query.device)
        if rows is not None:
            seen = seen & rows[:, None, None, None]
        if room is not None:
            seen = seen & (n - torch.arange(n, device=query.device) <= room)
            room = room - n if rows is None else room  # a row of a mixed batch has one prefix
        parts.insert(0, as_mask(seen, mask.dtype))
    rows_of = batch if any(len(p) > 1 for p in parts) else 1
    return torch.cat([p.expand(rows_of, mask.shape[1], q, -1) for p in parts], dim=-1)


def _mask_dtype(module: Any, query: Tensor) -> torch.dtype:
    return query.dtype if original_attention(vars(module)["config"]._attn_implementation) == "eager" else torch.bool


def as_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that shows what is True in `seen`: bool as it is, or what is added to scores."""
    if dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def gated_prefix_attention(query: Tensor, prefix: AttentionPrefix, rows: RowMask, scaling: float | None) -> Tensor:
    """Return `g · softmax(q Kpᵀ · scale) Vp` as `(batch, q, heads, size)`."""
    assert prefix.gate is not None
    keys, values = (_batched(t, query.shape[0], query) for t in (prefix.keys, prefix.values))
    out = F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
    out = out.transpose(1, 2) * prefix.gate.to(device=query.device, dtype=query.dtype)
    return out if rows is None else out * rows[:, None, None, None]


def _fits(module: nn.Module, prefix: AttentionPrefix, key: Tensor, kwargs: dict[str, Any]) -> None:
    have, want = (prefix.keys.shape[0], prefix.keys.shape[2]), (key.shape[1], key.shape[3])
    if have != want:
        raise ModelError(
            f"the prefix has {have[0]} heads of size {have[1]}, {type(module).__name__} has {want[0]} of {want[1]}",
            "a model whose config tells the shape of its keys",
        )
    if kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} adds a bias by position, which learned keys have not",
            "a model that rotates its keys or embeds positions",
            "tune this model by LoRA, IA3 or bottleneck adapters",
        )


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
