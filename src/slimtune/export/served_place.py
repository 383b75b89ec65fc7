"""What serves an adapter, compared with it: a server, a GGUF, a merged folder, or a folder of MLX.

The texts of `slimtune check` are those where the adapter speaks loudest: of the run's held-out rows, fixed questions
and general text, those whose next tokens it changes most. A server that scores no given text is asked for its own
answers with their log-probabilities, and these are scored here.
"""

import os
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.training.trained_model import TrainedModel
from ..evaluation.general_text import BUILT_IN_TEXT, read_general_text_pieces
from ..extras.mlx_adapter import is_mlx_adapter
from ..generation.http_engines import KEY_VARIABLE, AnsweringClient, open_http_engine
from ..generation.inference_engines import LlamaServerClient
from ..generation.mlx_engine import MlxEngine
from .expected_logps import (
    AdapterReference,
    EngineTolerance,
    ReferenceText,
    judge_engine_against_adapter,
    make_fixed_and_held_out_reference_texts,
)
from .export_results import EngineVerdict
from .mlx import find_mlx_base_of_adapter, find_mlx_precision_and_tolerance
from .served_base import read_gguf_majority_precision

if TYPE_CHECKING:
    from .verify import ExportVerifier

POSITIONS, LONGEST_TEXT, ANSWER_TOKENS, MAX_PROMPTS = 120, 64, 16, 6
"""Next tokens compared in all, tokens of one text, tokens of an answer that is asked for, and prompts for these."""


@dataclass(frozen=True)
class ServedPlace:
    """What serves the adapter; one of URL, GGUF, merged folder and MLX folder is given."""

    url: str | None = None
    gguf: Path | None = None  # a whole model with the adapter merged in
    merged: Path | None = None  # a folder with a merged checkpoint
    name: str | None = None  # of the adapter, at the URL
    timeout: float = 60.0  # seconds an answer at the URL may take
    precision: str = "f16"  # of the weights that serve, at the URL
    mlx: Path | None = None  # a folder of MLX: a whole model, or an adapter of mlx-lm

    def __str__(self) -> str:
        return self.url or str(self.gguf or self.merged or self.mlx)


def verify_place(
    verifier: "ExportVerifier", place: ServedPlace, tolerance: EngineTolerance | None = None
) -> EngineVerdict:
    """Compare what serves an adapter with it; `tolerance` is that of the precision by default.

    Raises:
        UsageError, ModelError, RunError: it cannot be asked.
    """
    reference, precision = verifier.reference, place.precision
    open_base: Any = None
    if place.url is not None:
        return _verify_server(verifier, place, tolerance)
    if place.gguf is not None:
        engine: Any = verifier.open_llama_cpp(place.gguf)
        precision = read_gguf_majority_precision(place.gguf)
    elif place.merged is not None:
        engine = verifier.open_merged(place.merged)
    else:
        assert place.mlx is not None
        model = find_mlx_base_of_adapter(place.mlx) if is_mlx_adapter(place.mlx) else place.mlx
        engine = MlxEngine(model, place.mlx if model != place.mlx else None)
        precision, tolerance = find_mlx_precision_and_tolerance(model)
        open_base = MlxEngine.without_adapter if model != place.mlx else None
    engine.name = str(place)
    with closing(engine):
        return judge_engine_against_adapter(
            reference, engine, precision, tolerance, open_base, are_chats_compared=True
        )  # fmt: skip


def _verify_server(verifier: "ExportVerifier", place: ServedPlace, tolerance: EngineTolerance | None) -> EngineVerdict:
    """Compare a server with the trained adapter, by the best evidence that it gives."""
    reference, tokenizer = verifier.reference, verifier.loaded.base.tokenizer
    served = open_http_engine(
        str(place.url), place.name, tokenizer, key=os.environ.get(KEY_VARIABLE), timeout=place.timeout
    )
    verifier.log(f"{place.url}: {served.evidence}")
    engine = served.engine
    engine.name = str(place.url)
    if isinstance(engine, AnsweringClient):
        prompts: list[str] = [text.prompt for text in reference.texts if text.prompt]
        prompts = prompts or [str(tokenizer.decode(reference.texts[0].prompt_and_answer_ids))]
        if served.evidence == "greedy answers":
            return _judge_answers(reference, engine, place)
        answers = engine.record_answers(prompts[:MAX_PROMPTS], ANSWER_TOKENS)
        if not answers:
            return EngineVerdict(engine.name, place.precision, reason="its answers are of other tokens than the base's")
        texts = [ReferenceText(prompt, ids) for prompt, ids in answers]
        reference = AdapterReference(verifier.model, tokenizer, texts)
    base = served.base
    verdict = judge_engine_against_adapter(
        reference, engine, place.precision, tolerance, None if base is None else lambda _: base, are_chats_compared=True
    )  # fmt: skip
    if verdict.cause == "not-applied" and isinstance(engine, LlamaServerClient) and not engine.list_adapters():
        verdict = replace(verdict, reason=f"the server has loaded no adapter (--lora FILE); {verdict.reason}")
    return replace(verdict, evidence=served.evidence)


def _judge_answers(reference: AdapterReference, engine: AnsweringClient, place: ServedPlace) -> EngineVerdict:
    """Compare greedy answers alone, which is weaker: many faults change no word."""
    ids = reference.prompts[:MAX_PROMPTS]
    theirs = [engine.generate(prompt, ANSWER_TOKENS) for prompt in ids]
    ours = [reference.engine.generate(prompt, ANSWER_TOKENS) for prompt in ids]
    with reference.engine.model.disable_adapter():
        of_base = [reference.engine.generate(prompt, ANSWER_TOKENS) for prompt in ids]
    telling = [i for i in range(len(ids)) if ours[i] != of_base[i]]
    as_tuned, as_base = (sum(theirs[i] == other[i] for i in telling) for other in (ours, of_base))
    verdict = EngineVerdict(
        engine.name, place.precision, prompts=len(ids), answers=len(telling), answers_equal=as_tuned,
        effect=reference.effect, limit="greedy answers", evidence="greedy answers",
    )  # fmt: skip
    said = f"of {len(telling)} answers that the adapter changes, {as_tuned} are the adapter's and {as_base} the base's"
    if telling and as_base == len(telling):
        return replace(verdict, passed=False, cause="not-applied", reason=said)
    weak = "it gives no log-probabilities, and equal words do not prove the right strength"
    return replace(verdict, cause="not-proven", reason=f"{said}; {weak}")


def compute_loudest_reference(loaded: TrainedModel) -> AdapterReference:
    """Return the adapter on the texts whose next tokens the adapter changes most, about `POSITIONS` tokens in all."""
    tokenizer, model = loaded.base.tokenizer, loaded.model
    candidates = make_fixed_and_held_out_reference_texts(tokenizer, loaded.recipe, model.config)
    for piece in read_general_text_pieces(BUILT_IN_TEXT)[:8]:
        if isinstance(piece.content, str):
            ids = tokenizer(piece.content[:400], add_special_tokens=False)["input_ids"]
            candidates.append(ReferenceText("", ids))
    candidates = [replace(t, prompt_and_answer_ids=t.prompt_and_answer_ids[:LONGEST_TEXT]) for t in candidates]
    candidates = [text for text in candidates if len(text.prompt_and_answer_ids) > 1]
    reference = AdapterReference(model, tokenizer, candidates)
    pairs = zip(reference.log_probs, reference.base_log_probs, strict=True)
    loudness = [(tuned - base).abs().mean().item() for tuned, base in pairs]
    chosen: list[int] = []
    for index in sorted(range(len(candidates)), key=lambda i: -loudness[i]):
        if sum(len(candidates[i].prompt_and_answer_ids) - 1 for i in chosen) < POSITIONS:
            chosen.append(index)
    # A prompt is needed for what a server renders and answers.
    prompted = [i for i, text in enumerate(candidates) if text.prompt]
    return reference.select(chosen if {*chosen} & {*prompted} else [*chosen, *prompted[:1]])
