"""What objectives that learn from a teacher have in common: the teacher's rows, whose answers are learned, the loss.

    a step    answers ─▶ the teacher's pass, without gradient ─▶ the student's pass ─▶ divergence of each token

The names of the settings are those of TRL's `GKDTrainer`. The answers are those of the rows, the teacher's own, which
are sampled once (`seq_kd`), or the student's, sampled in each step (`lmbda`); they follow from the run's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.adapters.config_fields import config_field
from ..core.config.schema import Number
from ..core.training.objective import Batch, Example, ScoreRows
from ..errors import DataError, UsageError
from .token_objective import TokenObjective

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ..core.config import Recipe
    from ..core.data.collator import Collator
    from ..core.data.rows import Row
    from ..core.data.tokenized_dataset import TokenizedDataset
    from ..core.models.lm_head import LMHead
    from ..core.training.datasets import RunDatasets
    from ..core.training.prepared_run import PreparedRun
    from .teacher_rows import TeacherRows
    from .teacher_run import TeacherRun


BETA_HELP = "divergence: 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence"


def require_head(head: LMHead | None) -> LMHead:
    """Return a base's head; raise UsageError if it has none that is known."""
    if head is None:
        raise UsageError("the base has no head of its own, which a teacher's distribution needs", "another base")
    return head


@dataclass
class TeacherObjective(TokenObjective):
    """An objective whose teacher reads more than the student, or is another model; a subclass says which."""

    formats: ClassVar[tuple[str, ...]] = ("chat", "instruction", "sharegpt", "prompt-completion")

    lmbda: Number = config_field(0.0, "share of the steps that learn from the student's own answers", ge=0, le=1)
    beta: Number = config_field(0.5, BETA_HELP, ge=0, le=1)
    temperature: Number = config_field(1.0, "temperature of sampling and of both distributions", ge=0.01)
    seq_kd: bool = config_field(False, "learn the teacher's own answers, sampled once, in place of the rows'")
    max_completion_length: int = config_field(256, "longest sampled answer, in tokens", ge=1, le=10**6)

    @property
    def computes_teacher_here(self) -> bool:
        """Whether the teacher's pass is part of a step; False: what it says is read from files."""
        return True

    @property
    def run(self) -> TeacherRun | None:
        """What samples answers, once a run is prepared."""
        found: TeacherRun | None = vars(self).get("_run")
        return found

    def make_teacher_row(self, row: Row) -> Row:
        """Return a row as the teacher reads it."""
        raise NotImplementedError

    def make_teacher_collator(self, collator: Collator) -> Collator:
        """Return what makes the teacher's batches: the student's collator, unless overridden."""
        return collator

    def using_teacher(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context with the model that teaches: this one without its adapter."""
        from .teacher_run import using_base_as_teacher

        return using_base_as_teacher(model)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def prepare_datasets(self, datasets: RunDatasets, recipe: Recipe, tokenizer: Any) -> RunDatasets:
        """Return the rows with what the teacher reads in their place.

        Raises:
            DataError: the teacher's row has more tokens than the base has positions, or an answer has no room.
        """
        data = recipe.data

        def prepare(rows: TokenizedDataset, path: Path) -> TokenizedDataset:
            return self.add_teacher_rows(rows, path, recipe, tokenizer) if len(rows) else rows

        return replace(
            datasets,
            train=prepare(datasets.train, data.train),
            validation=prepare(datasets.validation, data.validation or data.train),
            test=prepare(datasets.test, data.train),
        )

    def add_teacher_rows(self, rows: TokenizedDataset, path: Path, recipe: Recipe, tokenizer: Any) -> TeacherRows:
        """Return rows of a file with what the teacher reads; errors as for `prepare_datasets`."""
        from ..core.models.base_config import get_max_positions, load_base_config
        from .teacher_rows import TeacherRows, split_at_last_answer, tokenize_teacher_rows

        model, limit = recipe.model, recipe.data.max_seq_len
        taught = tokenize_teacher_rows(rows, path, recipe.data, self, tokenizer, self.make_teacher_row)
        samples = self.seq_kd or self.lmbda > 0 or not split_at_last_answer(rows.read(0)).answer
        found = TeacherRows(rows, taught, longest_answer=self.max_completion_length if samples else None)
        answer = f", with an answer of {self.max_completion_length}" if samples else ""
        if (longest := int(found.lengths.max())) > limit:
            raise DataError(
                f"{path}: the longest row has {longest} tokens{answer}",
                f"prompt and answer of at most max_seq_len = {limit} tokens together",
                f"--max-seq-len {longest}, a smaller task.max_completion_length, or shorter prompts",
            )
        info = load_base_config(model.name, trust_remote_code=model.trust_remote_code, revision=model.revision)
        positions, longest = get_max_positions(info.config), int(found.teacher_lengths.max())
        if positions is not None and longest > positions:
            more = longest - int(found.lengths[int(found.teacher_lengths.argmax())])
            raise DataError(
                f"{path}: the longest row has {longest} tokens as the teacher reads it, {more} more than the student"
                f"{answer}",
                f"at most the {positions} positions of {model.name}",
                "a shorter context, shorter rows, or a base with more positions",
            )
        return found

    def prepare_run(self, prepared: PreparedRun) -> None:
        """Let batches have the teacher's rows, and sample its answers where they are learned."""
        from .teacher_rows import TeacherCollator
        from .teacher_run import TeacherRun, require_frozen_head

        require_frozen_head(prepared.model)
        prepared.collator = TeacherCollator(prepared.collator, self.make_teacher_collator(prepared.collator))
        run = vars(self)["_run"] = TeacherRun(self, prepared)
        run.sample_teacher_answers()

    # --- steps --------------------------------------------------------------------------------------------------------

    def prepare_step(self, examples: Sequence[Example], score_rows: ScoreRows) -> Sequence[Example]:
        """Return the examples of a step, in the share `lmbda` of the steps with the student's answers."""
        return examples if self.run is None or "is_probe" in examples[0] else self.run.choose_answers(examples)

    def make_longest_examples(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples of a step as long as they may become, to measure the memory of learning."""
        from .teacher_rows import make_teacher_example, split_at_last_answer

        found = []
        for e in examples:
            prompt, answer = split_at_last_answer(e)
            missing = self.max_completion_length - len(answer) if self.lmbda or not answer else 0
            taught = e["teacher_input_ids"][: len(e["teacher_input_ids"]) - len(answer)]
            answer = answer + [prompt[-1]] * missing
            found.append(make_teacher_example(prompt, taught, answer, e["line"]) | {"is_probe": True})
        return found

    # --- values -------------------------------------------------------------------------------------------------------

    def compute_values(self, model: Any, batch: Batch) -> Tensor:
        """Return the divergence of each learned token [K] from the teacher's distribution, in nats.

        Rows without a teacher have −log p of each token.
        """
        if "teacher" not in batch:
            return super().compute_values(model, batch)
        from ..core.training.loss import get_head_and_supervised_hidden_states, move_batch_to_device
        from .teacher_divergence import compute_token_divergences

        taught = move_batch_to_device(batch["teacher"], batch["targets"].device)
        with self.using_teacher(model) as teacher:
            teacher_head, teacher_states = get_head_and_supervised_hidden_states(teacher, taught)
        if "layout" in taught:
            taught["layout"].clear_cache()
        head, states = get_head_and_supervised_hidden_states(model, batch)
        heads = [
            replace(h, scale=h.scale / self.temperature, cap=h.cap and h.cap / self.temperature)
            for h in map(require_head, (head, teacher_head))
        ]
        return compute_token_divergences(states, heads[0], teacher_states, heads[1], float(self.beta))
