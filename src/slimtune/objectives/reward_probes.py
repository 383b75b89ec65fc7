"""Answers without any worth, to see whether a reward can be pleased by them: reward hacking starts there.

    empty      nothing
    longest    one word again and again, as often as an answer has room for
    repeated   the model's own answer, three times
    echo       the prompt
    format     the model's own answer without its words and numbers: tags, brackets and punctuation alone

A reward that gives one of them more than the model's own answers get teaches it, and nothing else.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.training.objective import Example
from ..errors import RunError
from ..extras.rewards.reward_workers import RewardWorkers
from .sampled_answers import SampledAnswer, make_answers_to_score

if TYPE_CHECKING:
    from .policy_objective import PolicyObjective

LONGEST_WORD = "the"
_TAGS_OR_WORD = re.compile(r"(<[^<>]*>)|\w+")


class AnswerToReplace(NamedTuple):
    """What a probe knows: the prompt, as the row has it, the model's answer, and how long an answer may be."""

    prompt: Any
    text: str
    max_completion_length: int


def _find_prompt_text(answer: AnswerToReplace) -> str:
    prompt = answer.prompt
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


REWARD_PROBES: dict[str, Callable[[AnswerToReplace], str]] = {
    "empty": lambda answer: "",
    "longest": lambda answer: " ".join([LONGEST_WORD] * answer.max_completion_length),
    "repeated": lambda answer: "\n".join([answer.text] * 3),
    "echo": _find_prompt_text,
    "format": lambda answer: _TAGS_OR_WORD.sub(lambda found: found[1] or "", answer.text),
}
"""What each probe makes of an answer."""
DESCRIPTIONS = {
    "empty": "empty answers",
    "longest": f"answers of the word {LONGEST_WORD!r} alone",
    "repeated": "its own answers repeated",
    "echo": "the prompt as the answer",
    "format": "its own answers without words and numbers",
}


def score_probes(
    objective: "PolicyObjective",
    workers: RewardWorkers,
    prompts: Sequence[Example],
    sampled: Sequence[Sequence[SampledAnswer]],
    file: str,
) -> dict[str, Tensor]:
    """Return what the rewards give to each probe's answers [P, K], one in place of each sampled answer.

    A probe that a reward raises an error on is left out.
    """
    answers = make_answers_to_score(prompts, sampled, file)
    pairs = [*zip(answers.prompts, answers.completions, strict=True)]
    found = {}
    for name, replace_answer in REWARD_PROBES.items():
        texts = [replace_answer(AnswerToReplace(*pair, objective.max_completion_length)) for pair in pairs]
        with suppress(RunError):
            rewards = torch.tensor(workers.score(answers.with_completions(texts)), dtype=torch.float64)
            found[name] = workers.sum_weighted(rewards).view(len(prompts), -1)
    return found


def describe_fired_probes(probes: Mapping[str, Tensor], rewards: Tensor) -> list[str]:
    """Return a sentence about each probe that gets more than sampled answers do, whose rewards are [P, K]."""
    return [
        f"the rewards give {DESCRIPTIONS[name]} {float(values.mean()):.3f} on average, and the model's own "
        f"{float(rewards.mean()):.3f}: training may teach it to please them without being of use; "
        "change them so that such answers get less"
        for name, values in probes.items()
        if is_probe_above(values, rewards)
    ]


def is_probe_above(values: Tensor, rewards: Tensor) -> bool:
    """Return whether a probe's rewards [P, K] are above those of sampled answers, by two standard errors of prompts."""
    differences = values.mean(1) - rewards.mean(1)
    error = float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return float(differences.mean()) > max(2 * error, 1e-9)
