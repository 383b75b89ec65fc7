"""Learned keys and values in every layer's attention, for prefix tuning and LLaMA-Adapter.

    joint   softmax([q Kpᵀ, q Kᵀ] · scale) [Vp, V]                     the prefix comes before the sequence
    gated   softmax(q Kᵀ · scale) V + g · softmax(q Kpᵀ · scale) Vp    beside it, with g = 0 at the start

The prefix enters where transformers' attention modules call their attention function, which is after the cache. So the
cache contains only the sequence, activation checkpointing, padding, packing and generation work unchanged, and every
row of a packed sequence attends to the prefix and to itself.

transformers looks the function up by a name in the module's config. An attention module with such an adapter reads its
config through a copy that names our function (`copy_config_with_prefix_attention`). Ours takes the prefixes from the
call's keyword arguments, extends keys, values and mask, and calls the function that the user chose.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.attention.attention_functions import (
    LAYOUT_KWARG,
    SUPPORTED_ATTENTION,
    get_attention_function,
    get_original_attention_name,
    has_attention_interface,
)
from ...core.attention.packed_layout import RowMask
from ...errors import ModelError

PREFIX_KWARG = "slimtune_prefixes"
_NAME = "slimtune_prefix"
_DECODERS = "a decoder with transformers' attention interface (Llama, Mistral, Qwen, Gemma, GPT-2 …)"
OTHER_METHODS = "tune this model with LoRA, IA3 or bottleneck adapters"


class AttentionPrefix(NamedTuple):
    """Learned keys and values of one adapter in one layer.

    Args:
        keys: `(key-value heads, n, head size)`, as they are after rotation.
        values: the same shape.
        gate: None: they join the sequence's softmax; a scalar tensor: factor on a softmax of their own.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None


def find_attention_module_names(model: Any) -> list[str]:
    """Return the names of the self-attention modules, in layer order.

    Raises:
        ModelError: the model's attention cannot take a prefix; the message says why.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    generates = hasattr(model, "can_generate") and model.can_generate()
    causal = any(getattr(m, "is_causal", False) for m in model.modules() if "attention" in type(m).__name__.lower())
    if config is None or getattr(config, "is_encoder_decoder", False) or not (generates or causal):
        raise ModelError(f"virtual tokens are not supported for a {name}", _DECODERS, OTHER_METHODS)
    if not has_attention_interface(model):
        raise ModelError(f"the attention of a {name} cannot take learned keys and values", _DECODERS, OTHER_METHODS)
    layers = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if "config" in vars(module) and isinstance(index, int) and "attention" in type(module).__name__.lower():
            layers[path] = index
    if not layers or sorted(layers.values()) != list(range(len(layers))):
        problem = f"a {name} has attention modules in layers {sorted(layers.values())}"
        raise ModelError(problem, "one attention module in every layer", OTHER_METHODS)
    return sorted(layers, key=layers.__getitem__)


def copy_config_with_prefix_attention(module: nn.Module) -> Any:
    """Return a copy of an attention module's config that names our attention function, or the config as it is."""
    config = vars(module)["config"]
    implementation = getattr(config, "_attn_implementation", None)
    if get_original_attention_name(implementation) not in SUPPORTED_ATTENTION:
        return config
    cached = vars(module).get("_prefix_config")
    if cached is None or cached[0] is not config or cached[1] != implementation:
        view = copy.copy(config)
        view.__dict__["_attn_implementation_internal"] = _NAME
        cached = module.__dict__["_prefix_config"] = (config, implementation, view)
    return cached[2]


def make_bool_or_additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of `visible` (bool): itself for dtype bool, else what is added to the scores."""
    if dtype == torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def gated_prefix_attention(query: Tensor, prefix: AttentionPrefix, row_mask: RowMask, scaling: float | None) -> Tensor:
    """Return `g · softmax(q Kpᵀ · scale) Vp` as `(batch, q, heads, size)`."""
    assert prefix.gate is not None
    keys, values = (_expand_to_batch(t, query) for t in (prefix.keys, prefix.values))
    out = F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
    out = out.transpose(1, 2) * prefix.gate.to(device=query.device, dtype=query.dtype)
    return out if row_mask is None else out * row_mask[:, None, None, None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function with prefixes: `query (batch, heads, q, size)`, `key, value (batch, kv heads, k, size)`."""
    given = kwargs.pop(PREFIX_KWARG, [])
    prefixes = list(given)
    given.clear()  # the caller checks that they arrived
    for prefix, _ in prefixes:
        shape, expected = (prefix.keys.shape[0], prefix.keys.shape[2]), (key.shape[1], key.shape[3])
        if shape != expected:
            name = type(module).__name__
            message = (
                f"the prefix has heads × size {shape[0]} × {shape[1]}, but {name} has {expected[0]} × {expected[1]}"
            )
            raise ModelError(message, "a model whose config gives the shape of its keys")
        if kwargs.get("position_bias") is not None:
            message = f"{type(module).__name__} adds a bias by position, which learned keys do not have"
            raise ModelError(message, "a model that rotates its keys or embeds positions", OTHER_METHODS)
    joint = [(p, rows) for p, rows in prefixes if p.gate is None]
    keys, values, mask = key, value, attention_mask
    if joint:
        if LAYOUT_KWARG in kwargs:
            n = sum(p.keys.shape[1] for p, _ in joint)
            kwargs[LAYOUT_KWARG] = kwargs[LAYOUT_KWARG].with_prefix_keys(n)
        else:
            mask = _extend_mask(module, query, keys.shape[2], mask, joint, kwargs)
        keys = torch.cat([*(_expand_to_batch(p.keys, key) for p, _ in joint), keys], dim=2)
        values = torch.cat([*(_expand_to_batch(p.values, value) for p, _ in joint), values], dim=2)
    run = get_attention_function(module, vars(module)["config"]._attn_implementation)
    out, weights = run(module, query, keys, values, mask, **kwargs)
    for prefix, rows in prefixes:
        if prefix.gate is not None:
            out = out + gated_prefix_attention(query, prefix, rows, kwargs.get("scaling"))
    return out, weights


def _expand_to_batch(prefix: Tensor, like: Tensor) -> Tensor:
    return prefix.to(device=like.device, dtype=like.dtype).expand(like.shape[0], *prefix.shape)


def _extend_mask(
    module: Any, query: Tensor, k: int, mask: Tensor | None, joint: list, kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the mask `(batch, heads, q, n + k)`: rows attend to their prefixes within the layer's window."""
    batch, q, window = query.shape[0], query.shape[2], kwargs.get("sliding_window")
    if mask is None:
        if q == 1 and window is None and all(rows is None for _, rows in joint):
            return None
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # Several queries without a mask are the start of the sequence; later slots of a static cache are empty.
        visible = torch.ones(1, 1, q, k, dtype=torch.bool, device=query.device)
        eager = get_original_attention_name(vars(module)["config"]._attn_implementation) == "eager"
        mask = make_bool_or_additive_mask(
            visible.tril() if causal and q > 1 else visible, query.dtype if eager else torch.bool
        )
    mask = mask[..., :k]
    # A window of w covers a query and the w - 1 positions before it: first its tokens, then the prefix from its end.
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    remaining = None if window is None else window - visible.sum(-1, keepdim=True)
    parts = [mask]
    for prefix, rows in reversed(joint):
        n = prefix.keys.shape[1]
        visible = torch.ones(1, 1, 1, n, dtype=torch.bool, device=query.device)
        if rows is not None:
            visible = visible & rows[:, None, None, None]
        if remaining is not None:
            visible = visible & (n - torch.arange(n, device=query.device) <= remaining)
            if rows is None:  # in a mixed batch each row has one prefix
                remaining = remaining - n
        parts.insert(0, make_bool_or_additive_mask(visible, mask.dtype))
    mask_batch = batch if any(len(p) > 1 for p in parts) else 1
    return torch.cat([p.expand(mask_batch, mask.shape[1], q, -1) for p in parts], dim=-1)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
