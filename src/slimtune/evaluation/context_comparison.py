"""Context distillation: what the base gains by the context in its prompt, and how much of it the adapter keeps without.

    gain    loss of the base − loss of the base with the context
    kept    (loss of the base − loss of the tuned model) / gain              both without the context

The losses are those of the rows' answers; where rows have none, of answers that the base samples with the context.
"""

import copy
import statistics
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np

from ..core.adapters.active_adapters import BASE_ROW
from ..core.foundation.progress_bars import using_progress_prefix
from ..generation.model_runner import GenerationRow, MultiAdapterRunner
from ..generation.policy_sampler import sample_policy_answers
from ..objectives.context import Context
from ..objectives.sampled_answers import PROMPTS_AT_ONCE, AnswerSampling
from ..objectives.teacher_rows import TEACHER_KEYS, TeacherRows, split_at_last_answer
from .eval_result import ContextMeasures, SFTMeasures
from .model_comparison import RowFigures
from .row_scores import score_supervised_rows
from .sft_comparison import SupervisedLossEvaluator
from .statistics import bootstrap_share

TIMED_PROMPTS = 9
"""Prompts that are read once more, to time it."""


class ContextEvaluator(SupervisedLossEvaluator):
    """Compares base and tuned model without the context, and the base with it."""

    def measure(self) -> tuple[SFTMeasures, RowFigures]:
        objective: Any = self.objective
        rows: Any = self.examples
        assert isinstance(objective, Context)
        assert isinstance(rows, TeacherRows)
        samples = objective.seq_kd or not rows.have_answers
        if samples:
            rows = rows.with_answers(self._sample_answers(objective, rows))
        same = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = SupervisedLossEvaluator(**{**same, "examples": rows})
        measures, figures = plain.measure()
        taught = [{k: e[name] for k, name in TEACHER_KEYS.items()} | {"line": e["line"]} for e in rows]
        collator = copy.copy(self.collator)
        if collator.max_tokens is not None:  # all rows begin with the context, which is stored once
            collator.max_tokens += int(rows.teacher_lengths.max())
        with self.model.disable_adapter(), using_progress_prefix("base with the context"):
            scores = score_supervised_rows(self.model, taught, collator)
        for figure, score in zip(figures, scores, strict=True):
            figure["with_context"] = score.nats
        nats = {name: np.array([f[name] for f in figures]) for name in ("base", "tuned", "with_context", "tokens")}
        found = self.compare(nats["base"], nats["with_context"], nats["tokens"])
        gained, kept = (
            np.bincount(self.groups, nats["base"] - nats[who]).tolist() for who in ("with_context", "tuned")
        )
        draws = {"draws": self.draws, "seed": self.seed}
        seconds = self._time_prefills(rows)
        context = ContextMeasures(
            loss=found.second,
            gain=found.difference,
            kept=bootstrap_share(kept, gained, **draws) if sum(gained) > 0 else None,
            tokens_saved=float((rows.teacher_lengths - rows.lengths).mean()),
            prefill_seconds=seconds[0],
            prefill_seconds_with_context=seconds[1],
            sampled_answers=samples,
        )
        return replace(measures, context=context), figures

    def _time_prefills(self, rows: TeacherRows) -> tuple[float, float]:
        """Return the median seconds of reading prompts, the tuned model without the context and the base with it."""
        runner, (adapter, *_) = MultiAdapterRunner(self.model), self.model.active_adapters
        parts = ((adapter, rows), (BASE_ROW, rows.teacher_rows))
        prompts = [
            [(name, split_at_last_answer(part.read(i)).prompt) for name, part in parts]
            for i in range(min(TIMED_PROMPTS, len(rows)))
        ]
        runs: list[list[float]] = [[], []]
        for pair in (prompts[0], *prompts):  # the first one warms up
            for which, (name, ids) in enumerate(pair):
                start = time.perf_counter()
                float(runner.prefill(GenerationRow(name), ids or [0])[0][0, 0])
                runs[which].append(time.perf_counter() - start)
        without, with_context = (statistics.median(found[1:]) for found in runs)
        return without, with_context

    def _sample_answers(self, objective: Context, rows: TeacherRows) -> list[list[int]]:
        """Return an answer of the base with the context to each prompt."""
        found: list[list[int]] = []
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            numbers = range(start, min(start + PROMPTS_AT_ONCE, len(rows)))
            sampled = sample_policy_answers(
                self.model,
                self.tokenizer,
                [split_at_last_answer(rows.teacher_rows.read(i)).prompt for i in numbers],
                AnswerSampling(
                    BASE_ROW,
                    count=1,
                    temperature=float(objective.temperature),
                    max_new_tokens=objective.max_completion_length,
                    seed=(self.seed << 32) + start,
                ),
            )
            found += [group[0].token_ids for group in sampled]
        return found

    @staticmethod
    def list_warnings(measures: SFTMeasures) -> list[str]:
        context = measures.context
        if context is not None and context.gain.low <= 0:
            return ["the context is not shown to help the base on these rows, so the share that is kept says little"]
        return []
