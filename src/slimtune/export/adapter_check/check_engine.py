"""Compare what serves an adapter with the adapter as it was trained, computed here: `slimtune check --at`.

The base is loaded once. The texts are those where the adapter speaks loudest: of the run's held-out rows, fixed
questions and general text, those whose next tokens it changes most. A server that scores no given text is asked for its
own answers with their log-probabilities, and these are scored here.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...core.adapters.adapter_files import WEIGHTS_FILE
from ...core.adapters.peft_config import write_adapter_config
from ...core.foundation.chat_rendering import render_chat_template
from ...core.foundation.formatting import format_bytes
from ...core.models.base_config import load_base_config
from ...core.models.loader import load_base
from ...core.training.trained_model import TrainedModel
from ...errors import AdapterError, ModelError, SlimtuneError
from ...evaluation.general_text import BUILT_IN_TEXT, read_general_text_pieces
from ...extras.mlx_adapter import is_mlx_adapter
from ...generation.http_engines import KEY_VARIABLE, AnsweringClient, HttpEngine, open_http_engine
from ...generation.inference_engines import (
    InferenceEngine,
    InProcessLlamaCppEngine,
    LlamaServerClient,
    TransformersInferenceEngine,
)
from ...generation.mlx_engine import MlxEngine
from ..expected_logps import (
    QUESTIONS,
    AdapterReference,
    ReferenceText,
    judge_engine_against_adapter,
    make_fixed_and_held_out_reference_texts,
)
from ..export_results import EngineVerdict
from ..merge import load_run_for_export
from ..mlx import find_mlx_base_of_adapter, find_mlx_precision_and_tolerance
from ..served_base import read_gguf_majority_precision
from .adapter_findings import AdapterCheckResult
from .foreign_adapter import ForeignAdapter
from .key_placement import KeyPlacement

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


def check_served_adapter(
    result: AdapterCheckResult, adapter: ForeignAdapter, placement: KeyPlacement | None, place: ServedPlace,
    log: Callable[[str], None] = lambda _: None,
) -> AdapterCheckResult:  # fmt: skip
    """Return the result of the file's check with what the engine computes."""
    try:
        if result.base is None:
            raise ModelError("the base is not at hand, so nothing was computed here")
        with tempfile.TemporaryDirectory(prefix="slimtune-check-") as folder:
            loaded = _load_as_trained(adapter, placement, result.base, Path(folder), log)
        verdict, evidence = _compare(loaded, place, log)
    except AdapterError as error:  # the file itself cannot be computed with: what the file's check says
        verdict, evidence = EngineVerdict(_describe_place(place), place.precision, reason=error.message), None
    except ModelError as error:
        if result.base is not None:
            raise
        verdict, evidence = EngineVerdict(_describe_place(place), place.precision, reason=error.message), None
    return replace(result, engine=verdict, evidence=evidence, right=result.right and verdict.passed is True)


def _describe_place(place: ServedPlace) -> str:
    return place.url or str(place.gguf or place.merged or place.mlx)


def _load_as_trained(
    adapter: ForeignAdapter, placement: KeyPlacement | None, base: str, folder: Path, log: Callable[[str], None]
) -> TrainedModel:
    """Load the adapter on its base as it was trained: keys that have other names in the file are put in their place."""
    config = load_base_config(base).config
    log(f"loading the base once: about {format_bytes(_estimate_bytes(config))} of memory")
    own = adapter.config.get("base_model_name_or_path") == base
    if own and (placement is None or not placement.renamed):
        return load_run_for_export(adapter.folder)
    renamed = placement.placed if placement is not None else {}
    keys = {key: renamed.get(key, key) for key in adapter.tensors}
    save_file(
        {new: adapter.load_tensor(key) for key, new in keys.items()}, folder / WEIGHTS_FILE, adapter.metadata or None
    )
    write_adapter_config(folder, {**adapter.config, "base_model_name_or_path": str(base)})
    template = adapter.folder / "chat_template.jinja"
    if template.is_file():
        (folder / template.name).write_bytes(template.read_bytes())
    return load_run_for_export(folder)


def _estimate_bytes(config: Any) -> int:
    """Return the bytes of a base's weights in float32, roughly, from its config alone."""
    text = config.get_text_config()
    width, layers = getattr(text, "hidden_size", 0) or 0, getattr(text, "num_hidden_layers", 0) or 0
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return 4 * (layers * (4 * width * width + 3 * width * inner) + (getattr(text, "vocab_size", 0) or 0) * width)


def _compare(loaded: TrainedModel, place: ServedPlace, log: Callable[[str], None]) -> tuple[EngineVerdict, str]:
    tokenizer = loaded.base.tokenizer
    if place.url is not None:
        served = open_http_engine(
            place.url, place.name, tokenizer, key=os.environ.get(KEY_VARIABLE), timeout=place.timeout
        )
        log(f"{place.url}: {served.evidence}")
        return _judge_server(loaded, served, place), served.evidence
    reference = compute_loudest_reference(loaded)
    if place.mlx is not None:
        return _judge_mlx_folder(reference, place.mlx), "log-probabilities"
    if place.gguf is not None:
        engine: InferenceEngine = InProcessLlamaCppEngine(place.gguf, max_tokens=4 * LONGEST_TEXT)
        precision = read_gguf_majority_precision(place.gguf)
    else:
        merged = load_base(str(place.merged), dtype="float32", device="cpu")
        engine, precision = (
            TransformersInferenceEngine("merged folder", merged.model, merged.tokenizer),
            place.precision,
        )
    engine.name = _describe_place(place)
    with closing(engine):
        return judge_engine_against_adapter(reference, engine, precision), "log-probabilities"


def _judge_mlx_folder(reference: AdapterReference, folder: Path) -> EngineVerdict:
    """Compare what mlx-lm computes from a folder, a whole model or an adapter beside its base, with the adapter."""
    model = find_mlx_base_of_adapter(folder) if is_mlx_adapter(folder) else folder
    engine = MlxEngine(model, folder if model != folder else None)
    precision, tolerance = find_mlx_precision_and_tolerance(model)
    engine.name = f"mlx-lm, {folder}"
    open_base: Any = None if model == folder else MlxEngine.without_adapter
    with closing(engine):
        verdict = judge_engine_against_adapter(reference, engine, precision, tolerance, open_base)
        difference = find_template_difference(engine, reference.engine.tokenizer)
    if difference and verdict.cause == "applied":
        return replace(verdict, passed=False, cause="another-template", reason=difference)
    return verdict


def _judge_server(loaded: TrainedModel, served: HttpEngine, place: ServedPlace) -> EngineVerdict:
    """Compare a server with the trained adapter, by the best evidence that it gives."""
    engine, tokenizer, model = served.engine, loaded.base.tokenizer, loaded.model
    engine.name = _describe_place(place)
    reference = compute_loudest_reference(loaded)
    if isinstance(engine, AnsweringClient):
        prompts: list[str] = [text.prompt for text in reference.texts if text.prompt]
        prompts = prompts or [str(tokenizer.decode(reference.texts[0].prompt_and_answer_ids))]
        if served.evidence == "greedy answers":
            return _judge_answers(reference, engine, place)
        answers = engine.record_answers(prompts[:MAX_PROMPTS], ANSWER_TOKENS)
        reference = AdapterReference(model, tokenizer, [ReferenceText(prompt, ids) for prompt, ids in answers])
        if not answers:
            return EngineVerdict(engine.name, place.precision, reason="its answers are of other tokens than the base's")
    base = served.base
    verdict = judge_engine_against_adapter(
        reference, engine, place.precision, open_base=None if base is None else lambda _: base
    )  # fmt: skip
    if verdict.cause == "not-applied" and isinstance(engine, LlamaServerClient) and not engine.list_adapters():
        verdict = replace(verdict, reason=f"the server has loaded no adapter (--lora FILE); {verdict.reason}")
    difference = find_template_difference(engine, tokenizer)
    if difference and verdict.cause == "applied":
        return replace(verdict, passed=False, cause="another-template", reason=difference)
    return verdict


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
        effect=reference.effect, limit="greedy answers",
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


def find_template_difference(engine: Any, tokenizer: Any) -> str:
    """Return how a chat that the server renders differs from the adapter's own template; "": not, or not known."""
    if not hasattr(engine, "tokenize_chat") or not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": QUESTIONS[0][0]}]
    try:
        theirs: Sequence[int] = engine.tokenize_chat(messages)
    except SlimtuneError:  # an older server
        return ""
    text = render_chat_template(tokenizer, messages, None, add_generation_prompt=True)
    ours = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(theirs) == ours:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [tokenizer.decode(list(ids[at : at + 8])) for ids in (theirs, ours)]
    return f"a chat becomes other tokens from token {at}: {shown[0]!r} there, {shown[1]!r} by the adapter's template"
