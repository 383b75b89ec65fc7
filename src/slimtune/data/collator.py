"""Examples as one batch, and as the packs of an optimizer step.

Hidden state t predicts token t + 1. Which hidden states are worth a row of logits is known from the labels before the
model runs, so it is settled here and nothing in the step depends on data (it traces on fake tensors):

    logits_to_keep [C]  columns whose hidden state predicts a supervised token of some row, sorted, each once
    picked         [K]  for every supervised token: its place among the B·C kept states, flattened
    targets        [K]  that token, rows in the order given
    tokens         []   tokens of the rows, however they are laid

Rows are laid in one of three ways:

    laid      one sequence with a `layout` (attention/packed_layout.py): what rows begin with alike lies once
    in a row  one sequence whose `position_ids` begin at 0 with each row: models of transformers keep such rows apart
              only if the call has no attention mask **and** `use_cache=False`, which is the caller's to pass
    padded    one row each, filled on the right, with an `attention_mask`

A row's first token is never the target of the row before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .packing import bin_pack, pack_sequences
from .store import IGNORED, Example


class Collator:
    """Make batches of examples.

    Args:
        pad_token_id: what fills the end of shorter rows when they are padded.
        packing: lay all rows in one sequence; else one row each, padded on the right.
        layout: packed, give a layout, for models that take one.
        share: with a layout, lay what rows begin with alike once.
        room: most tokens of a batch as laid, for `packs`; None: no limit. A longer row goes alone.
        rows: most rows of a padded batch, for `packs`; None: no limit.
    """

    def __init__(
        self,
        pad_token_id: int,
        packing: bool = True,
        *,
        layout: bool = False,
        share: bool = True,
        room: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.pad_token_id, self.packing, self.layout = pad_token_id, packing, layout
        self.share, self.room, self.rows = share and layout and packing, room, rows

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return one batch.

        Always int64 `logits_to_keep` [C], `picked` [K], `targets` [K] and `tokens` []; packed, `input_ids` and
        `position_ids` [1, L], and the `layout`; else `input_ids` and `attention_mask` [B, L].

        Raises:
            DataError: no example has a token to learn.
        """
        rows = [list(e["input_ids"]) for e in examples]
        if self.packing:
            laid = pack_sequences(rows, share=self.share)
            batch: dict[str, Any] = {
                "input_ids": _int64([laid.tokens]),
                "position_ids": _int64([laid.layout.positions()]),
                **({"layout": laid.layout} if self.layout else {}),
            }
            at = [(0, laid.columns(r)) for r in range(len(rows))]
        else:
            batch = self._padded(rows)
            at = [(b, list(range(len(row)))) for b, row in enumerate(rows)]
        # (row of the batch, column of the hidden state, target) of every supervised token
        pairs = [
            (b, columns[t - 1], label)
            for (b, columns), e in zip(at, examples, strict=True)
            for t, label in enumerate(e["labels"])
            if t > 0 and label != IGNORED
        ]
        if not pairs:
            lines = ", ".join(str(e.get("line", "?")) for e in examples)
            raise DataError(f"a batch has no token to learn (rows of lines {lines})", hint="remove these rows")
        keep = sorted({column for _, column, _ in pairs})
        place = {column: i for i, column in enumerate(keep)}
        return batch | {
            "logits_to_keep": _int64(keep),
            "picked": _int64([b * len(keep) + place[column] for b, column, _ in pairs]),
            "targets": _int64([label for _, _, label in pairs]),
            "tokens": _int64(sum(map(len, rows))),
        }

    def groups(self, examples: Sequence[Example], room: int | None = None) -> list[list[int]]:
        """Divide examples into batches that keep to `rows` and to `room`, if given less than the collator's own.

        Returns:
            Their numbers, each once.
        """
        rows = [e["input_ids"] for e in examples]
        room = min(filter(None, (room, self.room)), default=None)
        if self.packing:
            return bin_pack(rows, room, share=self.share)
        found: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):  # of like length: little to fill
            # The first of a batch is its longest row.
            full = not found or len(found[-1]) == self.rows
            if full or (room and len(rows[found[-1][0]]) * (len(found[-1]) + 1) > room):
                found.append([])
            found[-1].append(i)
        return found

    def packs(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Return the batches of one optimizer step."""
        return [self([examples[i] for i in group]) for group in self.groups(examples)]

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(len(row) for row in rows)
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {"input_ids": _int64(ids), "attention_mask": _int64(mask)}


def _int64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
