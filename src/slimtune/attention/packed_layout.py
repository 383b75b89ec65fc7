"""Rows laid in one sequence, and what each of their tokens sees: exact packing, shared beginnings laid once.

    rows        S a b     S a c     d e              S: what several rows begin with
    laid        S a | b | c | d e                    four segments; those of b and c stand below S a, d e below none
    positions   0 1   2   2   0 1

A token sees the segments above its own, whole, and its own up to itself: what the row alone would show it. So every
hidden state, loss and gradient is that of rows run alone, up to rounding. Attention is computed segment by segment over
`[segments above, own]` by the function the model was loaded with (sdpa or eager), so nothing is computed between rows
that do not see each other; on CUDA by flex attention with the same mask. A window of w shows a token itself and the
w − 1 positions before it on its way up.

The layout travels with the call: `model(..., slimtune_layout=layout)`, inside `laid_out(model)`. transformers hands
keyword arguments on to the attention function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ModelError
from ..utils.simulated_device import device_type, is_simulated
from .packed_attention import (
    MAX_SEGMENT_TOKENS,
    Segment,
    attention_by_segment,
    fake_tree_attention,
    flex_attention_supported,
    tree_attention,
    tree_mask,
)

LAYOUT_KWARG = "slimtune_layout"
_MARK = "slimtune_"
SUPPORTED_ATTENTION = ("sdpa", "eager")
"""Attention functions that can be run by segment."""


@dataclass(frozen=True)
class PackedLayout:
    """The segments of one sequence; plain numbers, so that a step has no shape that hangs on data.

    Args:
        lengths: tokens of each segment, in the order they lie.
        parents: for each segment the one above it, which lies earlier; -1: none.
        keys_before: learned keys that stand before every row and are no tokens (prefix tuning).
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    keys_before: int = 0
    _masks: dict[tuple, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.parents)
        assert all(-1 <= p < i for i, p in enumerate(self.parents))

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def path(self, segment: int) -> list[int]:
        """Return the segments above one, the uppermost first."""
        above: list[int] = []
        at = self.parents[segment]
        while at >= 0:
            above.insert(0, at)
            at = self.parents[at]
        return above

    def starts(self) -> list[int]:
        """Return the position of each segment's first token in its row."""
        return [sum(self.lengths[a] for a in self.path(i)) for i in range(len(self.lengths))]

    def positions(self) -> list[int]:
        """Return each token's position in its row."""
        return [start + t for start, n in zip(self.starts(), self.lengths, strict=True) for t in range(n)]

    def behind_keys(self, n: int) -> PackedLayout:
        """Return the layout with `n` more learned keys before every row: one object, whose masks all layers share."""
        held = ("behind", n)
        if held not in self._masks:
            self._masks[held] = replace(self, keys_before=self.keys_before + n, _masks={})
        return self._masks[held]

    def behind_tokens(self, n: int) -> PackedLayout:
        """Return the layout with a segment of `n` tokens laid first, above all rows."""
        parents = (-1, *(p + 1 for p in self.parents))
        return replace(self, lengths=(n, *self.lengths), parents=parents, _masks={})

    def forget(self) -> None:
        """Let go of the masks made so far; they are made again where they are needed."""
        self._masks.clear()

    def seen(self, window: int | None, device: torch.device) -> Tensor:
        """Return which keys each token sees, as a bool `(tokens, keys_before + tokens)`."""
        node = torch.arange(len(self.lengths), device=device).repeat_interleave(_int64(self.lengths, device))
        above = torch.zeros(len(self.lengths), len(self.lengths), dtype=torch.bool)
        for i in range(len(self.lengths)):
            above[i, [*self.path(i), i]] = True
        at = _int64(self.positions(), device)
        seen = above.to(device)[node[:, None], node[None, :]] & (at[:, None] >= at[None, :])
        away = at[:, None] - at[None, :]
        if self.keys_before:
            front = torch.arange(-self.keys_before, 0, device=device)
            away = torch.cat([at[:, None] - front[None, :], away], dim=1)
            seen = F.pad(seen, (self.keys_before, 0), value=True)
        return seen if window is None else seen & (away < window)

    def segments(self, window: int | None, query: Tensor) -> list[Segment]:
        """Return what each segment sees, as attention on a CPU takes it for queries like this one."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        held = ("segments", window, dtype)
        if held not in self._masks:
            firsts = [self.keys_before + sum(self.lengths[:i]) for i in range(len(self.lengths))]
            front = ((0, self.keys_before),) if self.keys_before else ()
            self._masks[held] = [
                Segment(
                    firsts[i] - self.keys_before,
                    n,
                    (*front, *((firsts[a], self.lengths[a]) for a in (*self.path(i), i))),
                    self.mask(i, window, dtype, query.device),
                )
                for i, n in enumerate(self.lengths)
            ]
        return self._masks[held]

    def mask(self, segment: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return what is added to a segment's scores `(1, 1, tokens, keys above and own)`; None: plainly causal."""
        n, above = self.lengths[segment], self.starts()[segment] + self.keys_before
        if window is not None and window >= above + n:
            window = None
        if not above and window is None:
            return None
        key = (n, above, window, dtype, device)
        if key not in self._masks:
            away = torch.arange(n, device=device)[:, None] + above - torch.arange(above + n, device=device)[None, :]
            hidden = away < 0 if window is None else (away < 0) | (away >= window)
            mask = torch.zeros(n, above + n, dtype=dtype, device=device)
            self._masks[key] = mask.masked_fill(hidden, torch.finfo(dtype).min)[None, None]
        return self._masks[key]


@contextmanager
def packed_attention(model: Any) -> Iterator[bool]:
    """Let a model take layouts for the length of the `with`; its other calls go on as before.

    Gives whether it can: its attention must call transformers' attention interface, and all its layers must attend,
    fully or within a sliding window.
    """
    chosen = getattr(model.config, "_attn_implementation", None) or ""
    if chosen.startswith(_MARK):
        yield True
        return
    if packing_unsupported_reason(model):
        yield False
        return
    model.set_attn_implementation(_MARK + chosen)
    try:
        yield True
    finally:
        model.set_attn_implementation(chosen)


def packing_unsupported_reason(model: Any) -> str:
    """Return why a model cannot take layouts, "" where it can."""
    chosen = original_attention(getattr(model.config, "_attn_implementation", None))
    text = model.config.get_text_config()
    strange = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not getattr(model, "_supports_attention_backend", False):
        return f"the attention of a {type(model).__name__} does not call transformers' attention interface"
    if chosen not in SUPPORTED_ATTENTION:
        return f"attn_implementation is {chosen!r}, not 'sdpa' or 'eager'"
    if strange or getattr(text, "attention_chunk_size", None):
        return f"it has layers that are not plain attention ({', '.join(sorted(strange)) or 'chunked'})"
    return ""


def original_attention(chosen: Any) -> Any:
    """Return the attention implementation the user chose, whether layouts are taken or not."""
    return chosen.removeprefix(_MARK) if isinstance(chosen, str) else chosen


def get_attention_function(module: nn.Module, chosen: str) -> Callable[..., Any]:
    """Return an attention function by its name; the eager one is a function of each model's own file."""
    if chosen != "eager":
        return ALL_ATTENTION_FUNCTIONS[chosen]
    homes = (vars(sys.modules[c.__module__]) for c in type(module).__mro__)
    return next(h["eager_attention_forward"] for h in homes if "eager_attention_forward" in h)


def empty_mask(device: torch.device) -> Tensor:
    """Return what stands for a mask where a layout says it all: transformers takes it as it is and makes none."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _attend(
    chosen: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stand in for an attention function: `query (1, heads, tokens, size)`, `key, value (1, kv heads, keys, size)`."""
    layout: PackedLayout | None = kwargs.pop(LAYOUT_KWARG, None)
    if layout is None:
        return get_attention_function(module, chosen)(module, query, key, value, mask, **kwargs)
    _require_plain(module, layout, query, key, kwargs)
    return _laid(chosen, module, query, key, value, layout, kwargs.get("sliding_window"), **kwargs), None


@torch.compiler.disable
def _laid(
    chosen: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    window: Any,
    **kwargs: Any,
) -> Tensor:
    """Return each token's attention to what it sees, `(1, tokens, heads, size)`.

    Compiled with the model, it would be compiled anew for each layout; flex attention is compiled by itself.
    """
    causal = len(layout.lengths) == 1 and not layout.keys_before and (window is None or window >= layout.total)
    plain = chosen == "sdpa" and kwargs.get("softcap") is None and not (causal and layout.total > MAX_SEGMENT_TOKENS)
    if plain and flex_attention_supported(query, key, kwargs.get("dropout", 0.0)):
        if is_simulated():
            return fake_tree_attention(query, key, value).transpose(1, 2).contiguous()
        held = ("flex", window, query.device)
        if held not in layout._masks:
            layout._masks[held] = tree_mask(
                layout.lengths, layout.parents, layout.positions(), layout.keys_before, window, query.device
            )
        out = tree_attention(query, key, value, layout._masks[held], kwargs.get("scaling"))
        return out.transpose(1, 2).contiguous()
    return _by_segment(chosen, module, query, key, value, layout, window, **kwargs)


def _by_segment(
    chosen: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    window: Any,
    **kwargs: Any,
) -> Tensor:
    # transformers' own refuses a soft cap; the kernel has no dropout.
    plain = kwargs.get("softcap") is None and not kwargs.get("dropout") and query.shape[-1] == value.shape[-1]
    if chosen == "sdpa" and device_type(query.device) == "cpu" and plain:
        return attention_by_segment(query, key, value, layout.segments(window, query), kwargs.get("scaling"))
    run = get_attention_function(module, chosen)
    keys, values = (t.split((layout.keys_before, *layout.lengths), dim=2) for t in (key, value))
    parts = []
    for i, q in enumerate(query.split(layout.lengths, dim=2)):
        way = [*([0] if layout.keys_before else []), *(a + 1 for a in layout.path(i)), i + 1]
        k, v = (_joined([t[a] for a in way], 2) for t in (keys, values))
        m = layout.mask(i, window, query.dtype, query.device)
        if m is None and chosen == "eager":
            n = q.shape[2]
            m = q.new_zeros(n, n).masked_fill(_ones(n, q.device).triu(1), torch.finfo(q.dtype).min)[None, None]
        parts.append(run(module, q, k, v, m, **kwargs)[0])
    return _joined(parts, 1)


def _require_plain(module: Any, layout: PackedLayout, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if query.shape[0] != 1 or query.shape[2] != layout.total or key.shape[2] != layout.total + layout.keys_before:
        raise ModelError(
            f"{name} attends from {query.shape[0]} rows of {query.shape[2]} tokens to {key.shape[2]}, the "
            f"layout has one row of {layout.total}",
            "a call without a cache",
            "--set train.packing=false",
        )
    windowed = getattr(module.config, "sliding_window", None) is not None
    hidden_window = windowed and "sliding_window" not in kwargs
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True) or hidden_window:
        why = "hides its window" if hidden_window else "is not causal, or adds a bias by position"
        raise ModelError(f"{name} {why}: rows cannot share one sequence", hint="--set train.packing=false")


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device)


def _int64(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


for _choice in SUPPORTED_ATTENTION:
    ALL_ATTENTION_FUNCTIONS.register(_MARK + _choice, partial(_attend, _choice))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_MARK + _choice, ALL_MASK_ATTENTION_FUNCTIONS[_choice])
