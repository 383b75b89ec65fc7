"""Collation of tokenized rows into micro-batches.

Hidden state t predicts token t + 1. The labels tell which hidden states need logits, so this is settled here, and the
step has no shape that depends on data (it can be traced on fake tensors):

    logits_to_keep [C]  columns whose hidden state predicts a supervised token of some row, sorted, each once
    hidden_index   [K]  for every supervised token: its position among the B·C kept hidden states, flattened
    targets        [K]  that token; the rows are in the order given
    tokens         []   number of tokens of the rows, before prefixes are shared
    row_targets    R    supervised tokens of each row, a tuple of numbers
    example_rows   N    rows of each example, a tuple of numbers
    row_scores     N    scores of the rows of each example, None for one that has none

There are three kinds of micro-batches:

    with a layout   one sequence and a `layout` (core/attention/packed_layout.py); a shared prefix is stored once
    packed          one sequence whose `position_ids` restart at 0 with each row. Models of transformers separate such
                    rows only without an attention mask **and** with `use_cache=False`, which the caller must pass
    padded          one row each, padded on the right, with an `attention_mask`

The first token of a row is never the target of the row before it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..foundation.sequences import IGNORE_INDEX
from .example_types import Batch, Example
from .packing import bin_pack_example_indices, pack_into_one_sequence
from .tokenized_dataset import list_tokens_and_labels_by_row

__all__ = ["IGNORE_INDEX", "Collator", "Example"]

ROW_KEYS = ("input_ids", "labels", "line", "row_lengths", "row_scores", "teacher_input_ids", "teacher_labels")
"""Keys of an example that describe its rows; the numbers of all others become tensors of the batch."""


class Collator:
    """Makes micro-batches of examples.

    Args:
        pad_token_id: the token that pads shorter rows.
        packing: put all rows into one sequence; else one row each, padded on the right.
        layout: packed, with a layout, for models that take one.
        share_prefix: with a layout, store a shared prefix once.
        max_tokens: most packed tokens of a micro-batch; None: no limit. A longer example is a micro-batch of its own.
        pooling_pad_id: for sequence classifiers, which read the last token of a row that is not this one; their
            batches have `row_ends` [R], its place among the B·L tokens, flattened, and need no supervised token.
        max_rows: most examples of a padded micro-batch; None: no limit.
    """

    def __init__(
        self,
        pad_token_id: int,
        packing: bool = True,
        *,
        with_packed_layout: bool = False,
        share_prefix: bool = True,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        pooling_pad_id: int | None = None,
    ) -> None:
        self.pad_token_id, self.packing, self.with_packed_layout = pad_token_id, packing, with_packed_layout
        self.share_prefix = share_prefix and with_packed_layout and packing
        self.max_tokens, self.max_rows, self.pooling_pad_id = max_tokens, max_rows, pooling_pad_id

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return one micro-batch.

        Always int64 `logits_to_keep` [C], `hidden_index` [K], `targets` [K] and `tokens` [], the counts of the rows,
        and a tensor [N, …] for each key that objectives add to examples; packed, `input_ids` and `position_ids`
        [1, L], and the `layout`; else `input_ids` and `attention_mask` [B, L]. Raise DataError if no example has a
        supervised token.
        """
        rows_of_examples = list(map(list_tokens_and_labels_by_row, examples))
        pairs = [pair for rows in rows_of_examples for pair in rows]
        rows = [list(ids) for ids, _ in pairs]
        if self.packing:
            packed = pack_into_one_sequence(rows, share_prefix=self.share_prefix)
            ids, positions = _int64([packed.tokens]), _int64([packed.layout.positions()])
            batch: Batch = {"input_ids": ids, "position_ids": positions}
            if self.with_packed_layout:
                batch["layout"] = packed.layout
            places = [(0, packed.get_token_indices(r)) for r in range(len(rows))]
        else:
            width = max(map(len, rows))
            padded = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
            mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
            batch = {"input_ids": _int64(padded), "attention_mask": _int64(mask)}
            places = [(b, list(range(len(row)))) for b, row in enumerate(rows)]
        # (row of the batch, column of the hidden state, target) of every supervised token
        predictions = [
            (b, columns[t - 1], label)
            for (b, columns), (_, labels) in zip(places, pairs, strict=True)
            for t, label in enumerate(labels)
            if t > 0 and label != IGNORE_INDEX
        ]
        if self.pooling_pad_id is not None:
            length = batch["input_ids"].shape[1]
            last = [max((t for t, i in enumerate(row) if i != self.pooling_pad_id), default=0) for row in rows]
            batch["row_ends"] = _int64([b * length + columns[t] for (b, columns), t in zip(places, last, strict=True)])
        elif not predictions:
            lines = ", ".join(str(e.get("line", "?")) for e in examples)
            raise DataError(f"a micro-batch has no supervised token (rows of lines {lines})", hint="remove these rows")
        kept = sorted({column for _, column, _ in predictions})
        position = {column: i for i, column in enumerate(kept)}
        return batch | {
            "logits_to_keep": _int64(kept),
            "hidden_index": _int64([b * len(kept) + position[column] for b, column, _ in predictions]),
            "targets": _int64([label for _, _, label in predictions]),
            "tokens": _int64(sum(map(len, rows))),
            "row_targets": tuple(sum(label != IGNORE_INDEX for label in labels[1:]) for _, labels in pairs),
            "example_rows": tuple(map(len, rows_of_examples)),
            "row_scores": tuple(e.get("row_scores") for e in examples),
            **{
                key: torch.from_numpy(np.array([e[key] for e in examples]))
                for key in examples[0]
                if key not in ROW_KEYS and not isinstance(examples[0][key], str)
            },
        }

    def group_rows(self, examples: Sequence[Example], max_tokens: int | None = None) -> list[list[int]]:
        """Return the example numbers of each micro-batch of a step, each once; `max_tokens` may lower the own limit."""
        rows = [[ids for ids, _ in list_tokens_and_labels_by_row(e)] for e in examples]
        max_tokens = min(filter(None, (max_tokens, self.max_tokens)), default=None)
        if self.packing:
            return bin_pack_example_indices(rows, max_tokens, share_prefix=self.share_prefix)
        longest = [max(map(len, ids)) for ids in rows]
        groups: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda i: -longest[i]):  # similar lengths need little padding
            full = not groups or len(groups[-1]) == self.max_rows
            # The first example of a group has its longest row.
            if full or (
                max_tokens and longest[groups[-1][0]] * sum(len(rows[e]) for e in (*groups[-1], i)) > max_tokens
            ):
                groups.append([])
            groups[-1].append(i)
        return groups

    def count_tokens(self, examples: Sequence[Example]) -> int:
        """Return the tokens of one micro-batch of examples, padding included."""
        rows = [ids for example in examples for ids, _ in list_tokens_and_labels_by_row(example)]
        if self.packing:
            return len(pack_into_one_sequence(rows, share_prefix=self.share_prefix).tokens)
        return len(rows) * max(map(len, rows))

    def make_micro_batches(self, examples: Sequence[Example]) -> list[Batch]:
        """Return the micro-batches of one optimizer step."""
        return [self([examples[i] for i in group]) for group in self.group_rows(examples)]


def _int64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
