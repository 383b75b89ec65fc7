"""Activated LoRA: which tokens of a call an adapter with `alora_invocation_tokens` changes.

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
from typing import Any

import torch
from torch import Tensor

from ..core.adapters.active_adapters import ActiveAdapters, ChangedTokens
from ..core.attention.attention_functions import LAYOUT_KWARG
from ..core.attention.packed_layout import PackedLayout
from ..core.foundation.device import is_simulated
from ..errors import UsageError

Offsets = Sequence[int | None]
"""For each row the distance from the first changed token to the end of the row, as in PEFT; None: nothing changes."""
_NEVER = torch.iinfo(torch.int64).max // 2
_STARTS = "slimtune_invocation_starts"


def find_invocations(ids: Tensor, invocation: Sequence[int], rows: Tensor) -> Tensor:
    """Return for each token of `ids (tokens)` the index of its row's last invocation, `_NEVER` without one.

    `rows (tokens)` gives each token's row; a row's tokens are neighbours.
    """
    n = len(invocation)
    last = torch.full((ids.shape[0],), -1, device=ids.device)  # by row
    if n <= ids.shape[0]:
        windows, row_windows = ids.unfold(0, n, 1), rows.unfold(0, n, 1)
        found = (windows == torch.tensor(invocation, device=ids.device)).all(1)
        found &= row_windows[:, 0] == row_windows[:, -1]
        index = torch.arange(len(found), device=ids.device)
        last = last.scatter_reduce(0, row_windows[:, 0], torch.where(found, index, -1), "amax")
    starts = last[rows]
    return torch.where(starts < 0, _NEVER, starts)


def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: str, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """Return for each row of `input_ids (batch, tokens)` how many of its last tokens are changed; None: none.

    `adapter_names` gives each row's adapter in a mixed batch; only adapters with `alora_invocation_tokens` count.
    """
    offsets: list[int | None] = []
    for row, name in zip(input_ids, adapter_names or [active_adapter] * len(input_ids), strict=True):
        invocation = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        start = int(find_invocations(row, invocation, torch.zeros_like(row))[0]) if invocation else _NEVER
        offsets.append(None if start == _NEVER else len(row) - start)
    return offsets


@contextmanager
def fix_invocations(
    active: ActiveAdapters, configs: Mapping[str, Any], args: tuple, kwargs: dict[str, Any], offsets: Offsets | None
) -> Iterator[None]:
    """Inside the `with`, calls of the model are steps of a generation, and only its prompt is searched."""
    invocations = find_active_invocation_tokens(active, configs)
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
def select_tokens(
    active: ActiveAdapters, configs: Mapping[str, Any], args: tuple, kwargs: dict[str, Any], offsets: Offsets | None
) -> Iterator[Callable[[Any], None]]:
    """Inside the `with`, the adapted layers know which tokens of the call `model(*args, **kwargs)` are changed.

    Yields a function to be called with the call's output, which remembers where the rows start to change.
    """
    invocations = find_active_invocation_tokens(active, configs)
    if not invocations:
        yield lambda output: None
        return
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    starts, tokens = _find_tokens(active, invocations, args, kwargs, offsets, cache)

    def store_starts(output: Any) -> None:
        # transformers 5.2x renamed past_key_values to cache.
        outputs = (getattr(output, n, None) for n in ("cache", "past_key_values")) if cache is None else [cache]
        used = next((c for c in outputs if c is not None), None)
        if hasattr(used, "get_seq_length"):
            setattr(used, _STARTS, {**getattr(used, _STARTS, {}), **starts})

    before, active.changed_tokens = active.changed_tokens, tokens
    try:
        yield store_starts
    finally:
        active.changed_tokens = before


def find_active_invocation_tokens(active: ActiveAdapters, configs: Mapping[str, Any]) -> dict[str, list[int]]:
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
) -> tuple[dict[str, Tensor], dict[str, ChangedTokens]]:
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
            by_token = find_invocations(ids[0], invocation, packed_rows)
            starts[name], masks[name] = by_token[-1:], (positions >= by_token)[None]
            continue
        if active.invocation_starts is not None:
            start = active.invocation_starts[name].to(ids.device)
            start = start.repeat_interleave(batch // len(start))  # a row of the prompt for each of its beams
        else:
            start = _row_starts(ids, invocation, offsets) + past
            earlier = getattr(cache, _STARTS, {}).get(name)
            if past and offsets is None and earlier is not None:
                start = torch.where(start < _NEVER, start, earlier)
        starts[name], masks[name] = start, positions >= start[:, None]
    if active.row_adapters is not None:
        rows = active.get_row_masks(batch, ids.device)
        masks = {n: mask & rows[n][:, None] for n, mask in masks.items()}
    kept = kwargs.get("logits_to_keep")
    kept = torch.arange(length)[-kept:] if isinstance(kept, int) else kept
    # How many tokens are changed depends on values, which a simulation does not have: it assumes all of them.
    every = torch.arange(batch * length, device=ids.device) if is_simulated() else None
    indices = {n: mask.reshape(-1).nonzero()[:, 0] if every is None else every for n, mask in masks.items()}
    return starts, {n: ChangedTokens(batch, length, i, kept) for n, i in indices.items()}


def _warn_about_missing_ids() -> None:
    message = "there are no input_ids to find invocation tokens in, so the activated LoRA changes nothing in this call"
    warnings.warn(message, stacklevel=5)


def _find_ids(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
    return next((t for t in candidates if isinstance(t, Tensor) and not t.is_floating_point()), None)


def _row_starts(ids: Tensor, invocation: Sequence[int], offsets: Offsets | None) -> Tensor:
    """Return for each row of `ids (batch, tokens)` the index of its first changed token, `_NEVER` without one."""
    batch, length = ids.shape
    if offsets is not None:
        if len(offsets) != batch:
            raise UsageError(f"alora_offsets has {len(offsets)} entries for {batch} rows", "one for each row")
        return torch.tensor([_NEVER if o is None else max(length - o, 0) for o in offsets], device=ids.device)
    rows = torch.arange(batch, device=ids.device)[:, None].expand(batch, length).reshape(-1)
    starts = find_invocations(ids.reshape(-1), invocation, rows).view(batch, length)[:, 0]
    return torch.where(starts < _NEVER, starts % length, starts)


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
