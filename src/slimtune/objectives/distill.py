"""Distillation from another base (generalized knowledge distillation, Agarwal et al. 2023, arXiv 2306.13649).

    teacher   another base with the same tokenizer, loaded beside the student's
    student   the recipe's base, with the adapter
    loss      divergence of the student's next-token distribution from the teacher's, over the tokens of the answers

In the share `lmbda` of the steps the answers are the student's own, in the others those of the rows. This is
`GKDTrainer` of TRL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.adapters.config_fields import FieldError, config_field
from ..core.config.schema import Number
from ..errors import UsageError
from .teacher_objective import TeacherObjective

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ..core.config import Recipe
    from ..core.data.collator import Collator
    from ..core.data.rows import Row
    from ..core.training.datasets import RunDatasets
    from ..core.training.prepared_run import PreparedRun


@dataclass
class Distill(TeacherObjective):
    """Distillation from another base; TRL's names and defaults of GKD."""

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "to answer as another base with the same tokenizer does"

    lmbda: Number = config_field(0.5, "share of the steps that learn from the student's own answers", ge=0, le=1)
    temperature: Number = config_field(0.9, "temperature of sampling and of both distributions", ge=0.01)
    teacher_model_name_or_path: str = config_field("", "the teacher: an alias, a GGUF file, a folder or a Hub id")

    def find_missing(self) -> Iterator[FieldError]:
        if not self.teacher_model_name_or_path:
            hint = "--set task.teacher_model_name_or_path=BASE"
            yield self.error("teacher_model_name_or_path", "a base with the same tokenizer", hint)

    def find_conflicts(self) -> Iterator[FieldError]:
        if self.seq_kd:
            yield self.error("seq_kd", "false: a teacher that is another base writes no answers here")

    def list_plan_notes(self) -> Sequence[str]:
        return (
            "The teacher's weights are planned, and its pass as if the teacher had the shape of the base. Sampling "
            "before a step takes time that this plan does not count.",
        )

    def make_teacher_row(self, row: Row) -> Row:
        """Return the row as it is."""
        return row

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        """Return the rows; raise UsageError if the teacher's tokenizer is another one."""
        from ..core.models.loader import load_tokenizer

        teacher, model = self.teacher_model_name_or_path, recipe.model
        theirs = load_tokenizer(teacher, trust_remote_code=model.trust_remote_code).get_vocab()
        own = tokenizer.get_vocab()
        if theirs != own:
            token = next((t for t in sorted(own, key=own.__getitem__) if theirs.get(t) != own[t]), None)
            example = f"{len(theirs)} tokens against {len(own)}"
            if token is not None:
                place = "none" if token not in theirs else f"number {theirs[token]}"
                example = f"token {own[token]} of {model.name}, {token!r}, is {place} there"
            raise UsageError(
                f"{teacher} has another tokenizer than {model.name}: {example}",
                "a teacher with the same tokenizer, so that both give the same tokens a probability",
                "a larger base of the same family; or sft on answers that the teacher wrote",
                field="task.teacher_model_name_or_path",
            )
        return super().prepare_datasets(datasets, recipe, tokenizer)

    def prepare_run(self, prepared: PreparedRun) -> None:
        """Load the teacher, on the student's device and in its dtype."""
        from ..core.models.loader import load_base

        model = prepared.recipe.model
        prepared.logger.say(f"loading the teacher, {self.teacher_model_name_or_path}")
        teacher = load_base(
            self.teacher_model_name_or_path,
            dtype=model.dtype,
            device=prepared.device,
            trust_remote_code=model.trust_remote_code,
        ).model
        vars(self)["_teacher"] = teacher.requires_grad_(False).eval()
        super().prepare_run(prepared)

    def make_teacher_collator(self, collator: Collator) -> Collator:
        """Return a collator whose packing is exact for the teacher."""
        from ..core.training.loss import make_collator

        return make_collator(vars(self)["_teacher"], collator.pad_token_id)

    def using_teacher(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context with the other base."""
        from .teacher_run import using_other_base_as_teacher

        return using_other_base_as_teacher(vars(self)["_teacher"])
