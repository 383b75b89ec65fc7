"""The gate: does what ships say what was trained? Each engine is asked, and compared with the trained adapter.

    rendered prompts   the same token ids: a wrong template or a second beginning of text shows here
    teacher forcing    log p of each next token of held-out rows and fixed questions, engine against adapter
    greedy answers     shown, not judged: where two tokens are all but equal, rounding picks another

For each position d = |log p(next token | engine) − log p(next token | base with adapter)|, in nats; KL is that of the
engine's distribution from the adapter's, over the engine's likeliest tokens and all others as one, so a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .engines import Engine, Scores
from .engines.transformers import Transformers

ANSWER = 24
"""Tokens of a greedy answer."""


@dataclass(frozen=True)
class Limit:
    """How far from the adapter an engine may be.

    Args:
        worst: d at the worst position, nats; infinite: not judged.
        mean: d on average, nats.
        share: and this share of the adapter's own effect (its mean distance from the base) more on average.
    """

    worst: float = math.inf
    mean: float = math.inf
    share: float = 0.0

    def allows(self, effect: float) -> float:
        """Return the mean d that is allowed."""
        return self.mean + self.share * effect

    def __str__(self) -> str:
        share = f" + {self.share:.0%} of the effect" if self.share else ""
        parts = [f"d ≤ {self.worst:g}"] if math.isfinite(self.worst) else []
        return ", ".join([*parts, *([f"mean d ≤ {self.mean:g}{share}"] if math.isfinite(self.mean) else [])])


LIMITS = {
    "f32": Limit(worst=0.02),
    "f16": Limit(worst=0.1, mean=0.01),
    "bf16": Limit(worst=3.0, mean=0.05, share=0.25),
    "q8_0": Limit(worst=3.0, mean=0.05, share=0.25),
}
"""What is allowed by what the weights are kept in. 16 bits and fewer round W′, which costs a share of what the adapter
changes; beside a base in fewer bits than these the base's own rounding counts, too."""
TINY = 0.005
"""Nats: what arithmetic alone makes. Beyond it an engine must be nearer to the adapter than half way to the base."""
COARSE = Limit(mean=0.3, share=0.5)
"""Allowed for fewer bits than 8 a weight."""


def as_near(error: float) -> Limit:
    """Return what is allowed where the adapter ships as the nearest LoRA.

    Args:
        error: the conversion's, relative to the adapter's change of the weights.
    """
    return Limit(mean=0.02, share=error)


@dataclass(frozen=True)
class Text:
    """What is asked of both sides.

    Args:
        prompt: as the chat template renders it, ready for an answer; "" where there is no template.
        ids: token ids of prompt and answer.
    """

    prompt: str
    ids: list[int]


@dataclass(frozen=True)
class Verdict:
    """One engine beside the trained adapter.

    Args:
        engine: its name.
        precision: what its weights are kept in.
        prompts, prompts_equal: rendered prompts, and those with the same token ids.
        positions: next tokens compared.
        max_difference, mean_difference: d, nats.
        kl: nats, on average.
        effect: mean d between base and adapter: what a difference is small or large beside.
        answers, answers_equal: greedy answers, and those that are the same token by token.
        limit: what was allowed.
        passed: whether it held.
        reason: why it did not, or why it was not checked (then `passed` is None).
    """

    engine: str
    precision: str
    prompts: int = 0
    prompts_equal: int = 0
    positions: int = 0
    max_difference: float = math.nan
    mean_difference: float = math.nan
    kl: float = math.nan
    effect: float = math.nan
    answers: int = 0
    answers_equal: int = 0
    limit: str = ""
    passed: bool | None = None
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


class Trained:
    """The adapter as it was trained: what everything is compared with.

    Args:
        model: the adapted model, in evaluation mode.
        tokenizer: of its base.
        texts: what is asked.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[Text]) -> None:
        self.engine, self.texts = Transformers("trained adapter", model, tokenizer), list(texts)
        self._effect: float | None = None
        self._answers: dict[int, list[int]] = {}

    def effect(self) -> float:
        """Return the mean distance between adapter and base, nats."""
        if self._effect is None:
            model, apart = self.engine.model, []
            for text in self.texts:
                with_it = self.engine.scores(text.ids).own
                with model.disable_adapter():
                    apart.append((with_it - self.engine.scores(text.ids).own).abs())
            self._effect = torch.cat(apart).mean().item()
        return self._effect

    def answer(self, number: int, ids: Sequence[int]) -> list[int]:
        """Return the adapter's own greedy answer to a text's prompt."""
        if number not in self._answers:
            self._answers[number] = self.engine.answer(ids, ANSWER)
        return self._answers[number]


def gate(trained: Trained, engine: Engine, precision: str, *, limit: Limit | None = None, answers: int = 4) -> Verdict:
    """Ask an engine what the trained adapter was asked.

    Args:
        trained: the adapter.
        engine: what may serve it.
        precision: what the engine's weights are kept in: "f32", "f16", "bf16", "q8_0", "Q4_K_M", …
        limit: what is allowed; None: `LIMITS`.
        answers: greedy answers to compare.
    """
    limit = limit or LIMITS.get(precision.lower(), COARSE)
    prompts = [t.prompt for t in trained.texts if t.prompt]
    ids = [trained.engine.tokens(p) for p in prompts]
    theirs = [engine.tokens(p) for p in prompts]
    apart, kl = [], []
    for text in trained.texts:
        table, scores = trained.engine.table(text.ids), engine.scores(text.ids)
        apart.append((table.gather(1, torch.tensor(text.ids[1:])[:, None])[:, 0] - scores.own).abs())
        kl.append(divergence(table, scores))
    worst, mean = torch.cat(apart).max().item(), torch.cat(apart).mean().item()
    asked = ids[:answers]
    said = sum(trained.answer(i, each) == engine.answer(each, ANSWER) for i, each in enumerate(asked))
    effect = trained.effect()
    faults = []
    if unlike := sum(a != b for a, b in zip(ids, theirs, strict=True)):
        faults.append(f"{unlike} of {len(prompts)} rendered prompts become other tokens{_first_unlike(ids, theirs)}")
    if not worst <= limit.worst:
        faults.append(f"a token's log p differs by {worst:.3g} nats, {limit.worst:g} are allowed")
    if not mean <= limit.allows(effect):
        faults.append(f"log p differs by {mean:.3g} nats on average, {limit.allows(effect):.3g} are allowed")
    if mean > max(TINY, effect / 2):
        faults.append(f"half or more of what the adapter changes ({effect:.3g} nats on average) is lost")
    return Verdict(
        engine.name,
        precision,
        prompts=len(prompts),
        prompts_equal=len(prompts) - unlike,
        positions=len(torch.cat(apart)),
        max_difference=worst,
        mean_difference=mean,
        kl=torch.cat(kl).mean().item(),
        effect=effect,
        answers=len(asked),
        answers_equal=said,
        limit=str(limit),
        passed=not faults,
        reason="; ".join(faults),
    )


def divergence(table: Tensor, scores: Scores) -> Tensor:
    """Return KL(adapter ‖ engine) at each position `(n - 1)`, of the engine's likeliest tokens and the rest as one.

    Args:
        table: the adapter's log p `(n - 1, vocabulary)`.
        scores: the engine's.
    """
    p, q = table.gather(1, scores.likely).exp(), scores.values.exp()
    rest = [(1 - each.sum(1, keepdim=True)).clamp_min(1e-12) for each in (p, q)]
    p, q = torch.cat([p, rest[0]], 1), torch.cat([q, rest[1]], 1)
    return (p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log()).sum(1)


def _first_unlike(ids: list[list[int]], theirs: list[list[int]]) -> str:
    ours, other = next(pair for pair in zip(ids, theirs, strict=True) if pair[0] != pair[1])
    if other[1:] == ours:
        return f": {other[0]} stands before them once more (a second beginning of text?)"
    at = next(
        (i for i, pair in enumerate(zip(ours, other, strict=False)) if pair[0] != pair[1]), min(len(ours), len(other))
    )
    return f": from token {at} on {other[at : at + 4]} where {ours[at : at + 4]} was trained"
