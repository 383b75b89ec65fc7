"""What a planned step has of a teacher: the rows as it reads them, or what it said of their tokens before the run."""

from collections.abc import Sequence

import numpy as np

from ..core.data.collator import IGNORE_INDEX, Collator, Example
from ..core.data.tokenized_dataset import list_tokens_and_labels_by_row
from ..core.training.loss import count_supervised_targets
from ..objectives.distill import Distill
from ..objectives.teacher_logps import TOP_KEYS, ScoredTeacherCollator
from ..objectives.teacher_objective import TeacherObjective
from ..objectives.teacher_rows import TEACHER_KEYS, TeacherCollator, make_teacher_example
from .plan_request import TeacherWorkload


def make_teacher_objective_and_collator(
    teacher: TeacherWorkload, collator: Collator
) -> tuple[TeacherObjective, Collator]:
    """Return the objective of a step with a teacher, and what makes its micro-batches."""
    if teacher.top_k is None:
        return TeacherObjective(beta=teacher.beta), TeacherCollator(collator)
    objective = Distill(teacher_model_server_url="http://elsewhere", loss_top_k=teacher.top_k)
    return objective, ScoredTeacherCollator(collator)


def add_dummy_teacher_rows(examples: Sequence[Example], teacher: TeacherWorkload) -> list[Example]:
    """Return the rows of examples, each an example of its own, with what a teacher reads in their place, or said."""
    found = []
    for number, (ids, labels) in enumerate(row for e in examples for row in list_tokens_and_labels_by_row(e)):
        start = next(t for t, label in enumerate(labels) if label != IGNORE_INDEX)
        length = start + teacher.row_tokens
        shared = min(length, teacher.prefix_tokens)
        prompt = [0] * shared + [-number - 1] * (length - shared)
        example = make_teacher_example(ids[:start], prompt, ids[start:], number)
        if teacher.top_k is not None:
            logps = np.zeros((count_supervised_targets(example), teacher.top_k), np.float32)
            example = {k: v for k, v in example.items() if k not in TEACHER_KEYS.values()}
            example |= dict(zip(TOP_KEYS, (logps.astype(np.int32), logps), strict=True))
        found.append(example)
    return found
