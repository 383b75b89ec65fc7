"""Examples as one batch, and the loss over supervised positions alone.

Hidden state t predicts token t + 1. Which hidden states are worth a row of logits is known from the labels before the
model runs, so it is settled here and nothing in the step depends on data (it traces on fake tensors):

    logits_to_keep [C]  columns whose hidden state predicts a supervised token of some row, sorted, each once
    picked         [K]  for every supervised token: its place among the B·C logits, flattened
    targets        [K]  that token

Packed, the rows lie end to end in one row of L tokens, no padding, and `position_ids` begins at 0 with each: models
of transformers keep such rows apart only if the call has no attention mask **and** `use_cache=False`, which is the
caller's to pass. A row's first token is never the target of the row before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimtune.errors import DataError

IGNORED = -100


class Collator:
    """Make a batch of examples.

    Args:
        pad_token_id: what fills the end of shorter rows when they are not packed.
        packing: lay all rows end to end in one; else one row each, padded on the right.
    """

    def __init__(self, pad_token_id: int, packing: bool = True) -> None:
        self.pad_token_id, self.packing = pad_token_id, packing

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return int64 tensors.

        Always `logits_to_keep` [C], `picked` [K] and `targets` [K]; packed, `input_ids` and `position_ids` [1, L]; else
        `input_ids` and `attention_mask` [B, L].

        Raises:
            DataError: no example has a token to learn.
        """
        rows = [list(e["input_ids"]) for e in examples]
        starts = [0] * len(rows)
        if self.packing:
            for b in range(1, len(rows)):
                starts[b] = starts[b - 1] + len(rows[b - 1])
        # (row of the batch, column of the hidden state, target) of every supervised token
        pairs = [
            (0 if self.packing else b, starts[b] + t - 1, label)
            for b, e in enumerate(examples)
            for t, label in enumerate(e["labels"])
            if t > 0 and label != IGNORED
        ]
        if not pairs:
            lines = ", ".join(str(e.get("line", "?")) for e in examples)
            raise DataError(f"a batch has no token to learn (rows of lines {lines})", fix="remove these rows")
        keep = sorted({column for _, column, _ in pairs})
        place = {column: i for i, column in enumerate(keep)}
        batch = self._packed(rows) if self.packing else self._padded(rows)
        return batch | {
            "logits_to_keep": _int64(keep),
            "picked": _int64([b * len(keep) + place[column] for b, column, _ in pairs]),
            "targets": _int64([label for _, _, label in pairs]),
        }

    def _packed(self, rows: list[list[int]]) -> dict[str, Tensor]:
        ids = [token for row in rows for token in row]
        positions = [p for row in rows for p in range(len(row))]
        return {"input_ids": _int64([ids]), "position_ids": _int64([positions])}

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(len(row) for row in rows)
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {"input_ids": _int64(ids), "attention_mask": _int64(mask)}


def supervised_loss(logits: Tensor, picked: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the fp32 cross-entropy of the supervised tokens, as a scalar.

    Args:
        logits: `[B, C, V]`, the logits of the columns `logits_to_keep`.
        picked: `[K]` places among the B·C logits.
        targets: `[K]` token ids.
        num_items: the sum is divided by this (supervised tokens of the whole optimizer step); None: by K.
    """
    chosen = logits.flatten(0, 1).index_select(0, picked).float()
    if num_items is None:
        return cross_entropy(chosen, targets)
    return cross_entropy(chosen, targets, reduction="sum") / num_items


def _int64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
