"""A run that learns from a teacher: the teacher's pass, and answers that the teacher or the student samples.

The teacher's answers are sampled once, before the first step, and kept in the run folder: teacher_answers.jsonl, whose
first line says of which rows and settings they are, and each further one has the part of the rows, the number of the
row, and the tokens of its answer. A run that was killed while they are sampled goes on with those that are missing.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..core.adapters.active_adapters import BASE_ROW
from ..core.attention.attention_functions import using_packed_attention
from ..core.foundation import distributed
from ..core.foundation.files import to_json, translate_os_errors
from ..core.models.lm_head import get_lm_head_with_scale_and_cap
from ..core.training.objective import Example
from ..core.training.prepared_run import PreparedRun
from ..errors import RunError, UsageError
from ..extras.row_digest import hash_rows
from .policy_run import POLICY_SAMPLERS, mix_seed
from .sampled_answers import PROMPTS_AT_ONCE, AnswerSampling
from .teacher_rows import TeacherRows, make_teacher_example, split_at_last_answer

if TYPE_CHECKING:
    from .teacher_objective import TeacherObjective

ANSWERS_FILE = "teacher_answers.jsonl"
Tokens = list[int]


@contextmanager
def using_base_as_teacher(model: Any) -> Iterator[Any]:
    """Yield the model without its adapter, in evaluation mode and without gradients inside the `with`."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter(), torch.no_grad():
            yield model
    finally:
        model.train(was_training)


@contextmanager
def using_other_base_as_teacher(teacher: Any) -> Iterator[Any]:
    """Yield another base, in evaluation mode, without gradients and with packed attention inside the `with`."""
    with torch.no_grad(), using_packed_attention(teacher):
        yield teacher


def require_frozen_head(model: Any) -> None:
    """Raise UsageError unless the model has a head that does not train."""
    head = get_lm_head_with_scale_and_cap(model)
    if head is None or any(p.requires_grad for p in head.module.parameters()):
        raise UsageError(
            "the method trains the head, and the divergence from a teacher is computed with a frozen one",
            "a method that leaves the head as it is",
            "--method lora, without the head among its targets",
            code="trained-head",
        )


class TeacherRun:
    """Samples the answers that a run learns: those of the teacher once, those of the student in a step.

    Args:
        objective: its settings.
        prepared: the run.
    """

    def __init__(self, objective: "TeacherObjective", prepared: PreparedRun) -> None:
        self.objective, self.prepared = objective, prepared
        self._chosen: tuple[object, list[Example]] = (None, [])  # the last step with its lines, and its examples

    # --- the teacher's answers ----------------------------------------------------------------------------------------

    def sample_teacher_answers(self) -> None:
        """Put the teacher's answers into the rows that learn them, from the run folder as far as they are there."""
        data, objective = self.prepared.data, self.objective
        parts = {"train": data.train, "validation": data.validation}
        wanted = {
            name: rows
            for name, rows in parts.items()
            if isinstance(rows, TeacherRows)
            and (objective.seq_kd or not rows.have_answers)
            and (name == "validation" or objective.lmbda < 1)
        }
        answers = self._load_or_sample({n: r for n, r in parts.items() if isinstance(r, TeacherRows)}, wanted)
        for name, rows in wanted.items():
            setattr(data, name, rows.with_answers(answers[name]))

    def _load_or_sample(self, parts: dict[str, TeacherRows], wanted: dict[str, TeacherRows]) -> dict[str, list[Tokens]]:
        """Return the answers to the `wanted` parts; raise RunError if the rows are not those of the file."""
        file = self.prepared.run.path / ANSWERS_FILE
        header = {
            "rows": {name: [hash_rows(rows), hash_rows(rows.teacher_rows)] for name, rows in parts.items()},
            "temperature": float(self.objective.temperature),
            "max_completion_length": self.objective.max_completion_length,
            "seed": self.prepared.settings.seed,
        }
        found: dict[str, dict[int, Tokens]] = {name: {} for name in wanted}
        with translate_os_errors(file):
            lines = file.read_text().split("\n") if file.is_file() else [""]
        whole = lines[:-1]  # the last one is empty, or was cut by a kill
        if whole and json.loads(whole[0]) != header:
            raise RunError(
                f"{file} has the answers to other prompts: the rows or what the teacher reads has changed since",
                "the rows and the context that the run was started with",
                "put the old ones back, or start again with another --out",
            )
        for line in whole[1:]:
            kept = json.loads(line)
            found[kept["part"]][kept["number"]] = kept["token_ids"]
        if distributed.is_main_process():
            with translate_os_errors(file):
                file.write_text("".join(f"{line}\n" for line in whole or [to_json(header, indent=None)]))
        for name, rows in wanted.items():
            self._sample_missing(name, rows, found[name])
        return {name: [found[name][i] for i in range(len(rows))] for name, rows in wanted.items()}

    def _sample_missing(self, part: str, rows: TeacherRows, found: dict[int, Tokens]) -> None:
        if len(found) == len(rows):
            return
        say, file = self.prepared.logger.say, self.prepared.run.path / ANSWERS_FILE
        say(f"the teacher answers the {len(rows)} {part} prompts, once")
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            numbers = range(start, min(start + PROMPTS_AT_ONCE, len(rows)))
            if all(i in found for i in numbers):
                continue
            prompts = [split_at_last_answer(rows.teacher_rows.read(i)).prompt for i in numbers]
            answers = self.sample(prompts, BASE_ROW, f"{part} {start}")
            found |= zip(numbers, answers, strict=True)
            if distributed.is_main_process():
                with translate_os_errors(file), file.open("a") as out:
                    for i in numbers:
                        out.write(to_json({"part": part, "number": i, "token_ids": found[i]}, indent=None) + "\n")
            say(f"{numbers[-1] + 1} of {len(rows)} {part} prompts are answered")

    # --- the student's answers ----------------------------------------------------------------------------------------

    def choose_answers(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples of a step, with the student's answers if the step is one of those that sample.

        A step that is repeated, because a gradient overflowed, has the same answers.
        """
        step, seed = self.prepared.state.step + 1, self.prepared.settings.seed
        if mix_seed(seed, f"on-policy {step}") / 2**62 >= self.objective.lmbda:
            return list(examples)
        key = (step, [e["line"] for e in examples])
        if self._chosen[0] != key:
            self._chosen = (key, self._answer_as_student(examples, f"step {step}"))
        return self._chosen[1]

    def _answer_as_student(self, examples: Sequence[Example], what: str) -> list[Example]:
        split = [split_at_last_answer(e) for e in examples]
        answers = self.sample([row.prompt for row in split], "default", what)
        return [
            make_teacher_example(row.prompt, _cut(e["teacher_input_ids"], len(row.answer)), answer, e["line"])
            for e, row, answer in zip(examples, split, answers, strict=True)
        ]

    def sample(self, prompts: Sequence[Tokens], adapter_or_base: str, what: str) -> list[Tokens]:
        """Return the tokens of one answer to each prompt; each process samples a part of them."""
        world, rank = distributed.world_size(), distributed.rank()
        own = prompts[rank::world]
        how = AnswerSampling(
            adapter_or_base,
            count=1,
            temperature=float(self.objective.temperature),
            max_new_tokens=self.objective.max_completion_length,
            seed=mix_seed(self.prepared.settings.seed, what) + (rank << 20),
        )
        sample = POLICY_SAMPLERS.load("model")
        sampled = sample(self.prepared.model, self.prepared.base.tokenizer, own, how) if own else []
        answers = [group[0].token_ids for group in sampled]
        if world == 1:
            return answers
        parts = distributed.all_gather_object(answers)
        return [parts[number % world][number // world] for number in range(len(prompts))]


def _cut(ids: Tokens, count: int) -> Tokens:
    return ids[: len(ids) - count]
