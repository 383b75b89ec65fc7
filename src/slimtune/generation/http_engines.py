"""Engines that run already, asked over HTTP alone for log-probabilities: whichever way of asking the server answers.

llama-server           /completion, token by token         log p of any tokens
vLLM                   prompt_logprobs                     log p of any tokens
SGLang and others      /v1/completions with echo           log p of any tokens
LM Studio, TGI, Ollama  log p of the tokens it answers      of its own greedy answers
others                 greedy answers                      weaker: no log p at all
"""

import itertools
import math
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..errors import ModelError, RunError, SlimtuneError, UsageError, format_names, suggest
from .inference_engines import InferenceEngine, LlamaServerClient, TextTokenScores, VllmClient
from .json_client import JsonClient

Evidence = Literal["log-probabilities", "log-probabilities of its answers", "greedy answers"]
KEY_VARIABLE = "SLIMTUNE_SERVER_KEY"
WAITS = (0.5, 1.0, 2.0)
"""Seconds before a request is sent again to a server that refuses the connection or is busy."""
BUSY = (429, 502, 503, 504)
PROBE = "a b c"
T = TypeVar("T")
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "seed": 0}


class ServedModelName(NamedTuple):
    """A model in a server's list."""

    name: str
    parent: str | None  # the base that an adapter is served beside, where the server says so


@dataclass(frozen=True)
class HttpEngine:
    """A server that was asked what it can do."""

    engine: Any  # an InferenceEngine
    evidence: Evidence
    base: InferenceEngine | None  # the untouched base in the same server, where it has one
    served_names: tuple[str, ...]


def ask_until_not_busy(ask: Callable[[], T]) -> T:
    """Return what `ask` returns; call it again after a while if the server is busy, or refuses the connection."""
    for wait in WAITS:
        try:
            return ask()
        except SlimtuneError as error:
            reason = error.__cause__
            if get_http_status(error) not in BUSY and not isinstance(
                getattr(reason, "reason", reason), ConnectionError
            ):
                raise
            time.sleep(wait)
    return ask()


@contextmanager
def explaining_status(url: str) -> Iterator[None]:
    """Say what a server's refusal means, by the status of its answer."""
    try:
        yield
    except SlimtuneError as error:
        status = get_http_status(error)
        if status in (401, 403):
            message = f"the server at {url} demands an API key"
            raise UsageError(message, "the key it was started with", f"set the variable {KEY_VARIABLE}") from error
        if status == 503:
            raise RunError(
                f"the server at {url} is still loading its model", "a server that is ready", "try again later"
            ) from error
        raise


def get_http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of `JsonClient` stands for; None if there was no answer."""
    cause = error.__cause__
    return cause.code if isinstance(cause, urllib.error.HTTPError) else None


def open_http_engine(
    url: str, model: str | None, tokenizer: Any, *, key: str | None = None, timeout: float = 60
) -> HttpEngine:
    """Ask a server what it is and what it serves; nothing is loaded or changed there.

    Args:
        url: its address, such as http://127.0.0.1:8080; a final `/v1` is accepted.
        model: the name it serves the adapter by; None: the only one, or the only adapter.
        tokenizer: the base's.
        key: sent as a bearer token.
        timeout: seconds an answer may take.

    Raises:
        UsageError: the address is invalid, the server lacks the model, or demands a key.
        ModelError: nobody answers there, or not in time, or in another form.
        RunError: the server is loading its model.
    """
    client = _make_client(url, key, timeout)
    url = client.url
    with explaining_status(url):
        names = _list_models(client)
        if isinstance(_get(client, "/props"), dict):
            engine = LlamaServerClient(url, timeout=timeout, key=key)
            return HttpEngine(
                engine, "log-probabilities", engine.without_adapter() if engine.list_adapters() else None, ()
            )
        served = tuple(name for name, _ in names)
        chosen = _choose_model(url, names, model, "--name")
        if isinstance(_get(client, "/api/version"), dict):
            return _open_answering(OllamaClient(client, chosen.name, tokenizer), served)
        completions = CompletionsClient(client, chosen.name, tokenizer)
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        base_name = chosen.parent if chosen.parent in served and chosen.parent != chosen.name else None
        if completions.has_prompt_logprobs(ids):
            base = VllmClient(url, base_name, timeout=timeout, key=key) if base_name else None
            return HttpEngine(VllmClient(url, chosen.name, timeout=timeout, key=key), "log-probabilities", base, served)
        if completions.has_echo(ids):
            echo_base = CompletionsClient(client, base_name, tokenizer) if base_name else None
            return HttpEngine(completions, "log-probabilities", echo_base, served)
        return _open_answering(AnsweringCompletionsClient(client, chosen.name, tokenizer), served)


def open_scoring_engine(
    url: str, model: str | None, tokenizer: Any, name_flag: str, *, key: str | None = None, timeout: float = 60
) -> LlamaServerClient | VllmClient | None:
    """Return a client of a server that gives the likeliest tokens at each token of any text; None: it does not.

    Arguments and errors as for `open_http_engine`; `name_flag` is what names the model, for messages.
    """
    client = _make_client(url, key, timeout)
    with explaining_status(client.url):
        names = _list_models(client)
        if isinstance(_get(client, "/props"), dict):
            return LlamaServerClient(client.url, timeout=timeout, key=key)
        chosen = _choose_model(client.url, names, model, name_flag)
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if not CompletionsClient(client, chosen.name, tokenizer).has_prompt_logprobs(ids):
            return None
        return VllmClient(client.url, chosen.name, timeout=timeout, key=key)


def _make_client(url: str, key: str | None, timeout: float) -> JsonClient:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not the address of a server", "such as http://127.0.0.1:8000")
    url = url.rstrip("/").removesuffix("/v1")
    return JsonClient("server", url, key, timeout, max_bytes=1 << 28, hint="start it, and wait until it is ready")


def _open_answering(engine: "AnsweringClient", served: tuple[str, ...]) -> HttpEngine:
    _, log_probs = engine.answer("a b c", 2)
    return HttpEngine(engine, "log-probabilities of its answers" if log_probs else "greedy answers", None, served)


def _get(client: JsonClient, path: str) -> Any:
    """Return the JSON at a path; None if the server has no such path, or sends no JSON there."""
    try:
        return client.request(path)
    except SlimtuneError as error:
        if get_http_status(error) in (400, 404, 405, 422, 501) or isinstance(error.__cause__, ValueError):
            return None
        raise


def _list_models(client: JsonClient) -> list[ServedModelName]:
    listed = _get(client, "/v1/models")
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        return []
    return [
        ServedModelName(str(e["id"]), e.get("parent") if isinstance(e.get("parent"), str) else None)
        for e in entries
        if isinstance(e, dict) and "id" in e
    ]


def _choose_model(url: str, names: list[ServedModelName], model: str | None, name_flag: str) -> ServedModelName:
    """Return the model with a name; without one, the only adapter, or the only model."""
    listed = [each.name for each in names]
    if model is not None:
        found = next((each for each in names if each.name in (model, f"{model}:latest")), None)
        if found is None and names:
            message = f"the server at {url} serves no model {model!r}{suggest(model, listed)}"
            raise UsageError(message, f"one of {format_names(listed)}", name_flag)
        return found or ServedModelName(model, None)
    adapters = [each for each in names if each.parent is not None]
    if len(choices := adapters or names) != 1:
        if not listed:
            raise UsageError(f"the server at {url} lists no models", "one that does, or the model's name", name_flag)
        message = f"the server at {url} serves {len(listed)} models"
        raise UsageError(message, f"one of {format_names(listed)}", name_flag)
    return choices[0]


class ServerWithoutTokenizer:
    """A server whose texts are split by the base's own tokenizer, because it has none to ask."""

    def __init__(self, client: JsonClient, model: str, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer, self._client = "server", model, tokenizer, client

    def tokenize(self, text: str) -> list[int]:
        """Return the base's own ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return log-probabilities of all tokens of a text but the first."""
        raise NotImplementedError

    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Return the log-probabilities of the tokens at some indices of a text, 1 and up."""
        return self.score(ids).token_log_probs[[at - 1 for at in indices]]

    def close(self) -> None:
        """Do nothing: the server keeps running."""


class CompletionsClient(ServerWithoutTokenizer):
    """OpenAI's /v1/completions of a server that echoes the prompt with its log-probabilities."""

    def _complete(self, prompt: Any, max_tokens: int, **settings: Any) -> Any:
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, **_NEUTRAL, **settings}
        answer = self._client.request("/v1/completions", body)
        try:
            return answer["choices"][0]
        except (LookupError, TypeError) as error:
            raise ModelError(f"the server at {self._client.url} sends no completion", "OpenAI's answers") from error

    def _try_completing(self, prompt: Any, **settings: Any) -> Any:
        """Return a completion; an empty one if the server refuses these settings."""
        try:
            return self._complete(prompt, 1, **settings)
        except SlimtuneError as error:
            if get_http_status(error) in (400, 404, 415, 422, 500, 501):
                return {}
            raise

    def has_prompt_logprobs(self, ids: Sequence[int]) -> bool:
        """Return whether the server gives vLLM's log-probabilities of a prompt."""
        values = self._try_completing(list(ids), prompt_logprobs=1).get("prompt_logprobs")
        return isinstance(values, list) and len(values) == len(ids)

    def has_echo(self, ids: Sequence[int]) -> bool:
        """Return whether the server echoes a prompt of token ids with log-probabilities."""
        values = (self._try_completing(list(ids), echo=True, logprobs=1).get("logprobs") or {}).get("token_logprobs")
        return isinstance(values, list) and len(values) >= len(ids)

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return log-probabilities of all tokens of a text but the first."""
        values = (self._complete(list(ids), 1, echo=True, logprobs=1).get("logprobs") or {}).get("token_logprobs")
        if not isinstance(values, list) or len(values) < len(ids):
            raise RunError(f"the server at {self._client.url} gave no log-probabilities of the prompt", "logprobs")
        return _make_scores_of_own_tokens(ids, values[1 : len(ids)])

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, as the base's tokenizer splits its text."""
        return self.tokenize(str(self._complete(list(ids), max_new_tokens).get("text", "")))[:max_new_tokens]


def _make_scores_of_own_tokens(ids: Sequence[int], values: Sequence[float | None]) -> TextTokenScores:
    """Make scores of the tokens of a text alone; None becomes NaN."""
    own = torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float64)
    return TextTokenScores(own, torch.tensor(list(ids[1:]))[:, None], own[:, None])


class AnsweringClient(ServerWithoutTokenizer):
    """A server that takes a text, and gives log-probabilities of its own greedy answer at most.

    `record_answers` asks it, and `score` returns what it gave for these texts; it knows no others.
    """

    def __init__(self, client: JsonClient, model: str, tokenizer: Any) -> None:
        super().__init__(client, model, tokenizer)
        self._recorded: dict[tuple[int, ...], TextTokenScores] = {}

    def answer(self, prompt: str, max_new_tokens: int) -> tuple[list[str], list[float]]:
        """Return the tokens of the greedy answer as texts, and their log-probabilities; [] if it gives none."""
        raise NotImplementedError

    def record_answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, list[int]]]:
        """Ask for answers; return each prompt, and the ids of prompt and answer up to the first token that differs."""
        texts = []
        for prompt in prompts:
            tokens, log_probs = self.answer(prompt, max_new_tokens)
            before = self.tokenize(prompt)
            ids = self.tokenize("".join(tokens))
            pairs = zip(ids, tokens, log_probs, strict=False)
            equal = itertools.takewhile(lambda pair: self.tokenizer.decode([pair[0]]) == pair[1], pairs)
            same = len(list(equal))
            if same:
                text = (*before, *ids[:same])
                self._recorded[text] = _make_scores_of_own_tokens(
                    text, [*[None] * (len(before) - 1), *log_probs[:same]]
                )
                texts.append((prompt, list(text)))
        return texts

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return the recorded log-probabilities; NaN for the tokens of the prompt."""
        return self._recorded[tuple(ids)]

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, as the base's tokenizer splits its text."""
        tokens, _ = self.answer(self.tokenizer.decode(list(ids)), max_new_tokens)
        return self.tokenize("".join(tokens))[:max_new_tokens]


class AnsweringCompletionsClient(AnsweringClient):
    """OpenAI's /v1/completions with `logprobs` of the answer, or without."""

    def answer(self, prompt: str, max_new_tokens: int) -> tuple[list[str], list[float]]:
        completions = CompletionsClient(self._client, self.model, self.tokenizer)
        try:
            choice = completions._complete(prompt, max_new_tokens, logprobs=1)
        except SlimtuneError as error:
            if get_http_status(error) not in (400, 422):
                raise
            choice = completions._complete(prompt, max_new_tokens)
        found = choice.get("logprobs") or {}
        tokens, values = found.get("tokens"), found.get("token_logprobs")
        if isinstance(tokens, list) and isinstance(values, list) and len(tokens) == len(values):
            return [str(t) for t in tokens], [float(v) for v in values]
        return [str(choice.get("text", ""))], []


class OllamaClient(AnsweringClient):
    """Ollama's own /api/generate, raw: without its template."""

    def answer(self, prompt: str, max_new_tokens: int) -> tuple[list[str], list[float]]:
        # Ollama adds the beginning-of-sequence token itself.
        text = prompt.removeprefix(self.tokenizer.bos_token or "")
        body = {"model": self.model, "prompt": text, "raw": True, "stream": False, "logprobs": True}
        body["options"] = {"temperature": 0, "num_predict": max_new_tokens, "seed": 0}
        answer = self._client.request("/api/generate", body)
        try:
            entries = answer.get("logprobs") or []
            if entries:
                return [str(e["token"]) for e in entries], [float(e["logprob"]) for e in entries]
            return [str(answer["response"])], []
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(f"the server at {self._client.url} sends no answer of Ollama's") from error
