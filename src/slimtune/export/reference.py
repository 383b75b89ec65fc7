"""Compare an engine with the trained adapter, token by token.

    rendered prompts   the same token ids: a wrong template or a second beginning-of-sequence token shows here
    log-probabilities  of each next token of held-out rows and fixed questions, given the tokens before it
    greedy answers     shown, not judged: where two tokens are almost equally likely, rounding picks another

For each position d = |log p(next token | engine) − log p(next token | base with adapter)|, in nats. The same distance
between the base and the base with its adapter is the adapter's effect; a d is large or small relative to it. KL is that
of the engine's distribution from the adapter's, over the engine's likeliest tokens and all others as one: a lower
bound. Greedy text alone would not notice most faults: a wrong order of weights often changes no word.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..config import Recipe
from ..setup import open_rows_from_recipe
from .engines import Engine, Scores, TransformersEngine

QUESTIONS = (
    ("Define patience.", "A minor form of despair, disguised as a virtue."),
    ("What is the capital of France?", "The capital of France is Paris, a city of about two million people."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Translate into German: Good morning, how are you?", "Guten Morgen, wie geht es dir?"),
)
MAX_ROWS, MAX_TOKENS, MAX_POSITIONS = 8, 256, 300
"""Held-out rows, tokens of one text, and next tokens in total (llama.cpp gives one at a time)."""
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be from the adapter.

    Args:
        max_difference: d at the worst position, nats.
        mean_difference: d on average, nats.
        effect_share: this share of the adapter's effect may be added to `mean_difference`.
    """

    max_difference: float = math.inf
    mean_difference: float = math.inf
    effect_share: float = 0.0

    def __str__(self) -> str:
        share = f" + {self.effect_share:.0%} of the effect" if self.effect_share else ""
        parts = [f"d ≤ {self.max_difference:g}"] if math.isfinite(self.max_difference) else []
        return ", ".join([*parts, f"mean d ≤ {self.mean_difference:g}{share}"])


TOLERANCES = {
    "f64": Tolerance(1e-5, 1e-6),
    "f32": Tolerance(0.02, 0.01),
    "f16": Tolerance(0.1, 0.01),
    "bf16": Tolerance(3.0, 0.05, 0.25),
    "q8_0": Tolerance(3.0, 0.05, 0.25),
    "lower": Tolerance(mean_difference=0.3, effect_share=0.5),
}
"""By the precision of the weights or of the arithmetic, strictest first. Few bits round W + ΔW, which costs a share of
the change; beside a base in fewer bits the base's own rounding adds to it. "lower": fewer than 8 bits a weight."""
PRECISIONS = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def get_tolerance(*precisions: str) -> Tolerance:
    """Return the loosest tolerance of several precisions, such as that of the weights and that of the arithmetic."""
    known = [p.lower() if p.lower() in TOLERANCES else "lower" for p in precisions]
    return TOLERANCES[max(known, key=list(TOLERANCES).index)]


def conversion_tolerance(error: float) -> Tolerance:
    """Return the tolerance of an adapter exported as the nearest LoRA, whose relative error is known."""
    return Tolerance(mean_difference=0.02, effect_share=error)


@dataclass(frozen=True)
class Text:
    """One text to compare on.

    Args:
        prompt: the prompt as the chat template renders it; "" without a template.
        ids: token ids of prompt and answer.
    """

    prompt: str
    ids: list[int]


@dataclass(frozen=True)
class Verdict:
    """The result of comparing one engine with the trained adapter.

    Args:
        engine: its name.
        precision: of its weights.
        prompts, prompts_equal: rendered prompts, and those with the same token ids.
        positions: next tokens compared.
        max_difference, mean_difference: d, nats.
        kl: nats, on average.
        effect: mean d between the base and the base with its adapter, nats.
        answers, answers_equal: greedy answers, and those that are equal token by token.
        limit: the tolerance.
        passed: whether the engine is within it; None: it was not checked.
        reason: why it is not, or why it was not checked.
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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Reference:
    """The trained adapter on its base: what every engine is compared with.

    Args:
        model: the adapted model, in evaluation mode.
        tokenizer: of its base.
        texts: what to compare on.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[Text]) -> None:
        self.engine, self.texts = TransformersEngine("trained adapter", model, tokenizer), list(texts)
        self._log_probs: list[Tensor] | None = None
        self._effect: float | None = None
        self._answers: dict[int, list[int]] = {}

    def log_probs(self) -> list[Tensor]:
        """Return the adapter's log-probabilities of each text's next tokens; computed once."""
        if self._log_probs is None:
            self._log_probs = [self.engine.score(text.ids).token_log_probs for text in self.texts]
        return self._log_probs

    def effect(self) -> float:
        """Return the mean distance between the base and the base with its adapter, nats; computed once."""
        if self._effect is None:
            with self.engine.model.disable_adapter():
                base = [self.engine.score(text.ids).token_log_probs for text in self.texts]
            self._effect = self.differences(base).mean().item()
        return self._effect

    def differences(self, log_probs: Iterable[Tensor]) -> Tensor:
        """Return d at every position of all texts."""
        return torch.cat([(a - b).abs() for a, b in zip(self.log_probs(), log_probs, strict=True)])

    def answer(self, number: int, prompt: Sequence[int]) -> list[int]:
        """Return the adapter's greedy answer to the prompt of a text; computed once."""
        if number not in self._answers:
            self._answers[number] = self.engine.generate(prompt, ANSWER_TOKENS)
        return self._answers[number]


def make_texts(tokenizer: Any, recipe: Recipe | None, config: Any, rows: Path | None = None) -> list[Text]:
    """Return texts to compare on: fixed questions, then the first rows that the run held out.

    Args:
        tokenizer: of the base.
        recipe: the run's, if there is one: its validation (else test) rows.
        config: of the model; texts longer than its context are cut.
        rows: a file of rows to use instead.
    """
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    held_out = (recipe.data.validation, recipe.data.test) if recipe is not None else ()
    if file := rows or next((f for f in held_out if f is not None and f.exists()), None):
        first = itertools.islice(open_rows_from_recipe(recipe if rows is None else None, file).valid_rows(), MAX_ROWS)
        chats += [row.messages for row in first if row.messages]
    longest = min(getattr(config, "max_position_embeddings", None) or MAX_TOKENS, MAX_TOKENS)
    texts: list[Text] = []
    for chat in chats:
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except (ValueError, TemplateError):  # no template, or other roles: plain text serves as well
            text = "\n".join(m["content"] for m in chat)
        try:
            prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError):
            prompt = ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:longest]
        if len(ids) > 1 and sum(len(t.ids) - 1 for t in texts) < MAX_POSITIONS:
            texts.append(Text(prompt, ids))
    return texts


def find_faults(differences: Tensor, effect: float, tolerance: Tolerance, noise: float = 0.005) -> list[str]:
    """Return why an engine is not the trained adapter, one sentence part each; [] if it is.

    Args:
        differences: d at each position `(n,)`.
        effect: the adapter's.
        tolerance: how large d may be.
        noise: mean d that arithmetic alone makes, nats. Above it an engine must be nearer to the adapter than half way
            to the base, whatever the tolerance.
    """
    worst, mean = differences.max().item(), differences.mean().item()
    allowed = tolerance.mean_difference + tolerance.effect_share * effect
    faults = []
    if not worst <= tolerance.max_difference:
        faults.append(f"a token's log p differs by {worst:.3g} nats, {tolerance.max_difference:g} are allowed")
    if not mean <= allowed:
        faults.append(f"log p differs by {mean:.3g} nats on average, {allowed:.3g} are allowed")
    if mean > max(noise, effect / 2):
        faults.append(f"half or more of what the adapter changes ({effect:.3g} nats on average) is lost")
    return faults


def compare_engine(
    reference: Reference, engine: Engine, precision: str, *, tolerance: Tolerance | None = None, answers: int = 4
) -> Verdict:
    """Compare an engine with the trained adapter.

    Args:
        reference: the adapter.
        engine: the engine.
        precision: of its weights: "f32", "f16", "bf16", "q8_0", "Q4_K_M", …
        tolerance: None: that of the precision.
        answers: number of greedy answers to compare.
    """
    computed = PRECISIONS[reference.engine.model.dtype]
    tolerance = tolerance or get_tolerance(precision, computed)
    prompts = [t.prompt for t in reference.texts if t.prompt]
    ids = [reference.engine.tokenize(p) for p in prompts]
    engine_ids = [engine.tokenize(p) for p in prompts]
    scores = [engine.score(text.ids) for text in reference.texts]
    differences = reference.differences(s.token_log_probs for s in scores)
    kl = [
        kl_divergence(reference.engine.score_at(text.ids, s.top_ids), s)
        for text, s in zip(reference.texts, scores, strict=True)
    ]
    equal = sum(reference.answer(i, p) == engine.generate(p, ANSWER_TOKENS) for i, p in enumerate(ids[:answers]))
    effect = reference.effect()
    faults = find_faults(differences, effect, tolerance, noise=0.05 if computed in ("f16", "bf16") else 0.005)
    unlike = [(a, b) for a, b in zip(ids, engine_ids, strict=True) if a != b]
    if unlike:
        ours, theirs = unlike[0]
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, unlike[0])))
        where = f"the first from token {at}: {theirs[at : at + 4]} for {ours[at : at + 4]}"
        if theirs[1:] == ours:
            where = f"a second beginning-of-sequence token, {theirs[0]}?"
        faults.insert(0, f"{len(unlike)} of {len(prompts)} rendered prompts become other tokens ({where})")
    return Verdict(
        engine.name,
        precision,
        prompts=len(prompts),
        prompts_equal=len(prompts) - len(unlike),
        positions=len(differences),
        max_difference=differences.max().item(),
        mean_difference=differences.mean().item(),
        kl=torch.cat(kl).mean().item(),
        effect=effect,
        answers=len(ids[:answers]),
        answers_equal=equal,
        limit=str(tolerance),
        passed=not faults,
        reason="; ".join(faults),
    )


def kl_divergence(log_probs: Tensor, scores: Scores) -> Tensor:
    """Return KL(adapter ‖ engine) at each position `(n - 1)`, over the engine's likeliest tokens and the rest as one.

    Args:
        log_probs: the adapter's log-probabilities of those tokens `(n - 1, k)`.
        scores: the engine's.
    """
    p, q = log_probs.exp(), scores.top_log_probs.exp()
    rest_p, rest_q = ((1 - each.sum(1, keepdim=True)).clamp_min(1e-12) for each in (p, q))
    p, q = torch.cat([p, rest_p], 1), torch.cat([q, rest_q], 1)
    return (p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log()).sum(1)
