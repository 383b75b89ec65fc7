"""Rows beside mismatched ones, on which KTO estimates how far the model is from its reference.

    rows of a step       x1 y1   x2 y2   x3 y3        x: prompt, y: everything from the first learned token on
    mismatched rows      x1 y3   x2 y1   x3 y2

A step has the same rows in every epoch, so that log p of its mismatched rows under the reference is computed once, and
the answers of the step's mismatched rows are those that the step learns (as in TRL). Rows are assigned to steps at
random; epochs have the steps in another order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .tokenized_dataset import IGNORE_INDEX, Example, TokenizedDataset

_MAX_PLACES = 16


class MismatchedRows(TokenizedDataset):
    """Rows in the order of their steps; each example is a row and its prompt with the answer of another row.

    The answers of a step are rotated by one place, or by as many as leave the fewest rows with an answer to their own
    prompt. If a step has one row, the answers of all rows are rotated together.

    Args:
        rows: tokenized examples of one row each.
        rows_per_step: rows of an optimizer step.
        max_seq_len: most tokens of a mismatched row; a longer one is truncated.
        seed: of the division into steps.
    """

    def __init__(self, rows: TokenizedDataset, rows_per_step: int, max_seq_len: int, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(rows))
        super().__init__(rows._table, rows._indices[order], {k: v[order] for k, v in rows._columns.items()})
        self.rows_per_step, self.max_seq_len = rows_per_step, max_seq_len
        # Of an example no more than the prompt is kept: a hash of integers is the same in every process.
        examples = map(super().read, range(len(self)))
        prompts = np.array([hash(tuple(e["input_ids"][: _prompt_length(e)])) for e in examples])
        size = rows_per_step if rows_per_step > 1 else max(len(rows), 1)
        self._partners = np.arange(len(rows))
        for start in range(0, len(rows), size):
            block = np.arange(start, min(start + size, len(rows)))
            rotated = [np.roll(block, places) for places in range(1, min(len(block), _MAX_PLACES + 1))]
            if rotated:
                same = [(prompts[block] == prompts[other]).sum() for other in rotated]
                self._partners[block] = rotated[int(np.argmin(same))]
            elif start:  # the only row of the last step
                self._partners[block] = start - 1

    def shuffle(self, permute: Callable[[int], Any]) -> list[int]:
        """Return the order of the examples in an epoch: whole steps are permuted; a smaller one is the last."""
        whole, size = len(self) // self.rows_per_step, self.rows_per_step
        steps = (range(step * size, (step + 1) * size) for step in permute(whole).tolist())
        return [*(i for step in steps for i in step), *range(whole * size, len(self))]

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        """Return the row and its mismatched row as one example."""
        own, other = super().read(number), super().read(int(self._partners[number]))
        answer = slice(_prompt_length(other), None)
        prompt = own["input_ids"][: _prompt_length(own)]
        ids = [*prompt, *other["input_ids"][answer]][: self.max_seq_len]
        labels = [*[IGNORE_INDEX] * len(prompt), *other["labels"][answer]][: self.max_seq_len]
        return own | {
            "input_ids": own["input_ids"] + ids,
            "labels": own["labels"] + labels,
            "row_lengths": [len(own["input_ids"]), len(ids)],
        }


def _prompt_length(example: Example) -> int:
    """Return the number of tokens before the first learned one; nothing predicts the first token of all."""
    return next(t for t, label in enumerate(example["labels"]) if t > 0 and label != IGNORE_INDEX)
