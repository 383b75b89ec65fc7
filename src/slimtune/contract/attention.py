"""Learned keys and values in the attention of each layer: what prefix tuning and LLaMA-Adapter put there.

    joint   softmax([q Kpᵀ, q Kᵀ] · scale) [Vp, V]                     the prefix stands before the sequence
    gated   softmax(q Kᵀ · scale) V + g · softmax(q Kpᵀ · scale) Vp    beside it, from zero on

The prefix enters where transformers' attention modules call their attention function, after the cache: so the cache
holds the sequence alone, activation checkpointing, padding, packing and generation need nothing, and every row of a
pack sees the prefix and itself. For the length of one call the module reads its config through a view that names our
function; ours extends keys, values and mask, and hands on to the one the user chose.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ModelError
from .delta import Delta, Frozen, MergeRefused, Rows

_NAME = "slimtune_prefix"
_SUPPORTED = ("eager", "sdpa")


class Prefix(NamedTuple):
    """What one delta adds to the attention of a layer.

    Args:
        keys: `(key-value heads, n, head size)`, as they are after any rotation.
        values: the same shape.
        gate: None joins them to the sequence's softmax; a scalar tensor gives them a softmax of their own, times it.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor | None = None


class Attention(Delta):
    """A delta at the attention module of a layer; a method defines `prefix`."""

    def prefix(self, module: nn.Module) -> Prefix:
        """Return the learned keys and values of this layer.

        Args:
            module: the frozen attention module, for methods that use its projections.
        """
        raise TypeError(f"{type(self).__name__} defines no prefix(module)")

    def around(self, frozen: Frozen, *args: Any, rows: Rows = None, **kwargs: Any) -> Any:
        """Run the attention with the prefix in sight."""
        module = frozen.module
        before = {n: module.__dict__.get(n) for n in ("config", "_prefixes")}
        seen = (*(before["_prefixes"] or ()), (self.prefix(module), rows))
        view = before["config"] if before["_prefixes"] else _view(before["config"], module)
        module.__dict__.update(config=view, _prefixes=seen)
        try:
            return frozen(*args, **kwargs)
        finally:
            module.__dict__["config"] = before["config"]
            if before["_prefixes"]:
                module.__dict__["_prefixes"] = before["_prefixes"]
            else:
                del module.__dict__["_prefixes"]

    def in_rows(self, frozen: Frozen, base: Frozen, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same, in sight of some rows."""
        return self.around(frozen, *args, rows=rows, **kwargs)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: keys and values are no weights."""
        raise MergeRefused(f"{type(self).__name__} adds keys and values, which are no change of a weight")


def attention_modules(model: Any) -> list[str]:
    """Return the names of the self-attention modules that call transformers' attention interface, in layer order.

    Raises:
        ModelError: the model's attention cannot take a prefix; the reason is given.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "_supports_attention_backend", False):
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


def _view(config: Any, module: nn.Module) -> Any:
    """Return a copy of the config that names our attention function."""
    chosen = config._attn_implementation
    if chosen not in _SUPPORTED:
        raise ModelError(
            f"{type(module).__name__} runs with attn_implementation={chosen!r}, which takes no prefix here",
            " or ".join(map(repr, _SUPPORTED)),
            'from_pretrained(..., attn_implementation="sdpa")',
        )
    view = copy.copy(config)
    view.__dict__["_attn_implementation_internal"] = _NAME
    view.__dict__["_chosen_attention"] = chosen
    return view


def _function(module: nn.Module) -> Callable[..., Any]:
    """Return the attention function the user chose; the eager one is a function of each model's own file."""
    homes = (vars(sys.modules[c.__module__]).get("eager_attention_forward") for c in type(module).__mro__)
    eager: Any = next((f for f in homes if f is not None), None)
    config: Any = module.config
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._chosen_attention, eager)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stand in for an attention function: `query (batch, heads, q, size)`, `key, value (batch, kv heads, k, size)`."""
    prefixes: Any = module.__dict__["_prefixes"]
    joint = [(p, rows) for p, rows in prefixes if p.gate is None]
    run, keys, values, mask = _function(module), key, value, attention_mask
    if joint:
        batch = query.shape[0]
        _fits(module, joint[0][0], key)
        keys = torch.cat([_batched(p.keys, batch, key) for p, _ in joint] + [key], dim=2)
        values = torch.cat([_batched(p.values, batch, value) for p, _ in joint] + [value], dim=2)
        mask = _extended(module, query, key, attention_mask, joint)
    out, weights = run(module, query, keys, values, mask, **kwargs)
    for prefix, rows in prefixes:
        if prefix.gate is not None:
            _fits(module, prefix, key)
            out = out + _gated(query, prefix, rows, kwargs.get("scaling"))
    return out, weights


def _batched(prefix: Tensor, batch: int, like: Tensor) -> Tensor:
    return prefix.to(like.dtype).expand(batch, *prefix.shape)


def _extended(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, joint: list) -> Tensor | None:
    """Return the mask `(batch, 1, q, n + k)`: each row sees its prefixes from everywhere."""
    q, k = query.shape[2], key.shape[2]
    if mask is None:
        if all(rows is None for _, rows in joint) and (q == 1 or not getattr(module, "is_causal", True)):
            return None
        seen = torch.ones(q, k, dtype=torch.bool, device=query.device)
        mask = (seen.tril(k - q) if getattr(module, "is_causal", True) else seen)[None, None]
        if module.config._chosen_attention == "eager":  # type: ignore[union-attr]
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    is_bool = mask.dtype == torch.bool
    yes, no = (True, False) if is_bool else (0.0, torch.finfo(mask.dtype).min)
    batch = query.shape[0] if any(rows is not None for _, rows in joint) else mask.shape[0]
    parts = []
    for prefix, rows in joint:
        columns = torch.full((batch, 1, q, prefix.keys.shape[1]), yes, dtype=mask.dtype, device=mask.device)
        parts.append(columns if rows is None else columns.masked_fill(~rows[:, None, None, None], no))
    return torch.cat([*parts, mask.expand(batch, -1, -1, -1)], dim=-1)


def _gated(query: Tensor, prefix: Prefix, rows: Rows, scaling: float | None) -> Tensor:
    """Return `g · softmax(q Kpᵀ · scale) Vp` as `(batch, q, heads, size)`."""
    assert prefix.gate is not None
    keys, values = (_batched(t, query.shape[0], query) for t in (prefix.keys, prefix.values))
    out = F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
    out = out.transpose(1, 2) * prefix.gate.to(query.dtype)
    return out if rows is None else out * rows[:, None, None, None]


def _fits(module: nn.Module, prefix: Prefix, key: Tensor) -> None:
    have, want = (prefix.keys.shape[0], prefix.keys.shape[2]), (key.shape[1], key.shape[3])
    if have != want:
        raise ModelError(
            f"the prefix has {have[0]} heads of size {have[1]}, {type(module).__name__} has {want[0]} of {want[1]}",
            "a model whose config tells the shape of its keys",
        )


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
