"""Answers from llama.cpp: its own server in this process (the package xllamacpp), over GGUF files of base and adapters.

    waiting   →   a slot of the server, whose stream a thread reads   →   finished

Prompts are sent as token ids, so that a conversation becomes the tokens that it was trained with. llama.cpp adds one
adapter at a time: its first busy slot decides which, and slots with another adapter would wait as long as requests for
the first one arrive. So answers begin in the order of their requests, and one with another adapter begins when those
that run have ended.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..core.adapters.active_adapters import BASE_ROW
from ..core.adapters.peft_config import PeftConfig
from ..core.foundation.files import translate_os_errors
from ..core.models.base_config import load_convertible_base_config
from ..core.training.run_dir import RunDir, find_adapter_folder
from ..errors import AdapterError, RunError, SlimtuneError, UsageError
from ..export.adapter_file_check import require_trained_adapter_in_gguf
from ..export.export_results import EngineVerdict
from ..export.exporter import refuse_adapter_bound_to_quantized_base
from ..export.gguf import (
    get_lora_factors_and_scales,
    require_gguf_architecture_spec,
    write_adapter_gguf,
)
from ..export.llama_cpp_tools import resolve_gguf_precision
from ..export.merge import load_runs_for_export, take_or_write_base_gguf
from ..export.verify import ExportVerifier
from ..generation.answer_grammar import AnswerMatcher, GrammarError
from ..generation.answer_queue import (
    CLOSE_SECONDS,
    AnswerPiece,
    BaseAnswerQueue,
    GeneratedAnswer,
    ServerClosing,
    TokenLogprob,
)
from ..generation.incremental_detokenizer import INCOMPLETE
from ..generation.inference_engines import InProcessLlamaCppEngine
from ..generation.model_runner import MultiAdapterRunner
from ..generation.run_requirements import require_causal_lm_run
from ..planning.meta_model import build_adapted_meta_model
from .served_models import ServedModel, make_served_base_and_run_models

log = logging.getLogger(__name__)

STOP_REASONS = {"eos": "stop", "word": "stop", "limit": "length"}
"""The finish reason for each of llama.cpp's."""
FIXES = "--engine torch serves every method; or merge it for llama.cpp: slimtune export RUN --to gguf --merged"


class StartedLlamaCppServer(NamedTuple):
    """A server of llama.cpp, ready for answers."""

    models: list[ServedModel]  # the base first
    queue: "LlamaCppAnswerQueue"
    checks: list[EngineVerdict]  # of each run; none if they were left out
    cache_bytes: int  # keys and values of all slots


def start_llama_cpp_server(
    runs: Mapping[str, Path],
    *,
    max_batch: int,
    max_waiting: int,
    max_length: int,
    precision: str | None = None,
    verify: bool = True,
    device: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> StartedLlamaCppServer:
    """Write base and adapters as GGUF, start llama.cpp, and compare each adapter there with the trained one.

    The files are in a temporary folder that is deleted at once: llama.cpp keeps them open.

    Args:
        runs: run folders or adapter folders by name.
        max_batch, max_waiting: most answers that run and that wait.
        max_length: most tokens of a prompt and its answer.
        precision: of the base's weights: f32, f16, bf16, q8_0, or what llama.cpp's quantizer makes; None: those of the
            GGUF that the base is, or f16.
        verify: whether the adapters are compared.
        device: "cpu": without a GPU.
        progress: gets progress messages.

    Raises:
        UsageError: llama.cpp cannot add one of the adapters to the base, or the runs need different bases.
        ModelError: a package or a program of llama.cpp is missing.
        RunError: the disk is full, or llama.cpp differs from a trained adapter.
    """
    for run in runs.values():
        _require_gguf_form(run)
    precision = None if precision is None else resolve_gguf_precision(precision)
    loaded = load_runs_for_export([*runs.values()])
    model: Any = loaded[0].model
    models = make_served_base_and_run_models(runs, loaded, max_length)
    longest = max(served.max_length for served in models)
    # A value of llama.cpp's cache has two bytes.
    cache_bytes = MultiAdapterRunner(model).measure_cache() * 2 // model.dtype.itemsize * max_batch * longest
    with tempfile.TemporaryDirectory(prefix="slimtune-serve-") as temporary:
        folder = Path(temporary)
        with translate_os_errors(folder / "base.gguf", hint="set TMPDIR to a folder on another disk"):
            progress("writing base and adapters as GGUF")
            base, weights = take_or_write_base_gguf(loaded[0], folder / "base.gguf", precision)
            adapters = [folder / f"{trained.adapter_name}.gguf" for trained in loaded]
            for run, trained, file in zip(runs.values(), loaded, adapters, strict=True):
                refuse_adapter_bound_to_quantized_base(trained, run)
                write_adapter_gguf(file, model, trained.adapter_name)
                if verify:
                    require_trained_adapter_in_gguf(file, model, trained.adapter_name)
        engine = InProcessLlamaCppEngine(
            base, *adapters, max_tokens=longest, slots=max_batch, cache="f16", gpu_layers=0 if device == "cpu" else 999
        )
        try:
            checks = []
            for index, ((name, run), trained) in enumerate(zip(runs.items(), loaded, strict=True) if verify else ()):
                model.set_adapter(trained.adapter_name, inference_mode=True)
                verifier = ExportVerifier(trained, run, folder, log=progress)
                open_adapter, open_base = partial(engine.with_adapter, index), InProcessLlamaCppEngine.without_adapter
                check = verifier.verify_engine(f"llama.cpp, {name}", weights, open_adapter, None, open_base)
                check = verifier.note_quantized_base(check)
                if check.passed is False:
                    hint = "--precision f32 or q8_0, or --engine torch"
                    raise RunError(f"llama.cpp differs from the adapter of {run}: {check.reason}", check.limit, hint)
                checks.append(check)
        except BaseException:
            engine.close()
            raise
    engines = {BASE_ROW: engine.with_adapter(None)}
    engines |= {trained.adapter_name: engine.with_adapter(index) for index, trained in enumerate(loaded)}
    queue = LlamaCppAnswerQueue(engines, max_batch=max_batch, max_waiting=max_waiting)
    return StartedLlamaCppServer(models, queue, checks, cache_bytes)


def _require_gguf_form(run: Path) -> None:
    """Raise UsageError unless llama.cpp can add a run's adapter to its base; no weight is loaded."""
    require_causal_lm_run(run)
    folder = find_adapter_folder(run)
    config, revision = PeftConfig.from_pretrained(folder), None
    name = config.base_model_name_or_path
    if folder != run:
        settings = RunDir.open(run).load_recipe().model
        name, revision = settings.name, settings.revision
    if not name:
        raise AdapterError(
            f"{folder} does not name its base", "base_model_name_or_path in adapter_config.json", code="wrong-base"
        )
    base = load_convertible_base_config(name, revision=revision)
    config.base_model_name_or_path = None  # the meta model has another name than the base
    try:
        require_gguf_architecture_spec(base)
        get_lora_factors_and_scales(build_adapted_meta_model(base, config, torch.float32))
    except UsageError as error:
        raise UsageError(f"llama.cpp cannot serve {run}: {error.message}", error.expected, FIXES) from error


class LlamaCppAnswerQueue(BaseAnswerQueue):
    """Generates answers by a server of llama.cpp, a thread for each that runs.

    Args:
        engines: the server as it answers with each adapter, by the adapter's name.
        max_batch: slots of the server.
        max_waiting: most answers that wait.
    """

    masks_tokens = False  # llama.cpp does, by the same library; a matcher of bytes checks it
    scores_prompts = False

    def __init__(self, engines: Mapping[str, InProcessLlamaCppEngine], *, max_batch: int, max_waiting: int) -> None:
        super().__init__(max_batch, max_waiting)
        self._engines = dict(engines)
        self._running: dict[GeneratedAnswer, int] = {}  # tokens that llama.cpp computes until its next event
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(max_batch)]
        for thread in self._threads:
            thread.start()

    def count(self) -> dict[str, int]:
        waiting, running = len(self._waiting), [*self._running]
        tokens = sum(len(answer.prompt_ids) + answer.num_tokens for answer in running)
        return {"running": len(running), "waiting": waiting, "cached_tokens": tokens}

    def close(self) -> bool:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        end = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
        for answer in [*self._waiting, *self._running]:
            if not answer.is_ended:
                answer.add_piece(AnswerPiece(error=ServerClosing("the server is shutting down")))
        self._waiting.clear()
        if any(thread.is_alive() for thread in self._threads):
            return False  # a server that hangs does not end
        while self._engines:  # they share the server
            self._engines.popitem()[1].close()
        return True

    def _run(self) -> None:
        try:
            while (answer := self._wait_for_answer()) is not None:
                try:
                    self._generate(answer)
                except Exception as error:
                    if not answer.end_if_dropped():
                        if not isinstance(error, SlimtuneError):
                            log.exception("llama.cpp failed", exc_info=error)
                        answer.add_piece(AnswerPiece(error=error))
                with self._changed:
                    del self._running[answer]
                    if not self._running:
                        self.hang_detector.stop()
                    self._changed.notify_all()
        except BaseException as error:
            self._end_all([*self._running], error)

    def _wait_for_answer(self) -> GeneratedAnswer | None:
        """Return the next answer that may begin; None: the queue is closed."""
        while True:
            self._drop_unwanted_waiting()
            with self._changed:
                if (answer := self._take()) is not None or self._is_closed:
                    return answer
                self._changed.wait(1)  # answers that wait can be too late

    def _take(self) -> GeneratedAnswer | None:
        """Return the next answer to generate, if it may begin."""
        adapters = {answer.model.adapter_or_base for answer in self._running}
        if self._is_closed or not self._waiting or adapters - {self._waiting[0].model.adapter_or_base}:
            return None
        answer = self._waiting.popleft()
        count = len(answer.prompt_ids)
        if self._running:
            self.hang_detector.add_tokens(count)
        else:
            self.hang_detector.start(count)
        self._running[answer] = count
        return answer

    def _note_event(self, answer: GeneratedAnswer) -> None:
        """Begin the next step of llama.cpp, which gives every answer a token, or begins it."""
        with self._changed:
            self._running[answer] = 1
            self.hang_detector.finish()
            self.hang_detector.start(sum(self._running.values()))

    def _generate(self, answer: GeneratedAnswer) -> None:
        params, logprobs = answer.params, answer.params.top_logprobs
        settings: dict[str, Any] = {
            "n_predict": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "samplers": ["temperature", "top_p"],
            "seed": params.seed % (2**32 - 1),  # the last one means a random seed
            "n_probs": 0 if logprobs is None else max(1, logprobs),
        }
        if params.grammar is not None:
            settings["grammar"] = f"%llguidance {{}}\n{params.grammar.lark}"
        timeout = min(max(answer.deadline - time.monotonic(), 1), 3600)
        reported, reason = 0, None
        with closing(
            self._engines[answer.model.adapter_or_base].stream(answer.prompt_ids, timeout=timeout, **settings)
        ) as events:
            for event in events:
                self._note_event(answer)
                if self._is_closed:
                    raise ServerClosing("the server is shutting down")
                if answer.end_if_dropped():
                    return
                if event["stop"]:
                    reason = STOP_REASONS.get(event["stop_type"], "stop")
                elif answer.model.end_tokens.intersection(event["tokens"]):
                    reason = "stop"
                new = event["tokens_predicted"] - answer.num_tokens
                answer.num_tokens += new
                entries = [_read_logprob(entry, logprobs or 0) for entry in event.get("completion_probabilities", ())]
                reported += len(entries)
                if logprobs is not None and reported < answer.num_tokens:
                    raise RunError(
                        "llama.cpp gives no log-probability of a token that ends inside a character, and this answer "
                        "has one", hint="ask without log-probabilities, or serve with --engine torch",
                    )  # fmt: skip
                if answer.matcher is not None:
                    reason = _follow_grammar(answer.matcher, event["content"], reason)
                text = answer.stream.add_text(event["content"], last=reason is not None)
                if answer.stream.is_stopped:
                    reason = "stop"
                with self._changed:
                    self.generated_tokens += new
                    self.finished += reason is not None
                answer.add_piece(AnswerPiece(text, tuple(event["tokens"]), tuple(entries), reason))
                if reason is not None:
                    return
        raise RunError("llama.cpp ended an answer without saying why")


def _follow_grammar(matcher: AnswerMatcher, text: str, reason: str | None) -> str | None:
    """Return why a bound answer ends with this text, if it does; raise GrammarError if it leaves the grammar.

    llama.cpp goes on without a grammar that its llguidance, an older one, cannot read, or that takes it too much.
    """
    try:
        matcher.accept_text(text.rstrip(INCOMPLETE) if reason == "length" else text)
    except GrammarError as error:
        raise GrammarError("llama.cpp did not follow the grammar", "a simpler one, or --engine torch") from error
    if reason == "stop" and not matcher.can_end:
        raise GrammarError("llama.cpp ended the answer before it was complete", "a simpler one, or --engine torch")
    return "stop" if matcher.must_end else reason


def _read_logprob(entry: Mapping[str, Any], count: int) -> TokenLogprob:
    """Return a token's log-probability and its likeliest tokens as llama.cpp reports them."""

    def bound(value: float) -> float:
        return max(value, -9999.0)  # JSON has no -Inf

    top: Sequence[Mapping[str, Any]] = entry["top_logprobs"][:count]
    return TokenLogprob(entry["id"], bound(entry["logprob"]), [(each["id"], bound(each["logprob"])) for each in top])
