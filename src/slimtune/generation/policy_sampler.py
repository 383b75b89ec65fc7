"""Answers that a run learns from, sampled by the model that trains (objectives/policy_run.py)."""

from collections.abc import Sequence
from typing import Any

from ..objectives.sampled_answers import AnswerSampling, SampledAnswer
from .answer_queue import SamplingParams
from .generation_models import make_generation_model
from .training_samples import sample_answers_between_steps


def sample_policy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], how: AnswerSampling
) -> list[list[SampledAnswer]]:
    """Return answers of an adapter, or of the base, to each prompt; see `sample_answers_between_steps`."""
    params = SamplingParams(
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        seed=how.seed,
        logprobs_at_temperature=how.temperature > 0,
    )
    answering = make_generation_model(model, tokenizer, how.adapter_or_base)
    groups = sample_answers_between_steps(model, answering, prompts, params, count=how.count)
    return [
        [
            SampledAnswer(
                [*answer.token_ids],
                [one.logprob for one in answer.logprobs],
                answer.text,
                answer.finish_reason == "stop",
            )
            for answer in group
        ]
        for group in groups
    ]
