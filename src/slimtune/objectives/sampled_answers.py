"""Sampled answers, and what rewards get of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.training.objective import Example
from ..extras.rewards.reward_workers import AnswersToScore

PROMPTS_AT_ONCE = 32
"""Prompts whose answers are sampled together, outside of the steps of training."""


@dataclass(frozen=True)
class AnswerSampling:
    """How answers are sampled."""

    adapter_or_base: str  # the adapter's name, or BASE_ROW
    count: int  # answers to each prompt
    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class SampledAnswer:
    """An answer as it was sampled."""

    token_ids: list[int]  # the one that ends it included
    logps: list[float]  # of each token, at the temperature of sampling
    text: str  # without what ends it
    is_complete: bool  # it ended by itself; False: it was as long as it may be


def make_answers_to_score(
    prompts: Sequence[Example], sampled: Sequence[Sequence[SampledAnswer]], file: str
) -> AnswersToScore:
    """Return the answers to prompts as rewards get them, the answers to one prompt one after another."""
    records = [json.loads(e["record"]) for e, answers in zip(prompts, sampled, strict=True) for _ in answers]
    names = dict.fromkeys(name for record in records for name in record if name != "prompt")
    return AnswersToScore(
        prompts=[record["prompt"] for record in records],
        completions=[answer.text for answers in sampled for answer in answers],
        columns={name: [record.get(name) for record in records] for name in names},
        lines=[e["line"] for e, answers in zip(prompts, sampled, strict=True) for _ in answers],
        file=file,
    )
