"""What serves an adapter, compared with it: a server, a GGUF, a merged folder, or a folder of MLX.

The texts of `slimtune check` are those where the adapter speaks loudest: of the run's held-out rows, fixed questions
and general text, those whose next tokens it changes most. A server that scores no given text is asked for its own
answers with their log-probabilities, and these are scored here.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.training.trained_model import TrainedModel
from ..evaluation.general_text import BUILT_IN_TEXT, read_general_text_pieces
from ..extras.mlx_adapter import is_mlx_adapter
from ..generation import http_engines as http
from ..generation.inference_engines import LlamaServerClient
from ..generation.mlx_engine import MlxEngine
from .engine_diagnosis import CAUSES_IN_ADAPTER
from .expected_logps import (
    AdapterReference,
    EngineTolerance,
    ReferenceText,
    judge_engine_against_adapter,
    make_fixed_and_held_out_reference_texts,
)
from .export_results import EngineVerdict
from .mlx import find_mlx_base_of_adapter, find_mlx_precision_and_tolerance, open_mlx_base_like
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
    if place.url is not None:
        return _verify_server(verifier, place, tolerance)
    open_engine: Any
    precision, open_base = place.precision, None
    if place.gguf is not None:
        open_engine = partial(verifier.open_llama_cpp, place.gguf)
        precision = read_gguf_majority_precision(place.gguf)
    elif place.merged is not None:
        open_engine = partial(verifier.open_merged, place.merged)
    else:
        assert place.mlx is not None
        model = find_mlx_base_of_adapter(place.mlx) if is_mlx_adapter(place.mlx) else place.mlx
        open_engine = partial(MlxEngine, model, place.mlx if model != place.mlx else None)
        precision, tolerance = find_mlx_precision_and_tolerance(model)
        open_base = MlxEngine.without_adapter if model != place.mlx else lambda _: open_mlx_base_like(verifier, model)
    return verifier.verify_engine(str(place), precision, open_engine, tolerance, open_base, are_chats_compared=True)


def _verify_server(verifier: "ExportVerifier", place: ServedPlace, tolerance: EngineTolerance | None) -> EngineVerdict:
    """Compare a server with the trained adapter, by the best evidence that it gives."""
    reference, tokenizer = verifier.reference, verifier.loaded.base.tokenizer
    key = os.environ.get(http.KEY_VARIABLE)
    served = http.open_http_engine(str(place.url), place.name, tokenizer, key=key, timeout=place.timeout)
    verifier.log(f"{place.url}: {served.evidence}")
    engine, base = served.engine, served.base
    engine.name = str(place.url)
    with http.explaining_status(engine.name):
        if isinstance(engine, http.AnsweringClient):
            verdict = _verify_answers(verifier, engine, place, served.evidence, tolerance)
            return replace(verdict, evidence=served.evidence)
        open_base: Any = None if base is None else lambda _: base
        verdict = judge_engine_against_adapter(
            reference, engine, place.precision, tolerance, open_base, are_chats_compared=True
        )
        if verdict.cause == "not-applied" and isinstance(engine, LlamaServerClient) and not engine.list_adapters():
            verdict = replace(verdict, reason=f"the server has loaded no adapter (--lora FILE); {verdict.reason}")
    return verdict


def _verify_answers(
    verifier: "ExportVerifier", engine: http.AnsweringClient, place: ServedPlace, evidence: str, tolerance: Any
) -> EngineVerdict:
    """Compare the answers of a server with the trained adapter, by their log-probabilities, if it gives them."""
    reference, tokenizer = verifier.reference, verifier.loaded.base.tokenizer
    engine.chats = {text.prompt: text.messages for text in reference.texts if text.prompt}
    prompts: list[str] = [*engine.chats] or [str(tokenizer.decode(reference.texts[0].prompt_and_answer_ids))]
    if evidence == "greedy answers":
        verdict = _judge_answers(reference, engine, place)
    elif answers := engine.record_answers(prompts[:MAX_PROMPTS], ANSWER_TOKENS):
        texts = [ReferenceText(prompt, ids) for prompt, ids in answers]
        reference = AdapterReference(verifier.model, tokenizer, texts)
        verdict = judge_engine_against_adapter(reference, engine, place.precision, tolerance)
    else:
        verdict = EngineVerdict(engine.name, place.precision, reason="its answers are of other tokens than the base's")
    if verdict.cause == "not-applied" and os.path.isabs(engine.model):
        hint = f"mlx_lm.server applies --adapter-path under one name alone: --name {http.MLX_ADAPTED_NAME}"
        verdict = replace(verdict, reason=f"{verdict.reason}; {hint}")
    other = engine.describe_prompt_lengths()
    if other and verdict.passed is not True and verdict.cause not in CAUSES_IN_ADAPTER:
        return replace(verdict, cause="another-template", reason=f"{other}; {verdict.reason}")
    return verdict


def _judge_answers(reference: AdapterReference, engine: http.AnsweringClient, place: ServedPlace) -> EngineVerdict:
    """Compare greedy answers alone, which is weaker: many faults change no word."""
    prompts = reference.prompts[:MAX_PROMPTS]

    def answer(asked: Any) -> list[list[int]]:
        return [asked.generate(prompt, ANSWER_TOKENS) for prompt in prompts]

    theirs, ours = answer(engine), answer(reference.engine)
    with reference.engine.model.disable_adapter():
        of_base = answer(reference.engine)
    telling = [each for each in zip(theirs, ours, of_base, strict=True) if each[1] != each[2]]
    as_tuned, as_base = (sum(each[0] == each[i] for each in telling) for i in (1, 2))
    verdict = EngineVerdict(
        engine.name, place.precision, prompts=len(prompts), answers=len(telling), answers_equal=as_tuned,
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
    cut = ((text, text.prompt_and_answer_ids[:LONGEST_TEXT]) for text in candidates)
    candidates = [replace(text, prompt_and_answer_ids=ids) for text, ids in cut if len(ids) > 1]
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
