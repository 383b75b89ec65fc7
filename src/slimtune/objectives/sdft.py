"""Self-distillation fine-tuning (Shenfeld et al. 2026, arXiv 2601.19897): learn rows from oneself, and forget less.

    teacher   the base, without the adapter, with the row's answer in its prompt as an example
    student   the same base, with the adapter, with the row's prompt alone
    loss      mean over answers of the mean over their tokens of the divergence from the teacher

The student's own answers are learned (`lmbda` 1), so that what it does not change by itself stays as it is; in the
other steps the teacher's, sampled once. This is `SDFTTrainer` of TRL with full logits and the base as teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.adapters.config_fields import FieldError, config_field
from ..core.config.schema import Number
from ..core.training.objective import Batch, sum_targets_by_row
from .teacher_objective import TeacherObjective

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.data.rows import Row

PLACES = ("{prompt}", "{privileged_context}")


@dataclass
class SDFT(TeacherObjective):
    """Self-distillation from rows with answers; TRL's names."""

    name: ClassVar[str] = "sdft"
    summary: ClassVar[str] = "answers, from a teacher that has them in its prompt (self-distillation)"

    lmbda: Number = config_field(1.0, "share of the steps that learn from the student's own answers", ge=0, le=1)
    seq_kd: bool = config_field(True, "the other steps learn the teacher's answers, sampled once; false: the rows'")
    teacher_prompt_template: str = config_field(
        "{prompt}\n\nThis is an example of a good answer:\n{privileged_context}\n\nNow answer in the same way.",
        "what the teacher reads in place of the last prompt; {privileged_context} is the row's answer",
    )

    def find_conflicts(self) -> Iterator[FieldError]:
        if missing := [place for place in PLACES if place not in self.teacher_prompt_template]:
            yield self.error("teacher_prompt_template", f"a text with {' and '.join(missing)} in it")

    def make_teacher_row(self, row: Row) -> Row:
        """Return a row whose last prompt has its answer as an example."""
        if not row.messages:
            return replace(row, prompt=self._fill(row.prompt or "", row.completion or ""))
        messages = [dict(m) for m in row.messages]
        learned = row.learned or tuple(m["role"] == "assistant" for m in messages)
        last = max((i for i, counts in enumerate(learned) if counts), default=len(messages) - 1)
        asked = [i for i in range(last) if messages[i]["role"] == "user"]
        answer = str(messages[last].get("content") or "")
        if asked:
            messages[asked[-1]]["content"] = self._fill(messages[asked[-1]]["content"], answer)
        return replace(row, messages=messages)

    def _fill(self, prompt: str, answer: str) -> str:
        before, after = self.teacher_prompt_template.split(PLACES[0], 1)
        return before.replace(PLACES[1], answer) + prompt + after.replace(PLACES[1], answer)

    def count_items(self, examples: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of answers."""
        return len(examples)

    def loss(self, values: Tensor, batch: Batch, num_items: Any) -> Tensor:
        """Return the summed means over the tokens of each answer, divided by the step's answers."""
        return (sum_targets_by_row(values, batch) / values.new_tensor(batch["row_targets"])).sum() / num_items
