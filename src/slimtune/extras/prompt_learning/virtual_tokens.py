"""One call of a backbone with virtual tokens in front: its positions, attention masks and cache.

`prompt_modules.py` shows where the virtual tokens go.
"""

import inspect
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from ...core.adapters.adapter_module import AdapterModule, BaseForward
from ...core.attention.attention_functions import LAYOUT_KWARG, get_original_attention_name
from ...core.attention.packed_layout import RowMask
from ...core.models.lm_head import ModelInputs
from ...errors import ModelError, UsageError
from .learned_prefix import make_bool_or_additive_mask


class BackboneCall:
    """One call of a backbone `module`: `inputs` are its arguments by name."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.module: Any = module
        names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
        self.takes_positions = "position_ids" in names
        self.inputs: ModelInputs = {**dict(zip(names, args, strict=False)), **kwargs}
        # transformers 5.2x renamed past_key_values to cache.
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        if self.cache_name == "cache" and "past_key_values" in self.inputs:
            self.inputs["cache"] = self.inputs.pop("past_key_values")
        self.return_dict = self.inputs.get("return_dict")
        wanted = getattr(module.config, "return_dict", True) if self.return_dict is None else self.return_dict
        self.return_tuple = not wanted
        self.inputs["return_dict"] = True
        cache = self.inputs.get(self.cache_name)
        self.cached_length = int(cache.get_seq_length()) if cache is not None else 0
        # A mark on the cache: the number of virtual tokens that it contains, by `id` of the adapter module.
        self.cached_virtual_tokens: dict[int, int] = getattr(cache, "_virtual_tokens", {})
        embeds = self.inputs.get("inputs_embeds")
        tokens = self.inputs["input_ids"] if embeds is None else embeds
        self.batch, self.length = tokens.shape[0], tokens.shape[1]

    def run_with_virtual_tokens(self, base: BaseForward, module: AdapterModule, virtual: Tensor, rows: RowMask) -> Any:
        """Run the backbone with virtual tokens `(n, hidden)` in front; return the hidden states of the other tokens.

        In rows that do not attend to the virtual tokens of `module`, they are masked out.
        """
        n = virtual.shape[0]
        self.inputs.pop("cache_position", None)  # the model recomputes it
        if getattr(self.inputs.get(self.cache_name), "is_compileable", False):
            hint = 'generate(..., cache_implementation="dynamic"), or prefix tuning, which needs no space in the cache'
            raise UsageError(f"the cache has a fixed length, without space for {n} virtual tokens", hint=hint)
        if self.inputs.get("token_type_ids") is not None:
            raise UsageError("token_type_ids are given, which virtual tokens do not have", hint="omit token_type_ids")
        if rows is not None and not self.takes_positions and _embeds_positions(self.module):
            message = f"{type(self.module).__name__} takes no position_ids, so all rows have the same virtual tokens"
            raise UsageError(message, "a batch without adapter_names", "set_adapter, and one call for each adapter")
        cached, embeds = self.has_cached_tokens(module, n), self._embed_tokens()
        own_rows = torch.ones(self.batch, dtype=torch.bool, device=embeds.device) if rows is None else rows
        start = self._extend_positions_and_mask(n, own_rows, cached, need_mask=rows is not None)
        if not cached:
            virtual = virtual.to(device=embeds.device, dtype=embeds.dtype).expand(self.batch, -1, -1)
            self.inputs["inputs_embeds"] = _insert_columns(virtual, embeds, start, 1)
        out = self.run_and_mark_cache(base, module, n)
        if not cached:
            out = _remove_positions(out, start, n)
        return self.format_output(out)

    def run_encoder(self, base: BaseForward, virtual: Tensor, *, keep: bool) -> Any:
        """Run an encoder with virtual tokens `(n, hidden)` in front of each row; `keep` leaves them in its output."""
        n, embeds, mask = virtual.shape[0], self._embed_tokens(), self.inputs.get("attention_mask")
        virtual = virtual.to(device=embeds.device, dtype=embeds.dtype).expand(self.batch, -1, -1)
        self.inputs["inputs_embeds"] = torch.cat([virtual, embeds], dim=1)
        if mask is not None:
            self.inputs["attention_mask"] = _with_ones_in_front(mask, n)
        if (types := self.inputs.get("token_type_ids")) is not None:
            self.inputs["token_type_ids"] = torch.cat([types.new_zeros(len(types), n), types], dim=1)
        if (positions := self.inputs.get("position_ids")) is not None:
            first = positions[..., :1] + torch.arange(n, device=positions.device)
            self.inputs["position_ids"] = torch.cat([first, positions + n], dim=-1)
        out = base(**self.inputs)
        return self.format_output(out if keep else _remove_positions(out, None, n))

    def run_with_cached_prefix(self, base: BaseForward, module: AdapterModule, prefix: list, *, causal: bool) -> Any:
        """Run the backbone with a prefix in its cache, which is made for this call if the caller has none.

        `prefix` has the learned keys and values `(heads, n, head size)` of each layer. The model counts positions from
        its cache, so that they start after the prefix.
        """
        name, n, given = type(self.module).__name__, prefix[0][0].shape[1], self.inputs.get(self.cache_name)
        if getattr(given, "is_compileable", False):
            raise UsageError(f"the cache has a fixed length, without space for a prefix of {n}", "a dynamic cache")
        if self.module.training and any(getattr(m, "gradient_checkpointing", False) for m in self.module.modules()):
            message = f"a {name} takes the prefix from its cache, which activation checkpointing removes"
            raise UsageError(message, hint="gradient_checkpointing_disable(), or prompt tuning")
        if LAYOUT_KWARG in self.inputs:
            raise UsageError(f"a {name} with a prefix cannot run packed rows", hint="--set train.packing=false")
        self.inputs.pop("cache_position", None)
        positions, mask = self.inputs.get("position_ids"), self.inputs.get("attention_mask")
        cached = self.has_cached_tokens(module, n)
        if not cached and mask is None and causal and self.length > 1 and _is_2d(positions):
            mask = self._make_packed_mask(positions)
        if _is_2d(mask):
            mask = _with_ones_in_front(mask, n)
        elif mask is not None:
            rows = torch.ones(self.batch, dtype=torch.bool, device=mask.device)
            mask = self._extend_prepared_mask(mask, n, rows, self.get_position_ids(), cached=True)
        self.inputs["attention_mask"] = mask
        if positions is not None:
            self.inputs["position_ids"] = positions + n
        if not cached:
            self._fill_cache(module, prefix)
        wanted = self.inputs.get("use_cache")
        wanted = causal and (getattr(self.module.config, "use_cache", False) if wanted is None else wanted)
        if causal:
            self.inputs["use_cache"] = True  # Whisper ignores its cache otherwise
        try:
            out = self.run_and_mark_cache(base, module, n)
        except RuntimeError as e:
            if "Sizes of tensors must match" not in str(e):
                raise
            shape = f"{len(prefix[0][0])} heads of size {prefix[0][0].shape[2]}"
            raise ModelError(f"the prefix has {shape}, which does not fit the keys of a {name}: {e}") from None
        tokens, cache = self.cached_length + self.length, self.inputs[self.cache_name]
        if cache.get_seq_length() != tokens:
            raise ModelError(f"a {name} does not read its cache, so that the prefix did nothing", "a decoder, or BERT")
        if given is None and not wanted and getattr(out, self.cache_name, None) is not None:
            out = replace(out, **{self.cache_name: None})
        return self.format_output(out)

    def _fill_cache(self, module: AdapterModule, prefix: list) -> None:
        cache: Any = self.inputs.get(self.cache_name)
        if cache is None:
            cache = DynamicCache()
            if self.inputs.get("encoder_hidden_states") is not None:
                cache = EncoderDecoderCache(cache, DynamicCache())
            self.inputs[self.cache_name] = cache
        for layer, keys_and_values in enumerate(prefix):
            like = {"device": self.module.device, "dtype": self.module.dtype}
            keys, values = (t.to(**like).expand(self.batch, -1, -1, -1) for t in keys_and_values)
            getattr(cache, "self_attention_cache", cache).update(keys, values, layer)
        n = prefix[0][0].shape[1]
        self.cached_virtual_tokens = {**self.cached_virtual_tokens, id(module): n}
        cache._virtual_tokens = self.cached_virtual_tokens
        self.cached_length += n

    def has_cached_tokens(self, module: AdapterModule, n: int) -> bool:
        """Return whether the cache contains the start of the sequence, with the `n` virtual tokens of `module`."""
        cached, virtual = self.cached_length, self.cached_virtual_tokens
        if id(module) not in virtual and cached == sum(virtual.values()):
            return False  # at most the prefix of another adapter
        if cached and id(module) not in virtual:
            message = "the cache was filled without this adapter's virtual tokens"
            raise UsageError(message, "a cache from the same adapter", "start with an empty cache")
        mask, positions, tokens = self.inputs.get("attention_mask"), self.inputs.get("position_ids"), cached - n
        if cached and n and sum(virtual.values()) == n:
            # generate() counts all cached positions as tokens, and would skip too many of a whole sequence.
            new = mask.shape[1] - tokens if _is_2d(mask) else self.length
            first = int(positions.flatten()[0]) if mask is None and _is_2d(positions) else tokens
            if new != self.length or first != tokens:
                message = f"the cache contains {tokens} tokens, and the {self.length} new tokens do not continue them"
                hint = "give generate() only the new tokens, and the attention_mask of the whole sequence"
                raise UsageError(message, hint=hint)
        return cached > 0

    def run_and_mark_cache(self, base: BaseForward, module: AdapterModule, num_virtual_tokens: int) -> Any:
        """Run the backbone; record on the cache that it starts with the virtual tokens of `module`."""
        given = self.inputs.get(self.cache_name)
        out = base(**self.inputs)
        for cache in (given, getattr(out, self.cache_name, None)):
            if cache is not None:
                cache._virtual_tokens = {**getattr(cache, "_virtual_tokens", {}), id(module): num_virtual_tokens}
        return out

    def get_caller_inputs(self) -> ModelInputs:
        """Return the inputs with the caller's own choice between a tuple and an output object."""
        given = {k: v for k, v in self.inputs.items() if k != "return_dict"}
        return given if self.return_dict is None else {**given, "return_dict": self.return_dict}

    def format_output(self, out: Any) -> Any:
        """Return the output as a tuple if the caller requested one."""
        return out.to_tuple() if self.return_tuple else out

    def get_position_ids(self) -> Tensor:
        """Return the position ids `(…, batch, length)` before virtual tokens; by default each row counts its tokens."""
        positions, mask = self.inputs.get("position_ids"), self.inputs.get("attention_mask")
        if positions is None and _is_2d(mask):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -self.length :]
        elif positions is None:
            device = next(v.device for v in self.inputs.values() if isinstance(v, Tensor))
            positions = torch.arange(self.length, device=device)[None] + self._count_cached_tokens()
        return positions.expand(*positions.shape[:-2], self.batch, self.length)

    def _count_cached_tokens(self) -> int:
        return self.cached_length - sum(self.cached_virtual_tokens.values())

    def _embed_tokens(self) -> Tensor:
        """Return the input embeddings `(batch, length, hidden)`; token ids are replaced by them in `inputs`."""
        ids = self.inputs.pop("input_ids", None)
        if self.inputs.get("inputs_embeds") is None:
            self.inputs["inputs_embeds"] = self.module.get_input_embeddings()(ids)
        return self.inputs["inputs_embeds"]

    def _extend_positions_and_mask(self, n: int, rows: Tensor, cached: bool, *, need_mask: bool) -> Tensor | None:
        """Extend positions and mask in `inputs` by `n` virtual tokens, which may be in the cache already.

        Returns:
            The column of each row before which they are inserted, `(batch, 1)`; None: before the first.
        """
        positions, mask = self.get_position_ids(), self.inputs.get("attention_mask")
        columns = torch.arange(n, device=positions.device)
        layout = self.inputs.get(LAYOUT_KWARG)
        if layout is not None:
            # An adapter inside this one may have shifted the first position.
            positions = torch.cat([positions[..., :1] + columns, positions + n], dim=-1)
            self.inputs.update({"position_ids": positions, LAYOUT_KWARG: layout.with_shared_prefix(n)})
            return None
        if mask is None and _is_2d(self.inputs.get("position_ids")) and self.length > 1 and not cached:
            mask = self._make_packed_mask(positions)
        if mask is None and need_mask:
            tokens = self._count_cached_tokens() + self.length
            mask = torch.ones(self.batch, tokens, dtype=torch.long, device=rows.device)
        start = None
        if _is_2d(mask):
            start = mask.long().argmax(1, keepdim=True)
            mask = _insert_columns(rows[:, None].expand(-1, n).to(mask.dtype), mask, start, 1)
        elif mask is not None:
            mask = self._extend_prepared_mask(mask, n, rows, positions, cached)
        shifted = positions + n * rows[:, None]
        if not cached:
            first = positions[..., :1]
            if start is not None:
                first = positions.gather(-1, start.expand(*positions.shape[:-1], 1))
            shifted = _insert_columns(first + columns, shifted, start, -1)
        self.inputs["attention_mask"] = mask
        if self.takes_positions:
            self.inputs["position_ids"] = shifted
        return start

    def _make_packed_mask(self, positions: Tensor) -> Any:
        """Return masks that separate the rows of a packed sequence; a row starts where the positions jump.

        Shapes do not depend on values, so that the planner can trace this on fake tensors.
        """
        implementation = get_original_attention_name(self.module.config._attn_implementation)
        if implementation not in ("eager", "sdpa"):
            message = f"packed rows behind virtual tokens need another attn_implementation than {implementation!r}"
            raise UsageError(message, "'sdpa' or 'eager'", "or rows of a padded batch")
        row = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
        visible = (row[:, :, None] == row[:, None, :]).tril()[:, None]
        distance = (positions[:, :, None] - positions[:, None, :])[:, None]
        dtype = torch.bool if implementation == "sdpa" else self._embed_tokens().dtype

        def mask(window: int | None) -> Tensor:
            return make_bool_or_additive_mask(visible if window is None else visible & (distance < window), dtype)

        windows = self._get_windows()
        return {k: mask(w) for k, w in windows.items()} if isinstance(windows, dict) else mask(windows)

    def _extend_prepared_mask(self, mask: Any, n: int, rows: Tensor, positions: Tensor, cached: bool) -> Any:
        """Return a 4-D mask (or one per layer type) with columns for `n` virtual tokens, which see positions from 0."""
        positions = positions if positions.dim() == 2 else positions[0]
        positions = positions + n if cached else positions - positions[:, :1] + n
        windows = self._get_windows()
        if isinstance(mask, dict):
            by_type = windows if isinstance(windows, dict) else dict.fromkeys(mask, windows)
            return {k: _add_mask_columns(m, n, rows, positions, by_type[k], cached) for k, m in mask.items()}
        # All layers use a single prepared mask as it is, so it has no window of its own here.
        window = None if isinstance(windows, dict) else windows
        return _add_mask_columns(mask, n, rows, positions, window, cached)

    def _get_windows(self) -> dict[str, int | None] | int | None:
        """Return the layers' attention window (None: no limit), by layer type if the model has several types."""
        config = self.module.config
        window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
        unknown = kinds - {"full_attention", "sliding_attention"}
        if unknown or getattr(config, "attention_chunk_size", None):
            message = f"{type(self.module).__name__} has layers that need special masks: {sorted(unknown) or 'chunked'}"
            raise ModelError(message, "layers with full or sliding attention", "a padded batch with a 2-D mask")
        if len(kinds) == 2:
            return {"full_attention": None, "sliding_attention": window}
        return None if kinds == {"full_attention"} else window


def _insert_columns(new: Tensor, tensor: Tensor, start: Tensor | None, dim: int) -> Tensor:
    """Return `tensor` with `new` inserted along `dim`, in each row before column `start (batch, 1)`; None: in front."""
    both = torch.cat([new, tensor], dim=dim)
    if start is None:
        return both
    n, column = new.shape[dim], torch.arange(both.shape[dim], device=tensor.device)
    source = torch.where(column < start, column + n, torch.where(column < start + n, column - start, column))
    return both.gather(dim, _expand_index(source, both, dim))


def _remove_columns(states: Tensor | None, start: Tensor | None, n: int) -> Tensor | None:
    """Return states `(batch, n + length, hidden)` without `n` positions from `start (batch, 1)`; None: the first."""
    if states is None or start is None:
        return states if states is None else states[:, n:]
    column = torch.arange(states.shape[1] - n, device=states.device)
    return states.gather(1, _expand_index(torch.where(column < start, column, column + n), states, 1))


def _remove_positions(out: Any, start: Tensor | None, n: int) -> Any:
    """Return a backbone's output without the hidden states of `n` positions, as in `_remove_columns`."""
    changed: dict[str, Any] = {"last_hidden_state": _remove_columns(out.last_hidden_state, start, n)}
    if getattr(out, "hidden_states", None) is not None:
        changed["hidden_states"] = tuple(_remove_columns(h, start, n) for h in out.hidden_states)
    return replace(out, **changed)


def _with_ones_in_front(mask: Tensor, n: int) -> Tensor:
    if mask.dim() != 2:
        message = f"the attention_mask has {mask.dim()} dimensions, which virtual tokens cannot extend"
        raise UsageError(message, "a mask (batch, tokens)")
    return torch.cat([mask.new_ones(len(mask), n), mask], dim=1)


def _embeds_positions(backbone: nn.Module) -> bool:
    """Return whether a backbone adds an embedding of each token's place in the sequence."""
    return any("Position" in type(m).__name__ and "Embedding" in type(m).__name__ for m in backbone.modules())


def _is_2d(tensor: Any) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.dim() == 2


def _expand_index(index: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Return `index (batch, columns)` in the shape that `tensor.gather(dim, …)` needs."""
    if dim == 1 and tensor.dim() == 3:
        return index[..., None].expand(-1, -1, tensor.shape[-1])
    return index.expand(*tensor.shape[:-1], -1)


def _add_mask_columns(
    mask: Tensor, n: int, rows: Tensor, positions: Tensor, window: int | None, cached: bool
) -> Tensor:
    """Return a mask `(batch, heads, q, k)`, boolean or added to scores, with columns for `n` virtual tokens in front.

    Only `rows (batch,)` attend to them. Queries are at `positions (batch, q)`, virtual tokens at 0 to n - 1. If they
    are `cached`, they are keys but not queries.
    """
    virtual = torch.arange(n, device=mask.device)
    if not cached:
        positions = torch.cat([virtual.expand(len(positions), n), positions], dim=1)
        hidden = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = torch.cat([mask.new_full((*mask.shape[:2], n, mask.shape[3]), hidden), mask], dim=2)
    distance = positions[:, :, None] - virtual
    visible = (distance >= 0) & rows[:, None, None]
    if window is not None:
        visible = visible & (distance < window)
    if not cached:
        # In rows that do not use them, virtual tokens see themselves, so that no row of the mask is empty.
        visible = visible | torch.eye(*distance.shape[1:], dtype=torch.bool, device=mask.device)
    columns = make_bool_or_additive_mask(visible[:, None], mask.dtype).expand(-1, mask.shape[1], -1, -1)
    return torch.cat([columns, mask.expand(len(positions), -1, -1, -1)], dim=3)
