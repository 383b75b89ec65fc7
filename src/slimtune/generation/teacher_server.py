"""A teacher on a server: its likeliest tokens at each token of a text, with their log-probabilities.

vLLM, slimtune serve   prompt_logprobs, one request for a row
llama-server           a request for each token of the answer; the keys and values of those before stay in its cache

The server gets token ids. So it must have the student's tokenizer: a text of words from all of the vocabulary must
become the same ids there, and the last id must exist there.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import ModelError, RunError, SlimtuneError, UsageError
from ..objectives.sampled_answers import AnswerSampling
from ..objectives.teacher_logps import TopLogps
from .http_engines import KEY_VARIABLE, ask_until_not_busy, explaining_status, get_http_status, open_scoring_engine
from .inference_engines import LlamaServerClient, TextTokenScores, VllmClient

T = TypeVar("T")
PROBE_WORDS, FEW_WORDS = 256, 16
"""Words of the vocabulary that both tokenizers are compared by."""
NAME_FLAG = "--set task.teacher_model_name_or_path=NAME"
URL_FIELD = "task.teacher_model_server_url"
CODE = "teacher-failed"
TEXT_ALONE = "sft on answers that the teacher wrote needs its texts alone"


def open_teacher_server(url: str, model: str, tokenizer: Any, top_k: int, timeout: float) -> "HttpTeacherServer":
    """Return a teacher on a server that was tried out.

    Args:
        url: its address; a final `/v1` is accepted.
        model: the model's name there; empty: the only one.
        tokenizer: the student's.
        top_k: how many of the likeliest tokens are asked for.
        timeout: seconds that a request may take.

    Raises:
        UsageError: it gives no log-probabilities of a text, or not so many, or has another tokenizer or no such model,
            or demands a key.
        ModelError: nobody answers there, or not in time.
        RunError: it is loading its model.
    """
    key = os.environ.get(KEY_VARIABLE) or None

    def open_engine() -> LlamaServerClient | VllmClient | None:
        return open_scoring_engine(url, model or None, tokenizer, NAME_FLAG, key=key, timeout=timeout)

    engine = ask_until_not_busy(open_engine)
    if engine is None:
        raise UsageError(
            f"the server at {url} gives no log-probabilities of the tokens of a given text",
            "a teacher in vLLM (prompt_logprobs), in slimtune serve --engine torch, or in llama-server",
            TEXT_ALONE,
            field=URL_FIELD,
            code=CODE,
        )
    server = HttpTeacherServer(url, engine, top_k, max(tokenizer.get_vocab().values()))
    server.require_same_tokens(tokenizer)
    return server


class HttpTeacherServer:
    """A teacher on a server.

    Args:
        url: its address, for messages.
        engine: asks it.
        top_k: how many of the likeliest tokens are asked for.
        last_token: of the student's vocabulary.
    """

    def __init__(self, url: str, engine: LlamaServerClient | VllmClient, top_k: int, last_token: int) -> None:
        self.url, self.engine, self.top_k, self.last_token = url, engine, top_k, last_token
        # llama-server would compute a row's first tokens again if other rows came between two of its tokens.
        self.requests_at_once = 1 if isinstance(engine, LlamaServerClient) else 8

    def score(self, ids: Sequence[int], start: int) -> TopLogps:
        """Return the likeliest tokens at each token of a text from an index on, 1 or more.

        Raises:
            SlimtuneError: the server does not answer, refuses the text, or sends NaN.
        """
        found: TextTokenScores = self._ask(lambda: self.engine.score_from(ids, start, self.top_k))
        count = len(ids) - start
        tokens, logps = np.zeros((count, self.top_k), np.int32), np.full((count, self.top_k), -math.inf, np.float32)
        known = found.top_ids.shape[1]
        tokens[:, :known], logps[:, :known] = found.top_ids.numpy(), found.top_log_probs.numpy()
        # Rounding may bring a sure token a little above 0.
        if np.isnan(logps).any() or logps.max() > 1e-3:
            raise RunError(f"the server at {self.url} sends log-probabilities that are NaN or above 0")
        return TopLogps(tokens, np.minimum(logps, 0))

    def sample(self, prompt: Sequence[int], how: AnswerSampling) -> list[int]:
        """Return the tokens of an answer, with the one that ends it; raise RunError if the student lacks one."""
        found = self._ask(lambda: self.engine.sample(prompt, how.max_new_tokens, how.temperature, how.seed))
        if (token := max(found, default=0)) > self.last_token:
            raise RunError(f"the teacher's answer has token {token}, which is padding of its vocabulary")
        return found

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            with explaining_status(self.url):
                return ask_until_not_busy(ask)
        except ModelError as error:
            if isinstance(error.__cause__, TimeoutError):
                hint = "--set task.teacher_server_timeout=SECONDS, or a server that has less else to do"
                raise ModelError(error.message, error.expected, hint) from error.__cause__
            raise

    def require_same_tokens(self, tokenizer: Any) -> None:
        """Raise UsageError unless the server splits words as the tokenizer does, and has the last token."""
        text = make_probe_text(tokenizer, PROBE_WORDS)
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = self._tokenize(text)[-len(own) :]  # it may put a beginning-of-sequence token first
        if theirs != own:
            at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), 0)
            there = tokenizer.decode(own[at : at + 1])
            raise self._refuse_tokenizer(f"{there!r} is token {own[at]} of the base, and {theirs[at : at + 1]} there")
        self._require_top_k(own[:8])
        last = self.last_token
        try:
            self.engine.score_from([own[0], last], 1, 1)
        except SlimtuneError as error:
            if get_http_status(error) not in (None, 400, 422):
                raise
            raise self._refuse_tokenizer(f"it has no token {last}, the base's last one ({error.message})") from error

    def _tokenize(self, text: str) -> list[int]:
        try:
            return self._ask(lambda: self.engine.tokenize(text))
        except SlimtuneError as error:
            if get_http_status(error) not in (404, 405, 501):
                raise
            message = f"the server at {self.url} has no /tokenize, so its tokenizer cannot be compared"
            raise UsageError(
                message, "a server that splits texts for others", TEXT_ALONE, field=URL_FIELD, code=CODE
            ) from error

    def _require_top_k(self, ids: Sequence[int]) -> None:
        try:
            self.score(ids, 1)
        except SlimtuneError as error:
            if get_http_status(error) not in (400, 422):
                raise
            hint = f"--set task.loss_top_k=20; or vllm serve … --max-logprobs {self.top_k}"
            raise UsageError(error.message, f"{self.top_k} log-probabilities", hint, field="task.loss_top_k") from error

    def _refuse_tokenizer(self, difference: str) -> UsageError:
        return UsageError(
            f"the teacher at {self.url} has another tokenizer: {difference}",
            "a teacher with the same tokenizer, so that both give the same tokens a probability",
            f"a larger base of the same family; or {TEXT_ALONE}",
            field=URL_FIELD,
            code=CODE,
        )


def make_probe_text(tokenizer: Any, count: int) -> str:
    """Return a text of tokens at even distances in the vocabulary, which every implementation splits alike.

    They are a blank (Ġ or ▁ in the vocabulary) and ASCII letters; if there are few, single letters.
    """
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    words = [f" {t[1:]}" for t in tokens if t[:1] in "Ġ▁" and t[1:].isascii() and t[1:].isalpha()]
    if len(words) < FEW_WORDS:
        words = [t for t in tokens if len(t) == 1 and t.isascii() and t.isalpha()]
    return "".join(words[:: -(-len(words) // count) or 1]).strip()
