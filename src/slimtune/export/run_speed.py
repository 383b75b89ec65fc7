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
from .gguf import write_adapter_gguf
from .llama_cpp_tools import PRECISIONS
from .merge import load_runs_for_export, take_or_write_base_gguf, write_merged_gguf

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
    (trained,) = load_trained_models_sharing_base([run], device=device)
    model, where, prompt = trained.base.source.name, str(trained.base.device), _count_prompt_tokens(trained)
    progress("slimtune: the base, the adapter beside it, both merged")
    found = list(_measure_slimtune(trained, prompt))
    progress("llama.cpp: the base, the adapter beside it, both merged")
    found += _measure_llama_cpp(run, prompt, precision, use_gpu=device != "cpu")
    speeds = [each for each in found if isinstance(each, AnswerSpeed)]
    missing = [each for each in found if isinstance(each, NotMeasured)]
    return RunSpeedResult(run, model, where, prompt, NEW_TOKENS, speeds, missing)


def _count_prompt_tokens(trained: TrainedModel) -> int:
    """Return the tokens of a prompt that has room for its answer in the base's context."""
    longest = make_generation_model(trained.model, trained.base.tokenizer, BASE_ROW).max_length
    return max(1, min(PROMPT_TOKENS, (longest or 1 << 20) - NEW_TOKENS - 1))


Rounds = list[tuple[float, float]]
"""Of each round the seconds of a prompt's token and of a written one."""


def _make_speed(engine: str, precision: str, way: Way, rounds: Rounds) -> AnswerSpeed:
    """Return the median speed of rounds."""
    prefill, decode = (1 / statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return AnswerSpeed(engine, precision, way, prefill, decode)


def _explain_missing(engine: str, way: Way, error: SlimtuneError) -> NotMeasured:
    """Return why a way was not measured."""
    return NotMeasured(engine, way, f"{error.message}{'; ' * bool(error.hint)}{error.hint}")


# --- slimtune's own generator -----------------------------------------------------------------------------------------


def _measure_slimtune(trained: TrainedModel, prompt: int) -> Iterator[AnswerSpeed | NotMeasured]:
    """Yield the speeds of `slimtune chat` and `serve`; at the end the model is merged."""
    model, tokenizer = trained.model, trained.base.tokenizer
    precision = trained.base.quantization or dtype_name(trained.base.dtype)
    ways: tuple[tuple[Way, str], ...] = (("base", BASE_ROW), ("adapter", trained.adapter_name))
    for way, row in ways:
        rounds = _time_generator(make_generation_model(model, tokenizer, row), model, prompt)
        yield _make_speed("slimtune", precision, way, rounds)
    try:
        # The generator runs adapted models: one with an adapter that no row has is the merged model.
        target = next(iter(trained.model.adapted_layers()))
        plain: Any = trained.model.merge_and_unload(safe_merge=True)
        model = get_peft_model(plain, LoraConfig(r=1, target_modules=[target.rpartition(".")[2]])).eval()
        rounds = _time_generator(make_generation_model(model, tokenizer, BASE_ROW), model, prompt)
    except SlimtuneError as error:
        yield _explain_missing("slimtune", "merged", error)
    else:
        yield _make_speed("slimtune", precision, "merged", rounds)


def _time_generator(answering: GenerationModel, model: Any, prompt: int) -> Rounds:
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


def _measure_llama_cpp(
    run: Path, prompt: int, asked: str | None, *, use_gpu: bool
) -> Iterator[AnswerSpeed | NotMeasured]:
    """Yield the speeds in llama.cpp, over files that are deleted again."""

    def measure(way: Way, precision: str, model: Path, adapter: Path | None = None) -> AnswerSpeed:
        return _make_speed("llama.cpp", precision, way, _time_llama_cpp(model, adapter, prompt, use_gpu=use_gpu))

    with tempfile.TemporaryDirectory(prefix="slimtune-bench-") as temporary:
        written, adapter, merged = (Path(temporary, f"{name}.gguf") for name in ("base", "adapter", "merged"))
        way: Way = "base"
        try:
            (trained,) = load_runs_for_export([run])
            base, precision = take_or_write_base_gguf(trained, written, asked)
            yield measure(way, precision, base)
            way = "adapter"
            refuse_adapter_bound_to_quantized_base(trained, run)
            write_adapter_gguf(adapter, trained.model, trained.adapter_name)
            yield measure(way, precision, base, adapter)
        except SlimtuneError as error:
            yield _explain_missing("llama.cpp", way, error)
            if way == "base":  # nothing runs there
                return
        try:
            precision = precision if asked or precision in PRECISIONS else "q8_0"
            write_merged_gguf(trained, run, merged, precision)
            yield measure("merged", precision, merged)
        except SlimtuneError as error:
            yield _explain_missing("llama.cpp", "merged", error)


def _time_llama_cpp(model: Path, adapter: Path | None, prompt: int, *, use_gpu: bool) -> Rounds:
    """Return the seconds of a prompt's token and of a written one, of each round."""
    engine = InProcessLlamaCppEngine(
        model, adapter, max_tokens=prompt + NEW_TOKENS + 1, cache="f16", gpu_layers=999 if use_gpu else 0
    )
    with closing(engine):
        return [engine.measure_seconds(prompt, NEW_TOKENS) for _ in range(1 + ROUNDS)][1:]
