"""Calls with activated LoRAs: which tokens an adapter with `alora_invocation_tokens` changes.

    ids          7 4 9 2 3 5 6        invocation tokens 2 3
    changed      - - - 2 3 5 6        from the last occurrence on; nothing in a row that has none

Up to there the model computes what the base computes, so the keys and values that the base has cached stay valid. The
rows of a packed sequence are searched one by one. During generation, and in calls that continue a cache, tokens that
follow the occurrence are changed too: the positions where rows start to change are stored on the cache.

Paper: https://arxiv.org/abs/2504.12397
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.adapters.active_adapters import ActiveAdapters
from ...core.adapters.peft_model import PeftModel
from ...core.attention.attention_functions import LAYOUT_KWARG
from ...core.attention.packed_layout import PackedLayout
from ...core.foundation.device import is_device_simulated
from ...errors import UsageError
from ...extras.mixed_batch import make_checkpointing_keep_row_adapters
from .alora import NEVER, find_last_invocation_or_never_per_token

Offsets = Sequence[int | None]
"""For each row the distance from the first changed token to the end of the row, as in PEFT; None: nothing changes."""
_STARTS = "slimtune_invocation_starts"


class ActivatedLoraCallsMixin(PeftModel):
    """Mixed into adapted models: a call knows which of its tokens each activated LoRA changes."""

    def __call__(self, *args: Any, alora_offsets: Offsets | None = None, **kwargs: Any) -> Any:
        """Run the model like its base.

        `alora_offsets` gives the number of last tokens of each row that an activated LoRA changes; None: those from
        the invocation tokens on.
        """
        active = self.adapter_state.active_state
        if not _find_active_invocation_tokens(active, self.peft_config):
            return super().__call__(*args, **kwargs)  # torch.compile stops at a `with`
        with _select_tokens(active, self.peft_config, args, kwargs, alora_offsets) as store_starts:
            make_checkpointing_keep_row_adapters(self)
            out = super().__call__(*args, **kwargs)
            store_starts(out)
        return out

    def generate(self, *args: Any, alora_offsets: Offsets | None = None, **kwargs: Any) -> Any:
        """Generate like the base; `alora_offsets` are those of the prompt."""
        with _fix_invocations(self.adapter_state.active_state, self.peft_config, args, kwargs, alora_offsets):
            return super().generate(*args, **kwargs)

    def must_prepare_call(self, kwargs: Mapping[str, Any]) -> bool:
        active = self.adapter_state.active_state
        # Called directly, the tokens of an activated LoRA are not known yet.
        unknown = active.alora_token_positions is None and bool(
            _find_active_invocation_tokens(active, self.peft_config)
        )
        return unknown or "alora_offsets" in kwargs or super().must_prepare_call(kwargs)


class ActivatedLoraPositions(NamedTuple):
    """The tokens of a call that one adapter changes."""

    batch_size: int
    sequence_length: int
    activated_token_indices: Tensor
    """The changed tokens, counted over all rows."""
    logits_to_keep: Tensor | None
    """The only columns that the output head gets (`logits_to_keep`); None: all."""

    def find_indices(self, x: Tensor, layer: str) -> Tensor:
        """Return the indices among the tokens of a layer's input `x`, `(batch, T, in)` or `(batch · T, in)`."""
        indices, shape = self.activated_token_indices.to(x.device), tuple(x.shape[:-1])
        if shape in ((self.batch_size, self.sequence_length), (self.batch_size * self.sequence_length,)):
            return indices
        if self.logits_to_keep is not None and shape == (self.batch_size, len(self.logits_to_keep)):
            changed = torch.zeros(self.batch_size * self.sequence_length, dtype=torch.bool, device=x.device)
            changed[indices] = True
            return changed.view(self.batch_size, -1)[:, self.logits_to_keep.to(x.device)].reshape(-1).nonzero()[:, 0]
        size = f"{self.batch_size} × {self.sequence_length}"
        message = f"{layer} gets an input of shape {tuple(x.shape)} in a call of {size} tokens"
        name = layer.rpartition(".")[2]
        hint = f"leave it out of the activated LoRA: exclude_modules=[{name!r}]"
        raise UsageError(message, "a layer that gets every token of the call", hint)


@contextmanager
def _fix_invocations(
    active: ActiveAdapters, configs: Mapping[str, Any], args: tuple, kwargs: dict[str, Any], offsets: Offsets | None
) -> Iterator[None]:
    """Inside the `with`, calls of the model are steps of a generation, and only its prompt is searched."""
    invocations = _find_active_invocation_tokens(active, configs)
    if invocations:
        ids = _find_ids(args, kwargs)
        if ids is None:
            _warn_about_missing_ids()
            ids = torch.full((1, 1), -1)
        ids = ids if ids.dim() == 2 else ids[None]
        active.invocation_starts = {n: _row_starts(ids, tokens, offsets) for n, tokens in invocations.items()}
    try:
        yield
    finally:
        active.invocation_starts = None


@contextmanager
def _select_tokens(
    active: ActiveAdapters, configs: Mapping[str, Any], args: tuple, kwargs: dict[str, Any], offsets: Offsets | None
) -> Iterator[Callable[[Any], None]]:
    """Inside the `with`, the adapted layers know which tokens of the call `model(*args, **kwargs)` are changed.

    Yields a function to be called with the call's output, which remembers where the rows start to change.
    """
    invocations = _find_active_invocation_tokens(active, configs)
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    starts, tokens = _find_tokens(active, invocations, args, kwargs, offsets, cache)

    def store_starts(output: Any) -> None:
        # transformers 5.2x renamed past_key_values to cache.
        outputs = (getattr(output, n, None) for n in ("cache", "past_key_values")) if cache is None else [cache]
        used = next((c for c in outputs if c is not None), None)
        if hasattr(used, "get_seq_length"):
            setattr(used, _STARTS, {**getattr(used, _STARTS, {}), **starts})

    before, active.alora_token_positions = active.alora_token_positions, tokens
    try:
        yield store_starts
    finally:
        active.alora_token_positions = before


def _find_active_invocation_tokens(active: ActiveAdapters, configs: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the invocation tokens of the adapters that run and have them."""
    names = active.names if active.row_adapters is None else active.row_adapters
    found = {n: getattr(configs.get(n), "alora_invocation_tokens", None) for n in names}
    return {n: tokens for n, tokens in found.items() if tokens}


def _find_tokens(
    active: ActiveAdapters,
    invocations: Mapping[str, list[int]],
    args: tuple,
    kwargs: dict[str, Any],
    offsets: Offsets | None,
    cache: Any,
) -> tuple[dict[str, Tensor], dict[str, ActivatedLoraPositions]]:
    """Return for each adapter the first changed position of each row, `(batch)`, and the changed tokens."""
    ids = _find_ids(args, kwargs)
    if ids is None:
        if offsets is None and active.invocation_starts is None:
            _warn_about_missing_ids()
        other = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 1)
        first = next(other, torch.empty(1, 1))
        ids = torch.full(first.shape[:2], -1, device=first.device)
    batch, length = ids.shape
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    packed_rows = None if past or offsets or active.invocation_starts else _packed_rows(ids, kwargs)
    positions = torch.arange(past, past + length, device=ids.device)
    starts, masks = {}, {}
    for name, invocation in invocations.items():
        if packed_rows is not None:
            by_token = find_last_invocation_or_never_per_token(ids[0], invocation, packed_rows)
            starts[name], masks[name] = by_token[-1:], (positions >= by_token)[None]
            continue
        if active.invocation_starts is not None:
            start = active.invocation_starts[name].to(ids.device)
            start = start.repeat_interleave(batch // len(start))  # a row of the prompt for each of its beams
        else:
            start = _row_starts(ids, invocation, offsets) + past
            earlier = getattr(cache, _STARTS, {}).get(name)
            if past and offsets is None and earlier is not None:
                start = torch.where(start < NEVER, start, earlier)
        starts[name], masks[name] = start, positions >= start[:, None]
    if active.row_adapters is not None:
        runner: Any = active.layer_runner  # that of extras/mixed_batch.py
        rows = runner.get_row_masks(batch, ids.device)
        masks = {n: mask & rows[n][:, None] for n, mask in masks.items()}
    kept = kwargs.get("logits_to_keep")
    kept = torch.arange(length)[-kept:] if isinstance(kept, int) else kept
    # How many tokens are changed depends on values, which a simulation does not have: it assumes all of them.
    every = torch.arange(batch * length, device=ids.device) if is_device_simulated() else None
    indices = {n: mask.reshape(-1).nonzero()[:, 0] if every is None else every for n, mask in masks.items()}
    return starts, {n: ActivatedLoraPositions(batch, length, i, kept) for n, i in indices.items()}


def _warn_about_missing_ids() -> None:
    message = "there are no input_ids to find invocation tokens in, so the activated LoRA changes nothing in this call"
    warnings.warn(message, stacklevel=5)


def _find_ids(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
    return next((t for t in candidates if isinstance(t, Tensor) and not t.is_floating_point()), None)


def _row_starts(ids: Tensor, invocation: Sequence[int], offsets: Offsets | None) -> Tensor:
    """Return for each row of `ids (batch, tokens)` the index of its first changed token, `NEVER` without one."""
    batch, length = ids.shape
    if offsets is not None:
        if len(offsets) != batch:
            raise UsageError(f"alora_offsets has {len(offsets)} entries for {batch} rows", "one for each row")
        return torch.tensor([NEVER if o is None else max(length - o, 0) for o in offsets], device=ids.device)
    rows = torch.arange(batch, device=ids.device)[:, None].expand(batch, length).reshape(-1)
    starts = find_last_invocation_or_never_per_token(ids.reshape(-1), invocation, rows).view(batch, length)[:, 0]
    return torch.where(starts < NEVER, starts % length, starts)


def _packed_rows(ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the row of each token of a packed sequence, `(tokens)`; None if the batch is not packed."""
    layout: PackedLayout | None = kwargs.get(LAYOUT_KWARG)
    if layout is not None:
        if any(parent >= 0 for parent in layout.parents):
            message = "rows share a prefix in which an activated LoRA may change tokens for some of them only"
            raise UsageError(message, hint="--set train.share_prefix=false")
        lengths = torch.tensor(layout.lengths, device=ids.device)
        return torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths, output_size=layout.total)
    positions = kwargs.get("position_ids")
    if positions is None or positions.shape != (1, ids.shape[1]) or kwargs.get("attention_mask") is not None:
        return None
    # Positions start at 0 with each row. Those of a continued sequence start higher, and have one row.
    return torch.cumsum(positions[0] == 0, 0).clamp_min(1) - 1
