"""Base and tuned answer the same held-out prompts; each answer with its checks.

Every prompt is answered alone, each token the likeliest, so an answer is the one that `slimtune generate` prints. Laid
together, answers would depend on their neighbours: in bf16 a product of other shape rounds otherwise, and one token
that turns changes all that follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.collator import Example
from ..data.read import Row
from ..errors import UsageError
from .answer_checks import Check, repetition
from .generate import Generator, Message


@dataclass(frozen=True)
class Asked:
    """A held-out prompt: the messages before a row's last answer, that answer, and the row's line."""

    prompt: list[Message]
    reference: str
    line: int


def sample_prompts(rows: Iterable[Row], examples: Sequence[Example], most: int) -> list[Asked]:
    """Return up to `most` prompts, spread evenly over the rows that were measured.

    Raises:
        UsageError: the rows are no conversations that end in words.
    """
    places = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).round().astype(int))
    lines = {examples[int(i)]["line"] for i in places}
    found = []
    for row in rows:
        if row.line not in lines:
            continue
        said = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("content")]
        if not said or row.tools:
            raise UsageError(
                f"the row of line {row.line} is no conversation that can be asked again",
                "messages that end in the assistant's words, without tools",
                "leave --generate out",
            )
        found.append(Asked(row.messages[: said[-1]], row.messages[said[-1]]["content"], row.line))
    return found


def side_by_side(
    speaker: Generator, asked: Sequence[Asked], checks: Mapping[str, Check], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Return of each prompt `line`, `prompt`, `reference`, `base`, `tuned`, `checks` (`{name: {"base", "tuned"}}`)."""
    found = []
    for one in asked:
        said = {}
        checked: dict[str, dict[str, bool | float]] = {}
        for who in ("base", "tuned"):
            answer = speaker.answer(one.prompt, tuned=who == "tuned", max_new_tokens=max_new_tokens)
            said[who] = answer.text
            every = {"tokens": answer.tokens, "repetition": repetition(answer.text), "ended": answer.ended}
            every |= {name: check(answer.text, one.reference) for name, check in checks.items()}
            for name, value in every.items():
                checked.setdefault(name, {})[who] = value
        found.append({"line": one.line, "prompt": one.prompt, "reference": one.reference, **said, "checks": checked})
    return found


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean of each check over answers, of base and tuned; of what is true or false, the share."""
    return {
        name: {who: float(np.mean([a["checks"][name][who] for a in answers])) for who in ("base", "tuned")}
        for name in answers[0]["checks"]
    }
