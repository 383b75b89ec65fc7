"""Compare an engine with the trained adapter, token by token.

    rendered prompts   the same token ids: a wrong template or a second beginning-of-sequence token shows here
    log-probabilities  of each next token of held-out rows and fixed questions, given the tokens before it
    greedy answers     shown, not judged: where two tokens are almost equally likely, rounding picks another

For each position d = log p(next token | engine) − log p(next token | base with adapter), in nats; the table shows |d|.
v is the same difference between the base with its adapter and the base: the adapter's effect. KL is that of the
engine's distribution from the adapter's, over the engine's likeliest tokens and all others as one: a lower bound.

    strength = 1 + Σ d v / Σ v²: the share of the adapter's effect that arrives, 1 if the export is right

Errors of arithmetic have no direction and cancel in it; another alpha, a missing layer or a wrong order of weights does
not. Greedy text alone would not notice most faults: a wrong order of weights often changes no word.

How exact an engine computes is not known beforehand: llama.cpp looks GELU up in a table of 16-bit floats, for example.
So the untouched base is asked in the same engine, on the same tokens, and the limits follow from what it differs by
(`EngineTolerance.follow_base`): for an adapter beside its base always, for a merged model, whose weights are rounded
anew, where it is outside the limits of its precision. The base itself must be near enough, too: otherwise the engine
serves another one.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..core.config import Recipe
from ..core.data.chat_template import TokenizedRow
from ..core.data.rows import Row, split_preference_into_rows
from ..core.data.tokenize import tokenize_rows_with_errors
from ..core.foundation.chat_rendering import render_chat_template
from ..core.foundation.dtype_names import llama_cpp_dtype_name
from ..core.foundation.progress_bars import track_progress
from ..core.models.base_config import get_max_positions
from ..core.training.objective import open_rows_for_objective
from ..errors import ModelError, SlimtuneError, UsageError
from ..extras.row_files import open_rows
from ..generation.inference_engines import InferenceEngine, TextTokenScores, TransformersInferenceEngine
from .engine_diagnosis import CAUSES_IN_ADAPTER, AdapterVariants, EngineDiagnosis, diagnose_engine
from .export_results import EngineVerdict, TokenDifference

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
class EngineTolerance:
    """How far an engine may be from the adapter: |d| at the worst position and on average, nats; and its strength."""

    max_difference: float = math.inf
    mean_difference: float = math.inf
    mean_difference_per_effect: float = 0.0  # of the adapter's effect, added to `mean_difference`
    strength_difference: float = 0.02  # distance of the strength from 1, beyond three standard errors
    base_difference: float = 0.05  # of the untouched base, on average
    follows_base: bool = False  # the limits are least ones, which `follow_base` widens

    def follow_base(self, base_differences: Tensor) -> "EngineTolerance":
        """Return the tolerance with limits that follow from the untouched base's differences in the engine `(n,)`.

        On average twice the base's, with three standard errors. At the worst position twice the base's worst, or
        sixteen times its root mean square, whichever is more: the largest of a few hundred values with a long tail says
        little about the next largest (a base of 0.021 at most had a right adapter with 0.046).
        """
        distances = base_differences.abs()
        error = distances.std(correction=0).item() / len(distances) ** 0.5
        return replace(
            self,
            max_difference=max(self.max_difference, _bound_worst_difference(base_differences)),
            mean_difference=max(self.mean_difference, 2 * distances.mean().item() + 3 * error),
        )

    def allow_mean(self, effect: float) -> float:
        """Return how far log p may be from the adapter's on average, if the adapter moves it by `effect`."""
        return self.mean_difference + self.mean_difference_per_effect * effect

    def __str__(self) -> str:
        per_effect = self.mean_difference_per_effect
        share = f" + {per_effect:{'.0%' if per_effect >= 0.01 else '.2g'}} of the effect" if per_effect else ""
        parts = [f"d ≤ {self.max_difference:.3g}"] if math.isfinite(self.max_difference) else []
        return ", ".join([*parts, f"mean d ≤ {self.mean_difference:.3g}{share}"])


TOLERANCES = {
    "f64": EngineTolerance(1e-5, 1e-6, base_difference=1e-5),
    "f32": EngineTolerance(0.02, 0.01),
    "f16": EngineTolerance(0.1, 0.01),
    "bf16": EngineTolerance(3.0, 0.05, 0.25, strength_difference=0.25, base_difference=0.2),
    "q8_0": EngineTolerance(3.0, 0.005, 0.05, base_difference=0.2),
    "lower": EngineTolerance(
        mean_difference=0.3, mean_difference_per_effect=0.5, strength_difference=0.1, base_difference=0.8
    ),
}
"""By the precision of the weights or of the arithmetic, strictest first. Few bits round W + ΔW, which costs a share of
the change; beside a base in fewer bits the base's own rounding adds to it. "lower": fewer than 8 bits a weight."""

KEPT_GAIN_TOLERANCE = replace(TOLERANCES["lower"], strength_difference=math.inf, base_difference=2.0, follows_base=True)
"""Of fewer than 8 bits a weight where the share of the held-out gain that is left decides (`kept_gain.py`): rounding
may cost much of the effect, which is no fault of the file."""


ADAPTER_TOLERANCES = {
    "f32": EngineTolerance(0.002, 0.0002, 0.0005, follows_base=True),
    "f16": EngineTolerance(0.002, 0.0002, 0.003, follows_base=True),
}
"""By the precision of an adapter's file beside its base as it was trained on; rounding costs a share of the effect."""


def get_loosest_tolerance(*precisions: str) -> EngineTolerance:
    """Return the loosest tolerance of several precisions, such as that of the weights and that of the arithmetic."""
    known = [p.lower() if p.lower() in TOLERANCES else "lower" for p in precisions]
    return TOLERANCES[max(known, key=list(TOLERANCES).index)]


@dataclass(frozen=True)
class ReferenceText:
    """One text to compare on: token ids of prompt and answer, and the prompt as the chat template renders it or ""."""

    prompt: str
    prompt_and_answer_ids: list[int]
    messages: Sequence[Any] = ()  # of the prompt, for servers that render it themselves


class AdapterReference:
    """The trained adapter on its base, in evaluation mode: what every engine is compared with on some texts."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[ReferenceText]) -> None:
        self.engine, self.texts = TransformersInferenceEngine("trained adapter", model, tokenizer), list(texts)
        self.prompts = [self.engine.tokenize(t.prompt) for t in self.texts if t.prompt]
        self.compared: list[Tensor] | None = None  # mask of the positions that an engine gives; None: all

    def select(self, indices: Sequence[int]) -> "AdapterReference":
        """Return a reference of some of the texts, with the log-probabilities that are computed already."""
        chosen = ([values[i] for i in indices] for values in (self.log_probs, self.base_log_probs))
        texts = [self.texts[i] for i in indices]
        return AdapterReference(self.engine.model, self.engine.tokenizer, texts).expecting(*chosen)

    def expecting(self, log_probs: list[Tensor], base_log_probs: list[Tensor] | None = None) -> "AdapterReference":
        """Return a reference for an engine that should compute these log-probabilities of the texts."""
        other = AdapterReference(self.engine.model, self.engine.tokenizer, self.texts)
        base = self.base_log_probs if base_log_probs is None else base_log_probs
        vars(other).update(log_probs=log_probs, base_log_probs=base)
        return other

    def score(self, engine: InferenceEngine, what: str) -> list[Tensor]:
        """Return an engine's log-probabilities of each text's next tokens; progress is reported as `what`."""
        return [scores.token_log_probs for scores in self.score_texts(engine, what)]

    def score_texts(self, engine: InferenceEngine, what: str) -> list[TextTokenScores]:
        """Return what an engine gives for each text; raise ModelError unless it is a value for each token."""
        all_scores, vocabulary = [], self.engine.model.config.get_text_config().vocab_size
        for text in track_progress(self.texts, what):
            scores, expected = engine.score(text.prompt_and_answer_ids), len(text.prompt_and_answer_ids) - 1
            if any(len(t) != expected for t in (scores.token_log_probs, scores.top_ids, scores.top_log_probs)):
                message = f"{engine.name} gives {len(scores.token_log_probs)} log-probabilities of {expected} tokens"
                raise ModelError(message, "one for each token but the first")
            if not ((scores.top_ids >= 0) & (scores.top_ids < vocabulary)).all():
                raise ModelError(f"{engine.name} gives tokens that the base does not have", f"ids below {vocabulary}")
            all_scores.append(scores)
        return all_scores

    @cached_property
    def log_probs(self) -> list[Tensor]:
        """The adapter's log-probabilities of each text's next tokens."""
        return self.score(self.engine, "texts for the trained adapter")

    @cached_property
    def base_log_probs(self) -> list[Tensor]:
        """The untouched base's log-probabilities of each text's next tokens."""
        with self.engine.model.disable_adapter():
            return self.score(self.engine, "texts for the base")

    @cached_property
    def effect(self) -> float:
        """The mean distance between the base and the base with its adapter, nats."""
        return self.differences(self.base_log_probs).abs().mean().item()

    def differences(self, log_probs: Iterable[Tensor], *, base: bool = False) -> Tensor:
        """Return d at every position of all texts `(n,)`; with `base` the differences from the untouched base."""
        expected = self.base_log_probs if base else self.log_probs
        found = [b - a for a, b in zip(expected, log_probs, strict=True)]
        return torch.cat(found if self.compared is None else [d[m] for d, m in zip(found, self.compared, strict=True)])

    def measure_effect_share(self, differences: Tensor) -> tuple[float | None, float]:
        """Return the share of the adapter's effect that arrives, and its standard error; (None, 0) without effect."""
        effect = -self.differences(self.base_log_probs)
        total = effect.square().sum()
        if total < 1e-12:
            return None, 0.0
        change = (differences * effect).sum() / total
        error = ((differences - change * effect) * effect).square().sum().sqrt() / total
        return 1 + change.item(), error.item()

    @cached_property
    def answers(self) -> list[list[int]]:
        """The adapter's greedy answers to the first prompts."""
        return [self.engine.generate(ids, ANSWER_TOKENS) for ids in self.prompts[:MAX_ANSWERS]]

    def find_faults(self, differences: Tensor, tolerance: EngineTolerance, base: Tensor | None = None) -> list[str]:
        """Return why an engine with these differences is not the trained adapter, one clause each; [] if it is.

        `base` are the differences of the untouched base in the same engine, if it was asked.
        """
        worst, mean = differences.abs().max().item(), differences.abs().mean().item()
        max_allowed, allowed = tolerance.max_difference, tolerance.allow_mean(self.effect)
        # Above what arithmetic alone makes, an engine must be nearer to the adapter than half way to the base.
        noise = 0.05 if self.engine.model.dtype.itemsize == 2 else 0.005
        faults, context, paired = [], "", differences
        if base is not None:
            base_mean = base.abs().mean().item()
            if not base_mean <= tolerance.base_difference:
                fewer = base_mean <= TOLERANCES["lower"].base_difference
                faults.append(
                    f"the base alone differs by {base_mean:.3g} nats on average, {tolerance.base_difference:g} are "
                    f"allowed: the engine has another base{', or weights in fewer bits (--precision)' if fewer else ''}"
                )
            max_allowed, allowed = max(max_allowed, _bound_worst_difference(base)), max(allowed, 2 * base_mean)
            noise, paired = max(noise, 2 * base_mean), differences - base
            context = f"; the base alone differs by {base_mean:.3g}"
        if not worst <= max_allowed:
            faults.append(f"a token's log p differs by {worst:.3g} nats, {max_allowed:.3g} are allowed")
        if not mean <= allowed:
            faults.append(f"log p differs by {mean:.3g} nats on average, {allowed:.3g} are allowed{context}")
        if mean > max(noise, self.effect / 2):
            faults.append(f"half or more of what the adapter changes ({self.effect:.3g} nats on average) is lost")
        strength, error = self.measure_effect_share(paired)
        if strength is not None and abs(strength - 1) > tolerance.strength_difference + 3 * error:
            faults.append(f"the adapter's effect arrives with {strength:.0%} of its strength (± {error:.1%})")
        return faults

    def find_worst_tokens(self, scores: Sequence[TextTokenScores], count: int = 3) -> list[TokenDifference]:
        """Return the tokens whose log-probability in an engine is furthest from the expected one."""
        found = []
        for text, expected, given in zip(self.texts, self.log_probs, scores, strict=True):
            distances = (given.token_log_probs - expected).abs().nan_to_num(0)
            for at in distances.topk(min(count, len(distances))).indices.tolist():
                parts = text.prompt_and_answer_ids[at + 1 : at + 2], text.prompt_and_answer_ids[max(0, at - 7) : at + 1]
                token, before = map(self.engine.tokenizer.decode, parts)
                found.append(TokenDifference(token, before, expected[at].item(), given.token_log_probs[at].item()))
        found.sort(key=lambda each: abs(each.found - each.expected))
        return list({(each.token, each.after): each for each in found}.values())[: -count - 1 : -1]  # once each

    def diagnose(self, differences: Tensor, tolerance: EngineTolerance, base: Tensor | None) -> EngineDiagnosis:
        """Return what an engine with these differences computes instead of the trained adapter; see `find_faults`."""
        noise = tolerance.allow_mean(self.effect)
        if base is not None:
            base_mean = base.abs().mean().item()
            if not base_mean <= tolerance.base_difference:
                return EngineDiagnosis("another-base")
            noise = max(noise, 2 * base_mean)

        def compute() -> Tensor:
            return self.differences(self.score(self.engine, "texts for a variant of the adapter"))

        variants = AdapterVariants(self.engine.model, self.engine.model.active_adapters[0], compute)
        of_base = self.differences(self.base_log_probs)
        try:
            return diagnose_engine(differences, of_base, noise, variants, is_base_right=base is not None)
        except UsageError:  # a method without a strength: the faults stand, their cause stays unknown
            return EngineDiagnosis("not-proven")

    def is_hidden(self, differences: Tensor) -> bool:
        """Return whether the engine's arithmetic differs so much that half of the effect could be missing unnoticed."""
        return 3 * self.measure_effect_share(differences)[1] > 0.5


def make_fixed_and_held_out_reference_texts(
    tokenizer: Any, recipe: Recipe | None, config: Any, rows_file: Path | None = None
) -> list[ReferenceText]:
    """Return fixed questions, then the first rows that the run held out (validation or test), or those of `rows_file`.

    A preference pair gives a text for each of its answers. Texts longer than the context in the model's config are cut.
    """
    compared = [Row([{"role": "user", "content": q}, {"role": "assistant", "content": a}], 0) for q, a in QUESTIONS]
    held_out = (recipe.data.validation, recipe.data.test) if recipe is not None else ()
    if file := rows_file or next((f for f in held_out if f is not None and f.exists()), None):
        opened = open_rows(file) if recipe is None else open_rows_for_objective(file, recipe.data, recipe.objective())
        valid = opened.require_valid_rows()
        compared += itertools.islice((part for row in valid for part in split_preference_into_rows(row)), MAX_ROWS)
    longest = min(get_max_positions(config) or MAX_TOKENS, MAX_TOKENS)
    texts: list[ReferenceText] = []
    for row in compared:
        prompt, ids = "", []
        if row.messages:
            try:
                text = render_chat_template(tokenizer, row.messages, row.tools)
            except (ValueError, TemplateError):  # no template, or other roles: plain text serves as well
                text = "\n".join(m.get("content") or "" for m in row.messages)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            with suppress(ValueError, TemplateError):
                prompt = render_chat_template(tokenizer, row.messages[:-1], row.tools, add_generation_prompt=True)
        elif isinstance(tokens := tokenize_rows_with_errors([row], tokenizer)[0], TokenizedRow):
            ids = tokens.input_ids
        if len(ids) > 1 and sum(len(t.prompt_and_answer_ids) - 1 for t in texts) < MAX_POSITIONS:
            texts.append(ReferenceText(prompt, ids[:longest], row.messages[:-1]))
    return texts


def judge_engine_against_adapter(
    reference: AdapterReference,
    engine: InferenceEngine,
    precision: str,
    tolerance: EngineTolerance | None = None,
    open_base: Callable[[InferenceEngine], InferenceEngine] | None = None,
    *,
    are_chats_compared: bool = False,
) -> EngineVerdict:
    """Compare an engine, whose weights have a precision ("f32", "q8_0", "Q4_K_M", …), with the trained adapter.

    Args:
        reference: the trained adapter and the texts.
        engine: what serves it.
        precision: of the engine's weights.
        tolerance: by default that of the precision.
        open_base: returns the untouched base in the same engine and precision. It is asked if the engine is outside
            the tolerance, and always below 8 bits, for which no limit holds for every base.
        are_chats_compared: compare a chat that the engine renders with the adapter's template, if it renders chats.
    """
    tolerance = tolerance or get_loosest_tolerance(precision, llama_cpp_dtype_name(reference.engine.model.dtype))
    prompts = [engine.tokenize(t.prompt) for t in reference.texts if t.prompt]
    unlike = [(a, b) for a, b in zip(reference.prompts, prompts, strict=True) if a != b]
    scores = reference.score_texts(engine, f"texts for {engine.name}")
    known = [s.token_log_probs.isfinite() for s in scores]
    reference.compared = None if all(mask.all() for mask in known) else known
    if not any(mask.any() for mask in known):
        raise ModelError(f"{engine.name} gives no log-probabilities of the compared texts")
    differences = reference.differences(s.token_log_probs for s in scores)
    answers = zip(reference.answers, reference.prompts, strict=False)
    equal = sum(answer == engine.generate(ids, ANSWER_TOKENS) for answer, ids in answers)
    faults, base, paired = reference.find_faults(differences, tolerance), None, differences
    is_base_needed = faults or tolerance.follows_base or tolerance == TOLERANCES["lower"]
    if open_base is not None and (is_base_needed or reference.is_hidden(differences)):
        with closing(open_base(engine)) as base_engine:
            log_probs = reference.score(base_engine, f"texts for the base in {engine.name}")
        base = reference.differences(log_probs, base=True)
        if tolerance.follows_base:
            tolerance = tolerance.follow_base(base)
        faults, paired = reference.find_faults(differences, tolerance, base), differences - base
    if unlike:
        where = _describe_other_tokens(*unlike[0], reference.engine.tokenizer)
        faults.insert(0, f"{len(unlike)} of {len(prompts)} rendered prompts become other tokens {where}")
    rendered = find_template_difference(engine, reference.engine) if are_chats_compared else ""
    diagnosis = EngineDiagnosis("applied")
    if faults and (not unlike or len(faults) > 1):
        diagnosis = reference.diagnose(differences, tolerance, base)
        if unlike and diagnosis.cause not in CAUSES_IN_ADAPTER:
            diagnosis = EngineDiagnosis("another-template")
        faults = [diagnosis.text, *faults] if diagnosis.text else faults
    elif unlike or rendered:
        diagnosis = EngineDiagnosis("another-template")
    reason = "; ".join(faults + [rendered] * bool(rendered))
    passed: bool | None = not reason
    if passed and reference.is_hidden(paired):
        reason = f"the engine's own rounding hides an effect of {reference.effect:.2g} nats on average"
        passed, diagnosis = None, EngineDiagnosis("not-proven")
    kl = _kl_divergence(reference, scores)
    distances, of_base = differences.abs(), None if base is None else base.abs()
    return EngineVerdict(
        engine.name, precision, prompts=len(prompts), prompts_equal=len(prompts) - len(unlike),
        positions=len(differences), max_difference=distances.max().item(), mean_difference=distances.mean().item(),
        kl=kl.mean().item() if len(kl) else None, effect=reference.effect,
        strength=reference.measure_effect_share(paired)[0],
        base_max_difference=None if of_base is None else of_base.max().item(),
        base_mean_difference=None if of_base is None else of_base.mean().item(),
        answers=len(reference.answers), answers_equal=equal, limit=str(tolerance), passed=passed,
        cause=diagnosis.cause, scale=diagnosis.scale, missing=list(diagnosis.missing), reason=reason,
        tokens=[] if passed else reference.find_worst_tokens(scores),
    )  # fmt: skip


def _describe_other_tokens(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    """Return where an engine's tokens of a text differ first from the adapter's."""
    if list(theirs[1:]) == list(ours):
        return f"from the first: {tokenizer.decode([theirs[0]])!r} is in front, a second beginning-of-sequence token?"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    there, here = (tokenizer.decode(list(ids[at : at + 8])) for ids in (theirs, ours))
    return f"from token {at}: {there!r} there, {here!r} by the adapter's template"


def _bound_worst_difference(base_differences: Tensor) -> float:
    """Return how far an engine may be from the adapter at the worst position, if the base differs by this."""
    distances = base_differences.abs()
    return max(2 * distances.max().item(), 16 * distances.square().mean().sqrt().item())


def _kl_divergence(reference: AdapterReference, all_scores: Sequence[TextTokenScores]) -> Tensor:
    """Return KL(adapter ‖ engine) at each position `(n,)`, over the engine's likeliest tokens and the rest as one."""
    found = []
    for text, scores in zip(reference.texts, all_scores, strict=True):
        p = reference.engine.score_candidates(text.prompt_and_answer_ids, scores.top_ids).exp()
        q = scores.top_log_probs.exp()
        p, q = (torch.cat([each, (1 - each.sum(1, keepdim=True)).clamp_min(1e-12)], 1) for each in (p, q))
        found.append((p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log()).sum(1))
    divergences = torch.cat(found)
    return divergences[divergences.isfinite()]


def find_template_difference(engine: Any, own: TransformersInferenceEngine) -> str:
    """Return how a chat that the server renders differs from the adapter's own template; "": not, or not known."""
    if not hasattr(engine, "tokenize_chat") or not own.tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": QUESTIONS[0][0]}]
    try:
        theirs: Sequence[int] = engine.tokenize_chat(messages)
    except SlimtuneError:  # an older server
        return ""
    ours = own.tokenize_chat(messages)
    if list(theirs) == ours:
        return ""
    return f"a chat becomes other tokens {_describe_other_tokens(ours, theirs, own.tokenizer)}"
