"""Engines that can say how likely a text is: transformers, llama.cpp (which Ollama runs, too) and vLLM."""

import copy
import gc
import importlib.util
import math
import os
import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..core.foundation.chat_rendering import render_chat_template
from ..core.foundation.json_results import JsonObject
from ..errors import ModelError, RunError, SlimtuneError, UsageError, format_install_command, format_names, suggest
from .json_client import JsonClient

TOP_K, VLLM_TOP_K = 64, 20
"""How many of the likeliest tokens `score` gives; vLLM gives more than 20 only with a larger --max-logprobs."""
VLLM_LIKE_SERVER = "server with vLLM's API"
"""What messages call vLLM and `slimtune serve`, which answer alike."""


@dataclass(frozen=True)
class TextTokenScores:
    """What an engine gives for the tokens of one text except the first, each given those before it."""

    token_log_probs: Tensor  # natural log-probability of the token that follows `(n - 1,)`, float64
    top_ids: Tensor  # ids of the likeliest tokens at each position `(n - 1, k)`
    top_log_probs: Tensor  # their log-probabilities `(n - 1, k)`, float64


def _make_scores(positions: list[tuple[float, list[tuple[int, float]]]]) -> TextTokenScores:
    """Make tensors of each position's log-probability and its likeliest tokens with theirs."""
    own, top = zip(*positions, strict=True)
    ids, values = ([[pair[i] for pair in each] for each in top] for i in (0, 1))
    return TextTokenScores(
        torch.tensor(own, dtype=torch.float64), torch.tensor(ids), torch.tensor(values, dtype=torch.float64)
    )


@contextmanager
def _translate_answer_errors(server: str) -> Iterator[None]:
    """Raise ModelError for an answer of a server that has another form than the code here reads."""
    try:
        yield
    except SlimtuneError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        message = f"the {server} sends an answer that is none of its own: {type(error).__name__}: {error}"
        raise ModelError(message, f"the answers of a {server}", "look at what answers at its address") from error


def _require_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise TypeError(f"{str(value)[:80]} is no list of token ids")
    return value


class InferenceEngine(Protocol):
    """A model as an engine serves it."""

    name: str  # as tables show it: "merged folder", "llama.cpp", "vLLM"

    def tokenize(self, text: str) -> list[int]:
        """Return the engine's ids of a rendered prompt, its beginning-of-sequence token included."""

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return log-probabilities of all tokens of a text but the first."""

    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Return the log-probabilities of a text's tokens at some indices, 1 or more, ascending."""

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, without its end-of-text token."""

    def close(self) -> None:
        """Release the model."""


class TransformersInferenceEngine:
    """A model in this process, in evaluation mode: the adapted model, or a merged folder loaded back."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer

    def tokenize(self, text: str) -> list[int]:
        # The chat template wrote the beginning-of-sequence token.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a chat that the model's own template renders, ready for an answer."""
        return self.tokenize(render_chat_template(self.tokenizer, list(messages), None, add_generation_prompt=True))

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        following = torch.tensor(ids[1:])[:, None]
        own, top = [], []
        for part, log_probs in self._log_probs(ids):
            own.append(log_probs.gather(1, following[part])[:, 0])
            top.append(log_probs.topk(min(TOP_K, log_probs.shape[1])))
        return TextTokenScores(torch.cat(own), torch.cat([t.indices for t in top]), torch.cat([t.values for t in top]))

    @torch.no_grad()
    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Tensor:
        tokens, places = torch.tensor(ids), torch.tensor(indices)
        logits = self.model(input_ids=tokens[None].to(self.model.device), use_cache=False).logits[0]
        log_probs = logits[places.to(logits.device) - 1].double().log_softmax(-1).cpu()
        return log_probs.gather(1, tokens[places][:, None])[:, 0]

    def score_candidates(self, ids: Sequence[int], candidate_ids: Tensor) -> Tensor:
        """Return the log-probabilities of candidate tokens `(n - 1, k)`, k for each position but the last, float64."""
        return torch.cat([log_probs.gather(1, candidate_ids[part]) for part, log_probs in self._log_probs(ids)])

    @torch.no_grad()
    def _log_probs(self, ids: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of positions and log-probabilities of every token: 256 × 128,000 in float64 would be 262 MB."""
        logits = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits[0, :-1]
        for start in range(0, len(logits), 32):
            part = slice(start, start + 32)
            yield part, logits[part].double().log_softmax(-1).cpu()

    @torch.no_grad()
    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        prompt = torch.tensor([ids], device=self.model.device)
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        settings |= {"repetition_penalty": 1.0, "max_new_tokens": max_new_tokens}
        output = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        new = output[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        return new[:-1] if new and new[-1] in ends else new

    def close(self) -> None:
        self.model = None


def is_xllamacpp_installed() -> bool:
    """Return whether the package that brings llama.cpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaServerClient:
    """A running llama-server, asked over HTTP for what it serves: the model, and its adapters as they are set there.

    The server gives probabilities only for tokens it samples. So each token of a text is forced by a large logit bias,
    and its log-probability is read, which the server takes from the logits before the bias.

    Args:
        url: the server's address.
        timeout: seconds an answer may take.
        key: the server's --api-key.
    """

    name = "llama.cpp"

    def __init__(self, url: str, *, timeout: float = 300, key: str | None = None) -> None:
        self._client = JsonClient("llama.cpp server", url.rstrip("/").removesuffix("/v1"), key, timeout)
        self._scales: list[dict[str, float]] | None = None  # None: those that the server has

    @_translate_answer_errors("llama.cpp server")
    def tokenize(self, text: str) -> list[int]:
        with_bos, plain = (
            _require_token_ids(self._post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"])
            for special in (True, False)
        )
        # If the template wrote a beginning-of-sequence token, too, llama.cpp's chat endpoint removes the template's.
        return plain if with_bos[1:] == plain and with_bos[:1] == plain[:1] else with_bos

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        return self.score_from(ids, 1, TOP_K)

    @_translate_answer_errors("llama.cpp server")
    def score_from(self, ids: Sequence[int], start: int, top_k: int) -> TextTokenScores:
        """Return log-probabilities of the tokens of a text from an index on, 1 or more, with `top_k` at each."""
        return _make_scores([self._score_next(ids[:at], ids[at], top_k) for at in range(start, len(ids))])

    @_translate_answer_errors("llama.cpp server")
    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Tensor:
        return torch.tensor([self._score_next(ids[:at], ids[at])[0] for at in indices], dtype=torch.float64)

    def _score_next(
        self, before: Sequence[int], token: int, top_k: int = TOP_K
    ) -> tuple[float, list[tuple[int, float]]]:
        """Return the log-probability of a token, and the likeliest tokens with theirs."""
        forced, listed = token, top_k
        for _ in range(2):
            answer = self._complete(before, cache_prompt=len(before) > 1, n_probs=listed, logit_bias=[[forced, 1e5]])
            entries = answer.get("completion_probabilities")
            if entries and entries[0]["id"] == forced:
                top = [(c["id"], c["logprob"]) for c in entries[0]["top_logprobs"]]
                own = entries[0]["logprob"] if forced == token else dict(top).get(token)
                if own is not None:
                    return own, top[:top_k]
            # The server omits a token that ends inside a character. So another token is forced, and all are listed.
            forced, listed = self.tokenize("a")[-1], 1 << 22
        raise RunError(f"llama.cpp gives no probability of token {token}", "a token of its vocabulary")

    @_translate_answer_errors("llama.cpp server")
    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        answer = self._complete(ids, n_predict=max_new_tokens, return_tokens=True)
        tokens = _require_token_ids(answer["tokens"])
        return tokens[:-1] if answer["stop_type"] == "eos" else tokens

    @_translate_answer_errors("llama.cpp server")
    def sample(self, ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> list[int]:
        """Return an answer that is sampled from the whole vocabulary, with the token that ends it."""
        drawn = {"temperature": temperature, "seed": seed % (2**32 - 1)}  # the last one means a random seed
        return _require_token_ids(self._complete(ids, n_predict=max_new_tokens, return_tokens=True, **drawn)["tokens"])

    @_translate_answer_errors("llama.cpp server")
    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a chat that the server renders by its own template, ready for an answer."""
        return self.tokenize(self._post("/apply-template", messages=list(messages))["prompt"])

    @_translate_answer_errors("llama.cpp server")
    def list_adapters(self) -> list[str]:
        """Return the files of the adapters that the server has loaded."""
        return [str(each["path"]) for each in self._connect().request("/lora-adapters")]

    @_translate_answer_errors("llama.cpp server")
    def without_adapter(self) -> "LlamaServerClient":
        """Return the same server as it answers without an adapter."""
        other = copy.copy(self)
        other._scales = [{"id": i, "scale": 0.0} for i in range(len(self.list_adapters()))]
        return other

    def close(self) -> None:
        """Do nothing: the server keeps running."""

    def _complete(self, ids: Sequence[int], **settings: Any) -> JsonObject:
        """Continue a prompt; the cache is used only for a longer part of the same text (see `n_ctx_checkpoints`)."""
        return self._post("/completion", **{**self._make_request(ids), **settings})

    def _make_request(self, ids: Sequence[int]) -> JsonObject:
        request: dict[str, Any] = {"n_predict": 1, "prompt": list(ids), "temperature": 0.0, "samplers": ["temperature"]}
        return {**request, "cache_prompt": False, **({"lora": self._scales} if self._scales else {})}

    def _post(self, path: str, **body: Any) -> JsonObject:
        return self._connect().request(path, body)

    def _connect(self, timeout: float | None = None) -> JsonClient:
        return self._client


class InProcessLlamaCppEngine(LlamaServerClient):
    """A GGUF in llama.cpp: its own server, started in this process by the package xllamacpp.

    Keys and values are cached in float32, so that a difference comes from the file and not from the cache. Only this
    process has the server's key.

    Args:
        model, adapters: GGUF files of the whole model and of adapters, of which the first is active; None is left out.
        max_tokens: of the longest text, answers included.
        slots: texts that it continues at the same time; it adds one adapter at a time, so others wait.
        threads: None: half of the cores. The threads wait for one another, so one on a busy core slows all.
        cache: precision of keys and values, f32 or f16.
        gpu_layers: layers that a GPU computes.

    Raises:
        ModelError: xllamacpp is not installed.
        RunError: llama.cpp cannot load the files.
    """

    def __init__(
        self, model: Path, *adapters: Path | None, max_tokens: int, slots: int = 1, threads: int | None = None,
        cache: str = "f32", gpu_layers: int = 0,
    ) -> None:  # fmt: skip
        if not is_xllamacpp_installed():
            raise ModelError(
                "the package xllamacpp is not installed", "llama.cpp", format_install_command("export-check")
            )
        import xllamacpp

        files = [file for file in adapters if file is not None]
        self._started, self._key = False, secrets.token_urlsafe()
        self._adapters = len(files)
        self._scales = self._list_scales(0)
        params: Any = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = max_tokens * slots, slots, gpu_layers
        params.api_keys = [self._key]  # other programs and web pages on this machine know no key
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or max(1, (os.cpu_count() or 1) // 2)
        params.verbosity, params.warmup, params.fit_params = -1, False, False
        # With sliding windows llama.cpp would restore states of an earlier text and give wrong numbers, and keys and
        # values that one adapter computed for another one.
        params.n_ctx_checkpoints = params.cache_ram_mib = 0
        loras = [xllamacpp.CommonAdapterLoraInfo() for _ in files]
        for lora, file in zip(loras, files, strict=True):
            lora.path, lora.scale = str(file), 0.0
        params.lora_adapters = loras
        try:
            self.server: Any = xllamacpp.Server(params)
        except Exception as error:
            names = " with ".join(map(str, [model, *files]))
            message = f"llama.cpp cannot load {names}: {error}"
            raise RunError(message, "a GGUF, and an adapter of the same base") from error

    def measure_seconds(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Return the seconds of a prompt's tokens and of a generated one, as the server measures them.

        `new_tokens` is 2 or more: the first one is chosen as the prompt ends, before the server's clock starts.
        """
        timings = self._complete([7] * prompt_tokens, n_predict=new_tokens, ignore_eos=True)["timings"]
        steps = timings["predicted_n"] - 1
        return timings["prompt_ms"] / 1e3 / timings["prompt_n"], timings["predicted_ms"] / 1e3 / steps

    def close(self) -> None:
        if not self._started:
            self._complete([0])  # a server that was never used would wait for itself
        self.server = None
        gc.collect()

    def stream(self, ids: Sequence[int], *, timeout: float, **settings: Any) -> Generator[dict[str, Any], None, None]:
        """Yield the server's events while it continues a prompt; closing the generator stops it.

        `timeout` is that of each event, in seconds; errors as for `JsonClient.stream`.
        """
        body = {**self._make_request(ids), "stream": True, **settings}
        yield from self._connect(timeout).stream("/completion", body)

    def _make_request(self, ids: Sequence[int]) -> JsonObject:
        self._started = True
        return super()._make_request(ids)

    def _list_scales(self, active: int | None) -> list[dict[str, float]]:
        """Return each adapter's scale. All are named: the others would keep those that the server began with."""
        return [{"id": i, "scale": float(i == active)} for i in range(self._adapters)]

    def with_adapter(self, index: int | None) -> "InProcessLlamaCppEngine":
        """Return the same server as it answers with another of its adapters, or with none."""
        other = copy.copy(self)
        other._scales = self._list_scales(index)
        return other

    def without_adapter(self) -> "InProcessLlamaCppEngine":
        """Return the same server as it answers without an adapter."""
        return self.with_adapter(None)

    def _connect(self, timeout: float | None = None) -> JsonClient:
        return JsonClient("llama.cpp server", self.server.listening_address, self._key, timeout or 300)


class VllmClient:
    """A running server with vLLM's API, vLLM or `slimtune serve`, asked for the base or for an adapter by its name.

    Every sampling setting is sent, because a base's generation_config.json would change the server's defaults.

    Args:
        url: the server's address, `http://127.0.0.1:8000`; a final `/v1` is accepted.
        model: the name it serves the model by.
        timeout: seconds an answer may take.
        key: the server's --api-key.

    Raises:
        UsageError: the address is invalid, or the server does not know the model.
        ModelError: no such server answers there.
    """

    name = "vLLM"

    def __init__(self, url: str, model: str, *, timeout: float = 300, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is not the address of a server", "such as http://127.0.0.1:8000")
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        hint = "start it (vLLM: sh serve.sh in the export folder), and wait until it is ready"
        self._server = JsonClient(VLLM_LIKE_SERVER, self.url, key, timeout, hint=hint)
        with _translate_answer_errors(VLLM_LIKE_SERVER):
            names = [str(each["id"]) for each in self._post("/v1/models")["data"]]
        if model not in names:
            raise UsageError(
                f"the {VLLM_LIKE_SERVER} at {self.url} serves no model {model!r}{suggest(model, names)}",
                f"one of {format_names(names)}",
                f"slimtune serve {model}=FOLDER, or vLLM with --enable-lora --lora-modules {model}=FOLDER",
            )

    @_translate_answer_errors(VLLM_LIKE_SERVER)
    def tokenize(self, text: str) -> list[int]:
        answer = self._post("/tokenize", model=self.model, prompt=text, add_special_tokens=False)
        return _require_token_ids(answer["tokens"])

    @_translate_answer_errors(VLLM_LIKE_SERVER)
    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a chat that the server renders by its own template, ready for an answer."""
        return _require_token_ids(self._post("/tokenize", model=self.model, messages=list(messages))["tokens"])

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        return self.score_from(ids, 1, VLLM_TOP_K)

    @_translate_answer_errors(VLLM_LIKE_SERVER)
    def score_from(self, ids: Sequence[int], start: int, top_k: int) -> TextTokenScores:
        """Return log-probabilities of the tokens of a text from an index on, 1 or more, with `top_k` at each."""
        positions = self._complete(ids, 1, prompt_logprobs=top_k)["prompt_logprobs"]
        if positions is None or len(positions) != len(ids):
            given = "no" if positions is None else len(positions)
            message = (
                f"the {VLLM_LIKE_SERVER} at {self.url} gave {given} log-probabilities of a prompt of {len(ids)} tokens"
            )
            raise RunError(message, "prompt_logprobs of each", "let it read longer prompts: it may cut them")
        scores = []
        for token, entries in zip(ids[start:], positions[start:], strict=True):
            # vLLM includes the token itself even where it is not among the likeliest; what stands for it may not.
            best = sorted((e["rank"], int(i), e["logprob"]) for i, e in entries.items() if e["rank"] <= top_k)
            own = entries[str(token)]["logprob"] if str(token) in entries else math.nan
            scores.append((own, [(i, value) for _, i, value in best[:top_k]]))
        return _make_scores(scores)

    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Tensor:
        return self.score(ids).token_log_probs[torch.tensor(indices) - 1]

    @_translate_answer_errors(VLLM_LIKE_SERVER)
    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        tokens, reason = self._answer(ids, max_new_tokens)
        return tokens[:-1] if reason == "stop" else tokens

    @_translate_answer_errors(VLLM_LIKE_SERVER)
    def sample(self, ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> list[int]:
        """Return an answer that is sampled from the whole vocabulary, with the token that ends it."""
        return self._answer(ids, max_new_tokens, temperature=temperature, seed=seed, top_k=-1, min_p=0.0)[0]

    def _answer(self, ids: Sequence[int], max_new_tokens: int, **settings: Any) -> tuple[list[int], str]:
        choice = self._complete(ids, max_new_tokens, return_token_ids=True, **settings)
        if choice.get("token_ids") is None:
            raise RunError(
                f"the {VLLM_LIKE_SERVER} at {self.url} returns no token ids", "slimtune serve, or vLLM 0.11 or newer"
            )
        return _require_token_ids(choice["token_ids"]), choice["finish_reason"]

    def close(self) -> None:
        """Do nothing: the server keeps running."""

    def _complete(self, ids: Sequence[int], max_tokens: int, **settings: Any) -> JsonObject:
        neutral = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
        neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        request = {"model": self.model, "prompt": list(ids), "max_tokens": max_tokens, **neutral, **settings}
        return self._post("/v1/completions", **request)["choices"][0]

    def _post(self, path: str, **body: Any) -> JsonObject:
        return self._server.request(path, body)
