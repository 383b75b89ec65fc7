"""Engines that run already, asked over HTTP alone for log-probabilities: whichever way of asking the server answers.

llama-server           /completion, token by token         log p of any tokens
vLLM                   prompt_logprobs                     log p of any tokens
SGLang and others      /v1/completions with echo           log p of any tokens
LM Studio, TGI, Ollama, mlx-lm, chats alone   log p of the tokens it answers   of its own greedy answers
others                 greedy answers                      weaker: no log p at all
"""

import itertools
import math
import re
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..core.foundation.json_results import JsonObject
from ..errors import ModelError, RunError, SlimtuneError, UsageError, format_names, suggest
from .inference_engines import InferenceEngine, LlamaServerClient, TextTokenScores, VllmClient
from .json_client import JsonClient

Evidence = Literal["log-probabilities", "log-probabilities of its answers", "greedy answers"]
KEY_VARIABLE = "SLIMTUNE_SERVER_KEY"
WAITS = (0.5, 1.0, 2.0)
"""Seconds before a request is sent again to a server that refuses the connection or is busy."""
BUSY = (429, 502, 503, 504)
PROBE = "a b c"
MLX_ADAPTED_NAME = "default_model"
"""The name under which alone `mlx_lm.server` applies its `--adapter-path`; it lists the base's folder instead."""
T = TypeVar("T")
PROBE_TOKENS = 8
"""Tokens of the answer by which a server's log-probabilities are known: they are not all 0."""
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
_REFUSALS = (400, 404, 405, 415, 422, 501)
"""HTTP statuses by which a server says that it lacks a path or a setting."""
_LEAST_LOG_PROB = -9998.0
"""Servers write less where they give no value."""


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
        if status == 429:
            message = f"the server at {url} limits how often it is asked"
            raise RunError(message, "a server without a limit", "raise its limit, or try again later") from error
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
            return _open_answering([OllamaClient(client, chosen.name, tokenizer)], served)
        completions = CompletionsClient(client, chosen.name, tokenizer)
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        base_name = chosen.parent if chosen.parent in served and chosen.parent != chosen.name else None
        if completions.has_prompt_logprobs(ids):
            base = VllmClient(url, base_name, timeout=timeout, key=key) if base_name else None
            return HttpEngine(VllmClient(url, chosen.name, timeout=timeout, key=key), "log-probabilities", base, served)
        if completions.has_echo(ids):
            echo_base = CompletionsClient(client, base_name, tokenizer) if base_name else None
            return HttpEngine(completions, "log-probabilities", echo_base, served)
        kinds = (AnsweringCompletionsClient, AnsweringChatClient)
        return _open_answering([kind(client, chosen.name, tokenizer) for kind in kinds], served)


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
    url = re.sub(r"(/v1(/(chat/)?completions|/models)?)?/*$", "", url)
    return JsonClient("server", url, key, timeout, max_bytes=1 << 28, hint="start it, and wait until it is ready")


def _open_answering(engines: Sequence["AnsweringClient"], served: tuple[str, ...]) -> HttpEngine:
    """Return the first way of asking that gives log-probabilities of answers, else the first that is answered."""
    answering, refusals = list[AnsweringClient](), list[SlimtuneError]()
    for engine in engines:
        try:
            log_probs = engine.answer(PROBE, PROBE_TOKENS).log_probs
        except SlimtuneError as error:
            if get_http_status(error) not in _REFUSALS:
                raise
            refusals.append(error)
            continue
        if any(value < 0 for value in log_probs):  # all are 0 where they are of the greedy choice, not of the model
            return HttpEngine(engine, "log-probabilities of its answers", None, served)
        answering.append(engine)
    if not answering:
        raise refusals[0]
    return HttpEngine(answering[0], "greedy answers", None, served)


def _get(client: JsonClient, path: str) -> Any:
    """Return the JSON at a path; None if the server has no such path, or sends no JSON there."""
    try:
        return client.request(path)
    except SlimtuneError as error:
        if get_http_status(error) in _REFUSALS or isinstance(error.__cause__, ValueError):
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
        if found is None and names and model != MLX_ADAPTED_NAME:
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

    leading = 0  # tokens that the server puts in front of a prompt of token ids

    def tokenize(self, text: str) -> list[int]:
        """Return the base's own ids, after the tokens that the server puts in front of every prompt."""
        return [self.tokenizer.bos_token_id or 0] * self.leading + super().tokenize(text)

    def has_prompt_logprobs(self, ids: Sequence[int]) -> bool:
        """Return whether the server gives vLLM's log-probabilities of a prompt."""
        values = self._try_completing(list(ids), prompt_logprobs=1).get("prompt_logprobs")
        return isinstance(values, list) and len(values) == len(ids)

    def has_echo(self, ids: Sequence[int]) -> bool:
        """Return whether the server echoes a prompt of token ids with log-probabilities."""
        values = (self._try_completing(list(ids), echo=True, logprobs=1).get("logprobs") or {}).get("token_logprobs")
        if not isinstance(values, list) or len(values) < len(ids):
            return False
        self.leading = max(0, len(values) - len(ids) - 1)  # one more is the token that it answers
        return True

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return log-probabilities of all tokens of a text but the first."""
        choice = _complete(self, list(ids), 1, echo=True, logprobs=1)
        values = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(values, list) or len(values) < len(ids):
            given = len(values) if isinstance(values, list) else "no"
            message = f"the server at {self._client.url} gave {given} log-probabilities of a text of {len(ids)} tokens"
            raise RunError(message, "one for each token", "let it read longer prompts: it may cut them")
        return _make_scores_of_own_tokens(ids, values[self.leading + 1 : self.leading + len(ids)])

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, as the base's tokenizer splits its text."""
        return super().tokenize(str(_complete(self, list(ids), max_new_tokens).get("text", "")))[:max_new_tokens]

    def _try_completing(self, prompt: Any, **settings: Any) -> Any:
        """Return a completion; an empty one if the server refuses these settings."""
        try:
            return _complete(self, prompt, 1, **settings)
        except SlimtuneError as error:
            if get_http_status(error) in (*_REFUSALS, 500):
                return {}
            raise


def _complete(server: ServerWithoutTokenizer, prompt: Any, max_tokens: int, **settings: Any) -> JsonObject:
    """Return the first choice of OpenAI's /v1/completions, or, for a list of messages, /v1/chat/completions.

    It gets what the server counted, as `usage`.
    """
    is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    path, name = ("/v1/chat/completions", "messages") if is_chat else ("/v1/completions", "prompt")
    body = {"model": server.model, name: prompt, "max_tokens": max_tokens, **_NEUTRAL, **settings}
    answer = server._client.request(path, body)
    try:
        return {**answer["choices"][0], "usage": answer.get("usage") or {}}
    except (LookupError, TypeError, AttributeError) as error:
        message = f"the server at {server._client.url} sends no completion: {str(answer)[:200]}"
        raise ModelError(message, "OpenAI's answers") from error


def _make_scores_of_own_tokens(ids: Sequence[int], values: Sequence[Any]) -> TextTokenScores:
    """Make scores of the tokens of a text alone; a value that is not given becomes NaN."""
    own = torch.tensor([read_log_prob(value) for value in values], dtype=torch.float64)
    return TextTokenScores(own, torch.tensor(list(ids[1:]))[:, None], own[:, None])


def read_log_prob(value: Any) -> float:
    """Return a log-probability as a server writes it; NaN where it gives none.

    Raises:
        ModelError: it is no number, or is above 0, such as a probability.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or value > 1e-3:
        raise ModelError(f"the server gives {value!r} as a log-probability", "a number below 0")
    return float(value) if value > _LEAST_LOG_PROB else math.nan


class ServerAnswer(NamedTuple):
    """A server's greedy answer."""

    tokens: list[str]  # as texts
    log_probs: list[float]  # of the tokens; [] where it gives none
    prompt_tokens: int | None = None  # that it counted in the prompt


class AnsweringClient(ServerWithoutTokenizer):
    """A server that takes a text, and gives log-probabilities of its own greedy answer at most.

    `record_answers` asks it, and `score` returns what it gave for these texts; it knows no others.
    """

    def __init__(self, client: JsonClient, model: str, tokenizer: Any) -> None:
        super().__init__(client, model, tokenizer)
        self._recorded: dict[tuple[int, ...], TextTokenScores] = {}
        self._more_prompt_tokens: list[int] = []  # that it counted in each prompt than the base's tokenizer
        self.chats: dict[str, Sequence[Any]] = {}  # messages by the prompt that the adapter's template makes of them

    def answer(self, prompt: str, max_new_tokens: int) -> ServerAnswer:
        """Return the greedy answer to a prompt."""
        raise NotImplementedError

    def _answer_and_count(self, prompt: str, max_new_tokens: int) -> ServerAnswer:
        answer = self.answer(prompt, max_new_tokens)
        if answer.prompt_tokens is not None:
            self._more_prompt_tokens.append(answer.prompt_tokens - len(self.tokenize(prompt)))
        return answer

    def record_answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, list[int]]]:
        """Ask for answers; return each prompt, and the ids of prompt and answer up to the first token that differs."""
        texts = []
        for prompt in prompts:
            tokens, log_probs, _ = self._answer_and_count(prompt, max_new_tokens)
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

    def describe_prompt_lengths(self) -> str:
        """Return that the server counted other numbers of tokens in every prompt than the base's tokenizer; "": not."""
        more = self._more_prompt_tokens
        if not more or not (min(more) > 0 or max(more) < 0):
            return ""
        if max(more) < 0:
            return f"the server counts up to {-min(more)} tokens less in each prompt: it cuts prompts"
        what = "a second beginning-of-sequence token?" if {*more} == {1} else "it adds a template of its own"
        return f"the server counts {min(more)} tokens more in each prompt, or more: {what}"

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return the recorded log-probabilities; NaN for the tokens of the prompt."""
        return self._recorded[tuple(ids)]

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt, as the base's tokenizer splits its text."""
        tokens = self._answer_and_count(self.tokenizer.decode(list(ids)), max_new_tokens).tokens
        return self.tokenize("".join(tokens))[:max_new_tokens]

    def _complete_with_log_probs(self, prompt: Any, max_new_tokens: int, *flags: Any) -> JsonObject:
        """Return a completion with `logprobs` as the first of `flags` that the server takes, else without."""
        for flag in flags:
            try:
                return _complete(self, prompt, max_new_tokens, logprobs=flag)
            except SlimtuneError as error:
                if get_http_status(error) not in (400, 422):
                    raise
        return _complete(self, prompt, max_new_tokens)

    def _make_answer(self, choice: JsonObject, text: Any) -> ServerAnswer:
        """Return the answer in a choice of OpenAI's: two lists (legacy), or an entry for each token with text or id."""
        found: Any = choice.get("logprobs") or {}
        tokens, values = found.get("tokens"), found.get("token_logprobs")
        if isinstance(entries := found.get("content"), list):
            tokens = [entry.get("token", entry.get("id")) for entry in entries]
            values = [entry.get("logprob") for entry in entries]
        counted: Any = choice["usage"].get("prompt_tokens")
        counted = counted if isinstance(counted, int) else None
        if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
            return ServerAnswer([str(text or "")], [], counted)
        texts = [self.tokenizer.decode([token]) if isinstance(token, int) else str(token) for token in tokens]
        return ServerAnswer(texts, [read_log_prob(value) for value in values], counted)


class AnsweringCompletionsClient(AnsweringClient):
    """OpenAI's /v1/completions with `logprobs` of the answer, or without."""

    def answer(self, prompt: str, max_new_tokens: int) -> ServerAnswer:
        choice = self._complete_with_log_probs(prompt, max_new_tokens, 1, True)  # mlx-lm takes a truth value
        return self._make_answer(choice, choice.get("text"))


class AnsweringChatClient(AnsweringClient):
    """OpenAI's /v1/chat/completions: the server renders the messages by its own template."""

    def answer(self, prompt: str, max_new_tokens: int) -> ServerAnswer:
        messages = self.chats.get(prompt) or [{"role": "user", "content": prompt}]
        choice: Any = self._complete_with_log_probs(list(messages), max_new_tokens, True)
        return self._make_answer(choice, (choice.get("message") or {}).get("content"))


class OllamaClient(AnsweringClient):
    """Ollama's own /api/generate, raw: without its template."""

    def answer(self, prompt: str, max_new_tokens: int) -> ServerAnswer:
        # Ollama adds the beginning-of-sequence token itself.
        text = prompt.removeprefix(self.tokenizer.bos_token or "")
        body = {"model": self.model, "prompt": text, "raw": True, "stream": False, "logprobs": True}
        neutral = {"temperature": 0, "seed": 0, "repeat_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}
        body["options"] = {**neutral, "num_predict": max_new_tokens}  # a Modelfile may have others
        answer = self._client.request("/api/generate", body)
        try:
            choice = {"logprobs": {"content": answer.get("logprobs") or None}}
            counted = {"prompt_tokens": answer.get("prompt_eval_count")}
            return self._make_answer({**choice, "usage": counted}, answer["response"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"the server at {self._client.url} sends no answer of Ollama's") from error
