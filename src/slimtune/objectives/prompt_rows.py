"""Prompts as a data set: they are as long as prompt and longest answer, because plans and limits count those."""

from typing import Any

import numpy as np

from ..core.data.example_lengths import DatasetRowComposition, ExampleLength
from ..core.data.tokenized_dataset import Example, TokenizedDataset


class PromptRows(TokenizedDataset):
    """Tokenized prompts whose answers are sampled later.

    Args:
        rows: the prompts; the only class of each is its record as JSON.
        answers_per_prompt: answers to each prompt.
        max_completion_length: tokens of the longest answer.
    """

    def __init__(self, rows: TokenizedDataset, answers_per_prompt: int, max_completion_length: int) -> None:
        vars(self).update(vars(rows))  # the same table
        self.answers_per_prompt, self.max_completion_length = answers_per_prompt, max_completion_length

    @property
    def lengths(self) -> np.ndarray:
        return super().lengths + self.max_completion_length

    @property
    def example_lengths(self) -> list[ExampleLength]:
        answers = [self.max_completion_length] * self.answers_per_prompt
        return [(n - self.max_completion_length, *answers) for n in self.lengths.tolist()]

    @property
    def content(self) -> DatasetRowComposition:
        prompts = float(self.lengths.mean()) - self.max_completion_length if len(self) else 0.0
        learned = self.answers_per_prompt * self.max_completion_length
        return DatasetRowComposition(
            super().content.shared_prefix_tokens, learned / (prompts * self.answers_per_prompt + learned)
        )

    def select(self, indices: Any) -> "PromptRows":
        return PromptRows(super().select(indices), self.answers_per_prompt, self.max_completion_length)

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        """Return a prompt with its record, as JSON, under `record`."""
        (record,) = self.table["classes"][self.indices[number]].as_py()
        return super().read(number, start, end) | {"record": record}
