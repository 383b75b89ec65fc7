"""Prompts and batches through the adapted model, one token of each row at a time.

The rows of a batch have different adapters and different lengths. Their keys and values lie in one cache, padded on the
left to the longest row:

    row 0      . . . a b c d        lengths 4, 7, 2
    row 1      a b c d e f g        a step adds a column on the right; the mask hides the padding,
    row 2      . . . . . a b        and positions count the row's own tokens

A prompt runs alone, without padding, and its keys and values are then copied into the batch, once for each answer to
it. Rows that leave are removed from the cache, and so are the columns that only they had.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..core.adapters.active_adapters import BASE_ROW
from ..errors import MixedBatchError, UsageError
from ..methods.lora.alora import calculate_alora_offsets

CACHE_GROWTH = 64
"""Tokens that a cache has room for after it was copied."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for further tokens, so that a step need not copy those of all before it."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of tokens `(rows, heads, tokens, features)`; return those of all tokens."""
        if not self.is_initialized or key_states.shape[-2] > 1:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        if self._room is None or self._room[0].shape[-2] == start or self.keys.data_ptr() != self._room[0].data_ptr():
            self._room = (_add_room(self.keys), _add_room(self.values))
        keys, values = self._room
        keys[:, :, start : start + 1], values[:, :, start : start + 1] = key_states, value_states
        self.keys, self.values = keys[:, :, : start + 1], values[:, :, : start + 1]
        return self.keys, self.values


def _add_room(tensor: Tensor) -> Tensor:
    rows, heads, tokens, features = tensor.shape
    roomy = tensor.new_empty(rows, heads, tokens + CACHE_GROWTH, features)
    roomy[:, :, :tokens] = tensor
    return roomy


class GenerationRow:
    """One row of a batch: its adapter, its tokens, and how many of them the cache has.

    `is_invoked` says whether the prompt contains the invocation of an activated LoRA, which then changes all that
    follows.
    """

    def __init__(self, adapter_or_base: str) -> None:
        self.adapter_or_base, self.length, self.is_invoked = adapter_or_base, 0, False
        self.ids: list[int] = []  # only if there is no cache
        self.next_token = 0  # that is not in the cache yet


class CachedBatch:
    """Rows that run together, and their cache; None for a model without one, whose rows run alone.

    Rows may join, and a row may be repeated, only if `MultiAdapterRunner.shares_batches` of each is true.
    """

    def __init__(self, first_row: GenerationRow, cache: Any) -> None:
        self.rows, self.cache = [first_row], cache

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return max(row.length for row in self.rows)

    def repeat(self, rows: Sequence[GenerationRow]) -> None:
        """Add rows that continue the prompt of the only row."""
        (first,) = self.rows
        for row in rows:
            row.length, row.is_invoked = first.length, first.is_invoked
        self.rows += rows
        self._select(torch.zeros(len(self.rows), dtype=torch.int64), 0)

    def join(self, other: "CachedBatch") -> None:
        """Take over the rows of another batch."""
        width = max(self.width, other.width)
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if mine.is_initialized:  # a layer that uses the keys of another one has none
                for name in ("keys", "values"):
                    tensors = (getattr(mine, name), getattr(theirs, name))
                    padded = [F.pad(t, (0, 0, width - t.shape[-2], 0)) for t in tensors]
                    setattr(mine, name, torch.cat(padded))
        self.rows += other.rows

    def keep(self, indices: Sequence[int]) -> None:
        """Keep the rows of these indices, and remove the others; without any, the cache is dropped."""
        before = self.width
        self.rows = [self.rows[i] for i in indices]
        if self.rows:
            self._select(torch.tensor(indices), before - self.width)
        else:
            self.cache = None

    def drop(self) -> None:
        """Remove all rows and the cache, in whatever state an error has left it."""
        self.rows, self.cache = [], None

    def _select(self, rows: Tensor, first_column: int) -> None:
        """Let the cache have these rows of the present ones, from a column on."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                tensors = (t[:, :, first_column:] for t in (layer.keys, layer.values))
                layer.keys, layer.values = (t.index_select(0, rows.to(t.device)) for t in tensors)


class MultiAdapterRunner:
    """Runs an adapted model for rows with different adapters. One thread at a time may use it.

    Args:
        adapted_model: in evaluation mode.
    """

    def __init__(self, adapted_model: Any) -> None:
        self.model = adapted_model
        parameters = inspect.signature(adapted_model.forward).parameters
        # transformers 5.2x calls the argument cache, earlier versions past_key_values.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._takes_positions = "position_ids" in parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # Keys and values of other kinds of layers (recurrent states, compressed keys) cannot be padded.
        layers = DynamicCache(config=adapted_model.config).layers
        self._pads = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        # A few families have states of another kind, or keep them in their modules: all tokens are computed again.
        self._caches = (
            self._cache_name in parameters
            and adapted_model._supports_default_dynamic_cache()
            and adapted_model.config.model_type != "recurrent_gemma"
        )
        self._mixes: dict[str, bool] = {}

    def mixes(self, adapter: str) -> bool:
        """Return whether an adapter can run in a batch whose rows have other adapters.

        Virtual tokens would stand before every row, so such an adapter has a batch of its own for each row.
        """
        if adapter not in self._mixes:
            self._mixes[adapter] = adapter == BASE_ROW or self._try_mixed_batch(adapter)
        return self._mixes[adapter]

    def shares_batches(self, adapter: str) -> bool:
        """Return whether rows with this adapter can share a batch with others that can."""
        return self._caches and self._pads and self.mixes(adapter)

    def _try_mixed_batch(self, adapter: str) -> bool:
        if self.model.peft_config[adapter].is_prompt_learning:
            return False
        ids = torch.ones(2, 1, dtype=torch.int64, device=self.model.device)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, adapter_names=[adapter, BASE_ROW], use_cache=False)
        except (MixedBatchError, UsageError):
            return False
        return True

    def prefill(
        self, row: GenerationRow, prompt: Sequence[int], generated: Sequence[int] = ()
    ) -> tuple[Tensor, CachedBatch]:
        """Run a row's prompt, and tokens that were generated after it but are in no cache any more.

        Returns:
            The logits `(1, vocabulary)` of the next token, fp32 or wider, and a batch of this row.
        """
        ids = [*prompt, *generated]
        cache = None
        if self._caches:
            cache = DynamicCache() if self._pads else DynamicCache(config=self.model.config)
            if self._pads:
                cache.layer_class_to_replicate = RoomyLayer
        else:
            row.ids = ids
        return self._run_all(row, ids, cache, len(generated)), CachedBatch(row, cache)

    def _run_all(self, row: GenerationRow, ids: Sequence[int], cache: Any, num_generated: int = 0) -> Tensor:
        inputs = torch.tensor([list(ids)], device=self.model.device)
        # The prompt alone says where an activated LoRA begins; offsets count tokens from the end.
        prompt = inputs[:, : len(ids) - num_generated]
        offsets = [
            offset and offset + num_generated
            for offset in calculate_alora_offsets(self.model.peft_config, row.adapter_or_base, prompt)
        ]
        row.is_invoked, row.length = offsets[0] is not None, len(ids)
        positions = torch.arange(len(ids), device=self.model.device)[None]
        return self._run([row], offsets, cache, inputs, None, positions)

    def decode(self, batch: CachedBatch) -> Tensor:
        """Run the next token of every row; return the logits `(rows, vocabulary)` of those after it, fp32 or wider."""
        device, rows = self.model.device, batch.rows
        if batch.cache is None:
            rows[0].ids.append(rows[0].next_token)
            return self._run_all(rows[0], rows[0].ids, None)
        ids = torch.tensor([[row.next_token] for row in rows], device=device)
        lengths = torch.tensor([row.length for row in rows], device=device)[:, None]
        width = batch.width
        mask = (torch.arange(width + 1, device=device) >= width - lengths).long() if rows[1:] else None
        offsets = [1 if row.is_invoked else None for row in rows]
        logits = self._run(rows, offsets, batch.cache, ids, mask, lengths)
        for row in rows:
            row.length += 1
        return logits

    @torch.no_grad()
    def _run(
        self,
        rows: list[GenerationRow],
        offsets: list[int | None],
        cache: Any,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
    ) -> Tensor:
        inputs = {"input_ids": ids, "alora_offsets": offsets, "use_cache": cache is not None, **self._last_logits}
        if cache is not None:
            inputs[self._cache_name] = cache
        if mask is not None:
            inputs["attention_mask"] = mask
        if self._takes_positions:
            inputs["position_ids"] = positions
        names = [row.adapter_or_base for row in rows]
        # The rows of one active adapter run as in training: the same kernels give the same numbers.
        if self.model.active_adapters != [names[0]] or len(set(names)) > 1:
            if self.mixes(names[0]):
                inputs["adapter_names"] = names
            else:
                self.model.set_adapter(names[0], inference_mode=True)
        logits = self.model(**inputs).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def measure_cache(self) -> int:
        """Return how many bytes the cache has for each token of a row of the base."""
        _, batch = self.prefill(GenerationRow(BASE_ROW), [0])
        if batch.cache is None:
            return 0
        layers = [layer for layer in batch.cache.layers if layer.is_initialized and hasattr(layer, "keys")]
        tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)
