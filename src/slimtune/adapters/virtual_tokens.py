"""One call of a backbone, with room for learned positions: its positions, its masks and what its cache holds.

See `adapters/prompt.py` for where the learned positions stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..attention.packed_layout import LAYOUT_KWARG, original_attention
from ..attention.prefix import as_mask
from ..errors import ModelError, UsageError
from .base import AdapterModule, BaseForward


class BackboneCall:
    """One call of a backbone: its inputs by the names of its forward."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.module = module
        self.config: Any = module.config
        names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
        self.values: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        # transformers calls it cache from 5.2x on, past_key_values before.
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        if self.cache_name == "cache" and "past_key_values" in self.values:
            self.values["cache"] = self.values.pop("past_key_values")
        asked = self.values.get("return_dict")
        self.as_tuple = not (getattr(self.config, "return_dict", True) if asked is None else asked)
        self.values["return_dict"] = True

    # --- the cache: which learned positions it holds, by delta ------------------------------------------------------

    @property
    def _past(self) -> int:
        cache = self.values.get(self.cache_name)
        return int(cache.get_seq_length()) if cache is not None else 0

    @property
    def _marks(self) -> dict[int, int]:
        return getattr(self.values.get(self.cache_name), "_learned_positions", {})

    def goes_on(self, delta: AdapterModule, n: int) -> bool:
        """Return whether the cache holds a beginning, which `delta` has put its `n` positions before."""
        past, marks = self._past, self._marks
        if past and id(delta) not in marks:
            raise UsageError(
                "the cache was filled without this adapter's learned positions",
                "a cache from the same adapter",
                "start with an empty cache",
            )
        mask, own, held = self.values.get("attention_mask"), self.values.get("position_ids"), past - n
        if past and n and sum(marks.values()) == n:
            # generate() takes what the cache holds for tokens, and would leave out as many of a whole sequence.
            given = mask.shape[1] - held if _is_flat(mask) else self.size[1]
            at = int(own.flatten()[0]) if mask is None and _is_flat(own) else held
            if given != self.size[1] or at != held:
                raise UsageError(
                    f"the cache holds {held} tokens, and {self.size[1]} more were given that do not go on from there",
                    "the tokens after those in the cache",
                    "give generate() the new tokens alone, beside the attention_mask of the whole sequence",
                )
        return past > 0

    def run(self, frozen: BaseForward, delta: AdapterModule, n: int) -> Any:
        """Run the backbone; note on the cache that it starts with `delta`'s `n` positions."""
        given = self.values.get(self.cache_name)
        out = frozen(**self.values)
        for cache in (given, getattr(out, self.cache_name, None)):
            if cache is not None:
                cache._learned_positions = {**getattr(cache, "_learned_positions", {}), id(delta): n}
        return out

    def answer(self, out: Any) -> Any:
        """Return the output in the form that was asked for."""
        return out.to_tuple() if self.as_tuple else out

    # --- the sequence -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """`(batch, length)` of what is given."""
        given = self.values.get("inputs_embeds")
        given = self.values["input_ids"] if given is None else given
        return given.shape[0], given.shape[1]

    def embeds(self) -> Tensor:
        """Return the input as embeddings `(batch, length, hidden)`; looked up once."""
        ids = self.values.pop("input_ids", None)
        if self.values.get("inputs_embeds") is None:
            self.values["inputs_embeds"] = self.module.get_input_embeddings()(ids)  # type: ignore[operator]
        return self.values["inputs_embeds"]

    def positions(self) -> Tensor:
        """Return the positions `(…, batch, length)`; where none are given, they count each row's tokens."""
        batch, length = self.size
        own, mask = self.values.get("position_ids"), self.values.get("attention_mask")
        if own is None and _is_flat(mask):
            own = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        elif own is None:
            device = next(v.device for v in self.values.values() if isinstance(v, Tensor))
            own = torch.arange(length, device=device)[None] + self._past - sum(self._marks.values())
        return own.expand(*own.shape[:-2], batch, length)

    def refuse_what_has_no_room(self, n: int) -> None:
        """Raise where `n` more positions would not fit what is given."""
        self.values.pop("cache_position", None)  # made anew by the model from what it gets
        if getattr(self.values.get(self.cache_name), "is_compileable", False):
            raise UsageError(
                f"the cache has a fixed length, with no room for {n} learned positions",
                "a cache that grows",
                'generate(..., cache_implementation="dynamic"), or prefix tuning, which needs no room',
            )
        if self.values.get("token_type_ids") is not None:
            raise UsageError(
                "token_type_ids are given, and learned positions have none", "none", "leave token_type_ids out"
            )

    def begin_with(self, n: int, mine: Tensor, goes_on: bool, *, always: bool) -> Tensor | None:
        """Let positions and mask begin with `n` learned ones in the rows `mine`.

        Returns:
            Before which column of each row they stand, `(batch, 1)`; None: before the first.
        """
        batch, length = self.size
        own, mask, layout = self.positions(), self.values.get("attention_mask"), self.values.get(LAYOUT_KWARG)
        if layout is not None:
            # What lies first begins its row; a prefix in front of all may have moved its position.
            learned = own[..., :1] + torch.arange(n, device=own.device)
            later = torch.cat([learned, own + n], dim=-1)
            self.values.update({"position_ids": later, LAYOUT_KWARG: layout.behind_tokens(n)})
            return None
        if mask is None and _is_flat(self.values.get("position_ids")) and length > 1 and not goes_on:
            mask = self._rows_apart(own)
        if mask is None and always:
            held = self._past - sum(self._marks.values())
            mask = torch.ones(batch, held + length, dtype=torch.long, device=mine.device)
        start = None
        if _is_flat(mask):
            start = mask.long().argmax(1, keepdim=True)
            mask = inserted(mine[:, None].expand(-1, n).to(mask.dtype), mask, start, 1)
        elif mask is not None:
            at = own if own.dim() == 2 else own[0]
            at = at + n if goes_on else at - at[:, :1] + n  # as the learned positions count, from 0
            windows = self._windows()
            if isinstance(mask, dict):
                kinds = windows if isinstance(windows, dict) else dict.fromkeys(mask, windows)
                mask = {k: _prepended(m, n, mine, at, kinds[k], goes_on) for k, m in mask.items()}
            else:
                # One prepared mask is taken for every layer as it is: what it says of windows, its maker knows.
                mask = _prepended(mask, n, mine, at, None if isinstance(windows, dict) else windows, goes_on)
        later = own + n * mine[:, None]
        if not goes_on:
            first = own[..., :1] if start is None else own.gather(-1, start.expand(*own.shape[:-1], 1))
            later = inserted(first + torch.arange(n, device=own.device), later, start, -1)
        self.values.update(position_ids=later, attention_mask=mask)
        return start

    def _rows_apart(self, positions: Tensor) -> Any:
        """Return the masks by which rows laid end to end see themselves alone; a row begins where positions jump.

        Nothing here depends on the values: it traces on fake tensors.
        """
        chosen = original_attention(self.config._attn_implementation)
        if chosen not in ("eager", "sdpa"):
            raise UsageError(
                f"rows laid end to end behind learned positions, with attn_implementation={chosen!r}",
                "'sdpa' or 'eager'",
                "or rows of a padded batch",
            )
        row = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
        seen = (row[:, :, None] == row[:, None, :]).tril()[:, None]
        away = (positions[:, :, None] - positions[:, None, :])[:, None]
        dtype = torch.bool if chosen == "sdpa" else self.embeds().dtype

        def mask(window: int | None) -> Tensor:
            return as_mask(seen if window is None else seen & (away < window), dtype)

        windows = self._windows()
        return {k: mask(w) for k, w in windows.items()} if isinstance(windows, dict) else mask(windows)

    def _windows(self) -> dict[str, int | None] | int | None:
        """Return how far a layer sees back, None for all: by kind of layer, where the model has several kinds."""
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        strange = kinds - {"full_attention", "sliding_attention"}
        if strange or getattr(self.config, "attention_chunk_size", None):
            raise ModelError(
                f"{type(self.module).__name__} has layers that need masks of their own: {sorted(strange) or 'chunked'}",
                "layers of full or sliding attention",
                "rows of a padded batch, with a mask (batch, length)",
            )
        if len(kinds) == 2:
            return {"full_attention": None, "sliding_attention": window}
        return None if kinds == {"full_attention"} else window


def _is_flat(tensor: Any) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.dim() == 2


def inserted(front: Tensor, own: Tensor, start: Tensor | None, dim: int) -> Tensor:
    """Return `own` with `front` inserted before column `start (batch, 1)` of each row; `dim` holds the columns."""
    both = torch.cat([front, own], dim=dim)
    if start is None:
        return both
    n, at = front.shape[dim], torch.arange(both.shape[dim], device=own.device)
    source = torch.where(at < start, at + n, torch.where(at < start + n, at - start, at))
    return both.gather(dim, _like(source, both, dim))


def left(states: Tensor | None, start: Tensor | None, n: int) -> Tensor | None:
    """Return states `(batch, n + length, hidden)` without those of the learned positions."""
    if states is None or start is None:
        return states if states is None else states[:, n:]
    at = torch.arange(states.shape[1] - n, device=states.device)
    return states.gather(1, _like(torch.where(at < start, at, at + n), states, 1))


def _like(index: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Return `index (batch, columns)` in the shape `gather` wants along the columns of `tensor`."""
    return (
        index[..., None].expand(-1, -1, tensor.shape[-1])
        if dim == 1 and tensor.dim() == 3
        else index.expand(*tensor.shape[:-1], -1)
    )


def _prepended(mask: Tensor, n: int, mine: Tensor, at: Tensor, window: int | None, goes_on: bool) -> Tensor:
    """Return a prepared mask `(batch, heads, q, k)` with `n` learned positions in front.

    Args:
        mask: the mask.
        n: how many learned positions.
        mine: rows that see them, `(batch,)`.
        at: positions of the queries, `(batch, q)`, where those of the learned ones are 0 to n - 1.
        window: how far a query sees back; None: all.
        goes_on: the learned positions lie in the cache and are no queries.
    """
    learned = torch.arange(n, device=mask.device)
    if not goes_on:
        at = torch.cat([learned.expand(len(at), n), at], dim=1)
        top = mask.new_full(
            (*mask.shape[:2], n, mask.shape[3]), 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        )
        mask = torch.cat([top, mask], dim=2)
    away = at[:, :, None] - learned
    seen = away >= 0 if window is None else (away >= 0) & (away < window)
    # Where they are not the row's, the learned positions see themselves, so that no row of the mask is empty.
    own = (
        away.new_zeros(away.shape[1:]).bool()
        if goes_on
        else torch.eye(*away.shape[1:], dtype=torch.bool, device=mask.device)
    )
    seen = (seen & mine[:, None, None]) | own
    columns = as_mask(seen[:, None], mask.dtype).expand(-1, mask.shape[1], -1, -1)
    return torch.cat([columns, mask.expand(len(at), -1, -1, -1)], dim=3)


def each(out: Any, change: Callable[[Any], Any]) -> Any:
    """Return a backbone's output with `change` made to each of its hidden states."""
    changed = {"last_hidden_state": change(out.last_hidden_state)}
    if getattr(out, "hidden_states", None) is not None:
        changed["hidden_states"] = tuple(change(s) for s in out.hidden_states)
    return replace(out, **changed)
