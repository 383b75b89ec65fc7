"""How fast a run answers here: the base, the adapter beside it, and both merged, in each engine that is installed."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..core.adapters.active_adapters import BASE_ROW
from ..core.adapters.peft_model import get_peft_model
from ..core.foundation.dtype_names import dtype_name
from ..core.training.trained_model import TrainedModel
from ..errors import SlimtuneError
from ..generation.answer_queue import GeneratedAnswer, SamplingParams
from ..generation.generation_models import GenerationModel, make_generation_model
from ..generation.inference_engines import InProcessLlamaCppEngine
from ..generation.multi_run_loading import load_trained_models_sharing_base
from ..generation.run_requirements import require_causal_lm_run
from ..generation.text_generator import TextGenerator
from ..methods.lora import LoraConfig
from .exporter import refuse_adapter_bound_to_quantized_base
from .gguf import PRECISIONS, write_adapter_gguf
from .merge import load_runs_for_export, write_base_gguf, write_merged_gguf
from .served_base import read_gguf_majority_precision

PROMPT_TOKENS, NEW_TOKENS = 256, 64
ROUNDS = 3
"""Measured one after the other; the median counts. One before them warms up."""
TOKEN = 7
"""What prompts are made of: speed does not depend on the tokens."""

Way = Literal["base", "adapter", "merged"]


@dataclass(frozen=True)
class AnswerSpeed:
    """How fast one engine answers in one way, one request at a time."""

    engine: str
    """slimtune or llama.cpp."""
    precision: str
    """Of the base's weights, or of the merged ones."""
    way: Way
    """The base alone, with the adapter beside it, or with the adapter merged."""
    prefill_tokens_per_second: float
    """Of a prompt that is read."""
    decode_tokens_per_second: float
    """Written after it."""


@dataclass(frozen=True)
class NotMeasured:
    """What could not be measured."""

    engine: str
    """slimtune or llama.cpp."""
    way: Way
    """The base alone, with the adapter beside it, or with the adapter merged."""
    reason: str
    """Why, in one sentence."""


@dataclass(frozen=True)
class RunSpeedResult:
    """What `bench RUN --json` prints."""

    run: Path
    """The run, or its adapter's folder."""
    model: str
    """The base."""
    device: str
    """Where slimtune computes."""
    prompt_tokens: int
    """Of a request."""
    new_tokens: int
    """Of an answer."""
    speeds: list[AnswerSpeed]
    """What was measured."""
    not_measured: list[NotMeasured]
    """What was not, and why."""


def measure_run_speed(
    run: Path, *, device: str | None = None, precision: str | None = None, progress: Callable[[str], None]
) -> RunSpeedResult:
    """Return how fast a run answers in each engine that is installed here.

    Args:
        run: run folder or adapter folder.
        device: of slimtune's own engine; "cpu": llama.cpp uses no GPU, either.
        precision: of the weights in llama.cpp; None: those of the GGUF that the base is (merged: q8_0 in place of
            fewer bits, in which a merge loses what was learned), or f16.
        progress: gets progress messages.

    Raises:
        UsageError: the run has another task than writing text.
        SlimtuneError: as for loading a run.
    """
    require_causal_lm_run(run)
    speeds: list[AnswerSpeed] = []
    missing: list[NotMeasured] = []
    (trained,) = load_trained_models_sharing_base([run], device=device)
    model, where = trained.base.source.name, str(trained.base.device)
    prompt = _count_prompt_tokens(trained)
    for engine, measured in (
        ("slimtune", _measure_slimtune(trained, prompt)),
        ("llama.cpp", _measure_llama_cpp(run, prompt, precision, use_gpu=device != "cpu")),
    ):
        way: Way = "base"
        progress(f"{engine}: the base, the adapter beside it, both merged")
        for way, found in measured:
            if isinstance(found, SlimtuneError):
                missing.append(NotMeasured(engine, way, f"{found.message}{'; ' * bool(found.hint)}{found.hint}"))
            else:
                speeds.append(replace(found, engine=engine, way=way))
    return RunSpeedResult(run, model, where, prompt, NEW_TOKENS, speeds, missing)


def _count_prompt_tokens(trained: TrainedModel) -> int:
    """Return the tokens of a prompt that has room for its answer in the base's context."""
    longest = make_generation_model(trained.model, trained.base.tokenizer, BASE_ROW).max_length
    return max(1, min(PROMPT_TOKENS, (longest or 1 << 20) - NEW_TOKENS - 1))


Measured = Iterator[tuple[Way, AnswerSpeed | SlimtuneError]]


def _make_speed(precision: str, rounds: list[tuple[float, float]]) -> AnswerSpeed:
    """Return the median speed of rounds; each has the seconds of a prompt's token and of a written one."""
    prefill, decode = (1 / statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return AnswerSpeed("", precision, "base", prefill, decode)


# --- slimtune's own generator -----------------------------------------------------------------------------------------


def _measure_slimtune(trained: TrainedModel, prompt: int) -> Measured:
    """Yield the speeds of `slimtune chat` and `serve`; at the end the model is merged."""
    model, tokenizer = trained.model, trained.base.tokenizer
    precision = trained.base.quantization or dtype_name(trained.base.dtype)
    ways: tuple[tuple[Way, str], ...] = (("base", BASE_ROW), ("adapter", trained.adapter_name))
    for way, row in ways:
        yield way, _make_speed(precision, _time_generator(make_generation_model(model, tokenizer, row), model, prompt))
    try:
        # The generator runs adapted models: one with an adapter that no row has is the merged model.
        target = next(iter(trained.model.adapted_layers()))
        plain: Any = trained.model.merge_and_unload(safe_merge=True)
        model = get_peft_model(plain, LoraConfig(r=1, target_modules=[target.rpartition(".")[2]])).eval()
        rounds = _time_generator(make_generation_model(model, tokenizer, BASE_ROW), model, prompt)
    except SlimtuneError as error:
        yield "merged", error
    else:
        yield "merged", _make_speed(precision, rounds)


def _time_generator(answering: GenerationModel, model: Any, prompt: int) -> list[tuple[float, float]]:
    """Return the seconds of a prompt's token and of a written one, of each round."""
    endless = replace(answering, end_tokens=frozenset())
    generator, rounds = TextGenerator(model, max_batch=1), []
    for _ in range(1 + ROUNDS):
        answer = GeneratedAnswer(endless, [TOKEN] * prompt, SamplingParams(max_new_tokens=NEW_TOKENS))
        started = time.perf_counter()
        ends = [time.perf_counter() for _ in generator.stream([answer])]
        rounds.append(((ends[0] - started) / prompt, (ends[-1] - ends[0]) / (len(ends) - 1)))
    return rounds[1:]


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _measure_llama_cpp(run: Path, prompt: int, asked: str | None, *, use_gpu: bool) -> Measured:
    """Yield the speeds in llama.cpp, over files that are deleted again."""
    with tempfile.TemporaryDirectory(prefix="slimtune-bench-") as temporary:
        base, adapter, merged = (Path(temporary, f"{name}.gguf") for name in ("base", "adapter", "merged"))
        way: Way = "base"
        try:
            (trained,) = load_runs_for_export([run])
            source, precision = Path(trained.base.source.path), asked or "f16"
            if asked is None and trained.base.source.kind == "gguf":
                base, precision = source, read_gguf_majority_precision(source)
            else:
                write_base_gguf(trained, base, precision)
            yield way, _make_speed(precision, _time_llama_cpp(base, None, prompt, use_gpu=use_gpu))
            way = "adapter"
            refuse_adapter_bound_to_quantized_base(trained, run)
            write_adapter_gguf(adapter, trained.model, trained.adapter_name)
            yield way, _make_speed(precision, _time_llama_cpp(base, adapter, prompt, use_gpu=use_gpu))
        except SlimtuneError as error:
            yield way, error
            if way == "base":  # nothing runs there
                return
        try:
            precision = precision if asked or precision in PRECISIONS else "q8_0"
            write_merged_gguf(trained, run, merged, precision)
            yield "merged", _make_speed(precision, _time_llama_cpp(merged, None, prompt, use_gpu=use_gpu))
        except SlimtuneError as error:
            yield "merged", error


def _time_llama_cpp(model: Path, adapter: Path | None, prompt: int, *, use_gpu: bool) -> list[tuple[float, float]]:
    """Return the seconds of a prompt's token and of a written one, of each round."""
    engine = InProcessLlamaCppEngine(
        model, adapter, max_tokens=prompt + NEW_TOKENS + 1, cache="f16", gpu_layers=999 if use_gpu else 0
    )
    with closing(engine):
        return [engine.measure_seconds(prompt, NEW_TOKENS) for _ in range(1 + ROUNDS)][1:]
