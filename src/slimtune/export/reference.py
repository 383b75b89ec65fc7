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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..config import Recipe
from ..setup import open_rows_from_recipe
from ..utils.chat_rendering import render_chat_template
from .engines import Engine, Scores, TransformersEngine

QUESTIONS = (
    ("Define patience.", "A minor form of despair, disguised as a virtue."),
    ("What is the capital of France?", "The capital of France is Paris, a city of about two million people."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Translate into German: Good morning, how are you?", "Guten Morgen, wie geht es dir?"),
)
MAX_ROWS, MAX_TOKENS, MAX_POSITIONS = 8, 256, 300
"""Held-out rows, tokens of one text, and next tokens in total (llama.cpp gives one at a time)."""
MAX_ANSWERS, ANSWER_TOKENS = 4, 24


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be from the adapter: d at the worst position and on average, nats."""

    max_difference: float = math.inf
    mean_difference: float = math.inf
    effect_share: float = 0.0  # of the adapter's effect, added to `mean_difference`

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


@dataclass(frozen=True)
class Text:
    """One text to compare on: token ids of prompt and answer, and the prompt as the chat template renders it or ""."""

    prompt: str
    ids: list[int]


@dataclass(frozen=True)
class Verdict:
    """The result of comparing one engine with the trained adapter; differences, KL and effect in nats."""

    engine: str
    precision: str  # of its weights
    prompts: int = 0
    prompts_equal: int = 0  # with the same token ids
    positions: int = 0  # next tokens compared
    max_difference: float = math.nan
    mean_difference: float = math.nan
    kl: float = math.nan  # on average
    effect: float = math.nan
    answers: int = 0
    answers_equal: int = 0  # token by token
    limit: str = ""  # the tolerance
    passed: bool | None = None  # None: not checked
    reason: str = ""  # why it did not pass, or was not checked


class Reference:
    """The trained adapter on its base, in evaluation mode: what every engine is compared with on some texts."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[Text]) -> None:
        self.engine, self.texts = TransformersEngine("trained adapter", model, tokenizer), list(texts)
        self.prompts = [self.engine.tokenize(t.prompt) for t in self.texts if t.prompt]

    @cached_property
    def log_probs(self) -> list[Tensor]:
        """The adapter's log-probabilities of each text's next tokens."""
        return [self.engine.score(text.ids).token_log_probs for text in self.texts]

    @cached_property
    def effect(self) -> float:
        """The mean distance between the base and the base with its adapter, nats."""
        with self.engine.model.disable_adapter():
            base = [self.engine.score(text.ids).token_log_probs for text in self.texts]
        return self.differences(base).mean().item()

    def differences(self, log_probs: Iterable[Tensor]) -> Tensor:
        """Return d at every position of all texts `(n,)`."""
        return torch.cat([(a - b).abs() for a, b in zip(self.log_probs, log_probs, strict=True)])

    @cached_property
    def answers(self) -> list[list[int]]:
        """The adapter's greedy answers to the first prompts."""
        return [self.engine.generate(ids, ANSWER_TOKENS) for ids in self.prompts[:MAX_ANSWERS]]

    def find_faults(self, differences: Tensor, tolerance: Tolerance) -> list[str]:
        """Return why an engine with these differences is not the trained adapter, one clause each; [] if it is."""
        worst, mean = differences.max().item(), differences.mean().item()
        allowed = tolerance.mean_difference + tolerance.effect_share * self.effect
        faults = []
        if not worst <= tolerance.max_difference:
            faults.append(f"a token's log p differs by {worst:.3g} nats, {tolerance.max_difference:g} are allowed")
        if not mean <= allowed:
            faults.append(f"log p differs by {mean:.3g} nats on average, {allowed:.3g} are allowed")
        # Above what arithmetic alone makes, an engine must be nearer to the adapter than half way to the base.
        noise = 0.05 if self.engine.model.dtype.itemsize == 2 else 0.005
        if mean > max(noise, self.effect / 2):
            faults.append(f"half or more of what the adapter changes ({self.effect:.3g} nats on average) is lost")
        return faults


def make_texts(tokenizer: Any, recipe: Recipe | None, config: Any, rows: Path | None = None) -> list[Text]:
    """Return fixed questions, then the first rows that the run held out (validation, else test), or those of `rows`.

    Texts longer than the context in the model's config are cut.
    """
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    held_out = (recipe.data.validation, recipe.data.test) if recipe is not None else ()
    if file := rows or next((f for f in held_out if f is not None and f.exists()), None):
        first = itertools.islice(
            open_rows_from_recipe(recipe if rows is None else None, file).require_valid_rows(), MAX_ROWS
        )
        chats += [row.messages for row in first if row.messages]
    longest = min(getattr(config, "max_position_embeddings", None) or MAX_TOKENS, MAX_TOKENS)
    texts: list[Text] = []
    for chat in chats:
        try:
            text = render_chat_template(tokenizer, chat)
        except (ValueError, TemplateError):  # no template, or other roles: plain text serves as well
            text = "\n".join(m["content"] for m in chat)
        try:
            prompt = render_chat_template(tokenizer, chat[:-1], add_generation_prompt=True)
        except (ValueError, TemplateError):
            prompt = ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:longest]
        if len(ids) > 1 and sum(len(t.ids) - 1 for t in texts) < MAX_POSITIONS:
            texts.append(Text(prompt, ids))
    return texts


def compare_engine(reference: Reference, engine: Engine, precision: str, tolerance: Tolerance | None = None) -> Verdict:
    """Compare an engine, whose weights have a precision ("f32", "q8_0", "Q4_K_M", …), with the trained adapter.

    The tolerance is by default that of the precision.
    """
    tolerance = tolerance or get_tolerance(precision, PRECISIONS[reference.engine.model.dtype])
    prompts = [engine.tokenize(t.prompt) for t in reference.texts if t.prompt]
    unlike = [(a, b) for a, b in zip(reference.prompts, prompts, strict=True) if a != b]
    scores = [engine.score(text.ids) for text in reference.texts]
    differences = reference.differences(s.token_log_probs for s in scores)
    pairs = zip(reference.texts, scores, strict=True)
    kl = [kl_divergence(reference.engine.score_candidates(text.ids, s.top_ids), s) for text, s in pairs]
    answers = zip(reference.answers, reference.prompts, strict=False)
    equal = sum(answer == engine.generate(ids, ANSWER_TOKENS) for answer, ids in answers)
    faults = reference.find_faults(differences, tolerance)
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
        effect=reference.effect,
        answers=len(reference.answers),
        answers_equal=equal,
        limit=str(tolerance),
        passed=not faults,
        reason="; ".join(faults),
    )


def kl_divergence(log_probs: Tensor, scores: Scores) -> Tensor:
    """Return KL(adapter ‖ engine) at each position `(n - 1,)`, over the engine's likeliest tokens and the rest as one.

    `log_probs` `(n - 1, k)` are the adapter's of those tokens.
    """
    p, q = log_probs.exp(), scores.top_log_probs.exp()
    rest_p, rest_q = ((1 - each.sum(1, keepdim=True)).clamp_min(1e-12) for each in (p, q))
    p, q = torch.cat([p, rest_p], 1), torch.cat([q, rest_q], 1)
    return (p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log()).sum(1)
