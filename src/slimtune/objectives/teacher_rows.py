"""Rows that a teacher reads with more in the prompt than the student: their tokens, and the batches of both.

    student   prompt + answer                  teacher   its own prompt + the same tokens of the answer

Of a conversation the last answer is learned. An example is the student's row, with the teacher's under
`teacher_input_ids` and `teacher_labels`; a batch has the teacher's batch under `teacher`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.config.schema import DataSettings
from ..core.data.collator import Collator
from ..core.data.example_lengths import MIN_SHARED_TOKENS, DatasetRowComposition, ExampleLength
from ..core.data.rows import Row
from ..core.data.tokenize import tokenize_dataset
from ..core.data.tokenized_dataset import Example, TokenizedDataset
from ..core.foundation.sequences import IGNORE_INDEX, count_common_prefix
from ..core.training.objective import Batch, Objective, open_rows_for_objective

TEACHER_KEYS = {"input_ids": "teacher_input_ids", "labels": "teacher_labels"}
MakeTeacherRow = Callable[[Row], Row]


class PromptAndAnswer(NamedTuple):
    """The tokens of a row: those before its last answer, and those of the answer; [] if it has none."""

    prompt: list[int]
    answer: list[int]


def split_at_last_answer(example: Example) -> PromptAndAnswer:
    """Return the tokens before the last run of learned tokens, and that run."""
    ids, labels = example["input_ids"], example["labels"]
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    if not end:
        return PromptAndAnswer(ids, [])
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return PromptAndAnswer(ids[:start], ids[start:end])


def make_teacher_example(
    prompt: Sequence[int], teacher_prompt: Sequence[int], answer: Sequence[int], line: int
) -> Example:
    """Return an answer after the student's and after the teacher's prompt.

    Without a prompt the first token is not learned, because nothing stands before it to predict it from.
    """
    labels = [*answer] if prompt and teacher_prompt else [IGNORE_INDEX, *answer[1:]]

    def make(before: Sequence[int]) -> dict[str, list[int]]:
        return {"input_ids": [*before, *answer], "labels": [IGNORE_INDEX] * len(before) + labels}

    return {**make(prompt), "line": line, **{TEACHER_KEYS[k]: v for k, v in make(teacher_prompt).items()}}


def tokenize_teacher_rows(
    rows: TokenizedDataset,
    path: Path,
    data: DataSettings,
    objective: Objective,
    tokenizer: Any,
    make_teacher_row: MakeTeacherRow,
) -> TokenizedDataset:
    """Return rows of a file as the teacher reads them, tokenized, in the order of `rows`, by their lines.

    Raises:
        DataError: the chat template refuses a row as the teacher reads it.
    """
    lines = rows.lines
    wanted = set(lines)

    def iterate() -> Iterator[Row]:
        for row in open_rows_for_objective(path, data, objective).require_valid_rows():
            if row.line in wanted:
                yield make_teacher_row(row)

    found, _ = tokenize_dataset(iterate(), tokenizer, max_seq_len=1 << 30, train_on=data.train_on, source_path=path)
    places = {line: place for place, line in enumerate(found.lines)}
    return found.select(np.array([places[line] for line in lines], np.int64))


class TeacherRows(TokenizedDataset):
    """Rows with the teacher's prompt of each.

    Args:
        rows: as the student reads them.
        teacher_rows: as the teacher reads them.
        answers: what takes the place of the rows' answers; None: the rows' own.
        longest_answer: tokens that an answer has which is sampled later; None: the answers are there.
    """

    def __init__(
        self,
        rows: TokenizedDataset,
        teacher_rows: TokenizedDataset,
        answers: Sequence[Sequence[int]] | None = None,
        longest_answer: int | None = None,
    ) -> None:
        vars(self).update(vars(rows))  # the same table
        self.teacher_rows, self.answers, self.longest_answer = teacher_rows, answers, longest_answer

    @property
    def lengths(self) -> np.ndarray:
        return self._measure(super().lengths, super().read)

    @property
    def teacher_lengths(self) -> np.ndarray:
        """Number of tokens of each example as the teacher reads it, int64 [N]."""
        return self._measure(self.teacher_rows.lengths, self.teacher_rows.read)

    @property
    def have_answers(self) -> bool:
        """Whether the rows have answers of their own."""
        return bool(split_at_last_answer(super().read(0)).answer)

    @property
    def example_lengths(self) -> list[ExampleLength]:
        """Number of tokens of each example, (prompt, answer): the answer's alone are learned."""
        prompts = [len(split_at_last_answer(super(TeacherRows, self).read(i)).prompt) for i in range(len(self))]
        return [(n, int(length) - n) for n, length in zip(prompts, self.lengths, strict=True)]

    @property
    def content(self) -> DatasetRowComposition:
        """What the rows are made of, with the tokens that the teacher's prompts have more."""
        more = self.teacher_lengths - self.lengths
        prompts = [self.teacher_rows.read(i)["input_ids"] for i in range(0, len(self), -(-len(self) // 32) or 1)]
        shared = min((count_common_prefix(prompts[0], ids) for ids in prompts), default=0)
        found = super().content._replace(
            teacher_prefix_tokens=shared if shared >= MIN_SHARED_TOKENS else 0,
            teacher_row_tokens=int(more.max(initial=0)),
        )
        if self.longest_answer is None or not len(self):
            return found
        return found._replace(supervised_share=self.longest_answer / float(self.lengths.mean()), samples_answers=True)

    def select(self, indices: Any) -> "TeacherRows":
        answers = None if self.answers is None else [self.answers[i] for i in indices]
        return TeacherRows(super().select(indices), self.teacher_rows.select(indices), answers, self.longest_answer)

    def read(self, number: int, start: int = 0, end: int | None = None) -> Example:
        """Return an example with the teacher's tokens, or the student's tokens from `start` to `end`."""
        own, teacher = super().read(number, start, end), self.teacher_rows.read(number)
        if (start, end) != (0, None):
            return own
        prompt, answer = split_at_last_answer(own)
        found = answer if self.answers is None else self.answers[number]
        return make_teacher_example(prompt, split_at_last_answer(teacher).prompt, found, own["line"])

    def with_answers(self, answers: Sequence[Sequence[int]]) -> "TeacherRows":
        """Return the rows with these answers in place of their own."""
        return TeacherRows(self, self.teacher_rows, answers)

    def _measure(self, whole: np.ndarray, read: Callable[[int], Example]) -> np.ndarray:
        """Return the lengths of rows whose answers may be others than their own."""
        if self.answers is None and self.longest_answer is None:
            return whole
        answers = self.answers or [[0] * (self.longest_answer or 0)] * len(whole)
        prompts = [len(split_at_last_answer(read(i)).prompt) for i in range(len(whole))]
        return np.array([n + len(answer) for n, answer in zip(prompts, answers, strict=True)], np.int64)


class TeacherCollator(Collator):
    """Makes micro-batches of examples, each with the batch that the teacher reads under `teacher`.

    Args:
        collator: of the student's rows.
        teacher_collator: of the teacher's; None: the same one.
    """

    def __init__(self, collator: Collator, teacher_collator: Collator | None = None) -> None:
        vars(self).update(vars(collator))
        self.teacher_collator = teacher_collator or collator

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return a micro-batch; rows without a teacher's tokens make an ordinary one."""
        if "teacher_input_ids" not in examples[0]:
            return super().__call__(examples)
        taught = [{k: e[name] for k, name in TEACHER_KEYS.items()} | {"line": e["line"]} for e in examples]
        return super().__call__(examples) | {"teacher": self.teacher_collator(taught)}
