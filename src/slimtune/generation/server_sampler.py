"""Answers that a run learns from, sampled by a server elsewhere: `slimtune serve`, or vLLM.

    a step    adapter ─▶ a folder that both see ─▶ /v1/load_lora_adapter ─▶ /v1/completions ─▶ token ids, log p of each

An adapter's name on the server has the digest of its weights in it. So a request for the new adapter is never answered
by an older one of another name, and adapters of earlier steps, or of a run that was killed, are unloaded by their name.
Whether the server really computes with it is what sampler_check.py finds out.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..core.adapters.adapter_files import WEIGHTS_FILE
from ..errors import RunError, SlimtuneError
from ..objectives.sampled_answers import AnswerSampling, SampledAnswer
from .generation_models import make_generation_model
from .http_engines import KEY_VARIABLE, ask_until_not_busy, get_http_status
from .incremental_detokenizer import IncrementalDetokenizer
from .json_client import JsonClient

MOST_ANSWERS, REQUESTS_AT_ONCE = 16, 8
"""Answers of one request, as many as `slimtune serve` gives, and requests that are open at the same time."""
NEUTRAL: dict[str, Any] = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
NEUTRAL |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What a base's generation_config.json would otherwise change in vLLM."""
START = "slimtune serve --base BASE --adapters-from FOLDER, or vLLM with --enable-lora"


class ServerSampler:
    """Samples the answers of an adapter on a server, which gets its weights first.

    Args:
        url: the server's address; a final `/v1` is accepted.
        folder: where adapters are written for the server, which must see the same path; its parent's name begins the
            names of the adapters there.
        timeout: seconds that a request may take.

    Raises:
        RunError: no server answers there.
    """

    def __init__(self, url: str, folder: Path, timeout: float) -> None:
        self.url, self.folder = url.rstrip("/").removesuffix("/v1"), folder.absolute()
        self._server = JsonClient("sampler", self.url, os.environ.get(KEY_VARIABLE) or None, timeout, 1 << 28)
        self._delivered = ""
        self.list_models()

    def list_models(self) -> list[str]:
        """Return the names of the server's models."""
        found = self._ask("/v1/models")
        try:
            return [str(model["id"]) for model in found["data"]]
        except (LookupError, TypeError) as error:
            raise self._fail(f"the sampler at {self.url} lists no models", START) from error

    def deliver(self, model: Any) -> str:
        """Let the server have the adapter "default" of a model as it is now; return its name there."""
        new = self.folder / "new"
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, selected_adapters=["default"])
        digest = hashlib.blake2b((new / WEIGHTS_FILE).read_bytes(), digest_size=6).hexdigest()
        place = hashlib.blake2b(str(self.folder).encode(), digest_size=3).hexdigest()
        prefix = f"{self.folder.parent.name}-{place}-"
        name = prefix + digest
        if name == self._delivered:
            return name
        path = self.folder / digest
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
        names = self.list_models()
        for other in names:
            if other.startswith(prefix) and other != name:
                self._change_adapters("/v1/unload_lora_adapter", {"lora_name": other})
        if name not in names:
            self._change_adapters("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        for old in self.folder.iterdir():
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
        self._delivered = name
        return name

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], how: AnswerSampling
    ) -> list[list[SampledAnswer]]:
        """Return answers of the adapter to each prompt, which is token ids.

        Each answer has the seed that it has where the model that trains samples; `slimtune serve` draws the same tokens
        with it as far as both compute the same logits.

        Raises:
            RunError: the server does not answer, refuses the adapter or a request, or gives no token ids.
        """
        name = self.deliver(model)
        ends = make_generation_model(model, tokenizer, how.adapter_or_base).end_tokens
        body: dict[str, Any] = NEUTRAL | {
            "model": name,
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "logprobs": 0,
            "logprobs_mode": "processed_logprobs",
            "return_token_ids": True,
            "stop_token_ids": sorted(ends),
        }
        count = how.count
        requests: list[dict[str, Any]] = [
            body | {"prompt": [list(ids)], "n": min(MOST_ANSWERS, count - first), "seed": how.seed + n * count + first}
            for n, ids in enumerate(prompts)
            for first in range(0, count, MOST_ANSWERS)
        ]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = [*pool.map(lambda request: self._ask("/v1/completions", request), requests)]
        answers = [
            self._read_answer(choice, tokenizer, ends)
            for request, response in zip(requests, found, strict=True)
            for choice in self._read_choices(response, request["n"])
        ]
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _read_choices(self, response: Any, count: int) -> list[dict[str, Any]]:
        try:
            choices = sorted(response["choices"], key=lambda choice: choice["index"])
        except (LookupError, TypeError) as error:
            raise self._fail(f"the sampler at {self.url} sends no completion", START) from error
        if len(choices) != count:
            problem = f"the sampler at {self.url} sends {len(choices)} answers in place of {count}"
            raise self._fail(problem, "a server that knows n")
        return choices

    def _read_answer(self, choice: dict[str, Any], tokenizer: Any, ends: frozenset[int]) -> SampledAnswer:
        """Return an answer from its token ids and their log p; a text alone would have to be tokenized again."""
        ids, said = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(said, list):
            missing = "token ids" if not isinstance(ids, list) else "log-probabilities"
            problem = f"the sampler at {self.url} gives no {missing} of its answers"
            raise self._fail(problem, "slimtune serve, or vLLM 0.11 or newer, which know return_token_ids")
        if not ids or len(ids) != len(said) or any(value is None or not math.isfinite(value) for value in said):
            raise self._fail(
                f"the sampler at {self.url} gives {len(said)} log-probabilities for an answer of {len(ids)} tokens, or "
                "some that are no number"
            )
        text = IncrementalDetokenizer(tokenizer)
        for at, token in enumerate(ids, 1):
            text.add(token, last=at == len(ids))
        return SampledAnswer(ids, [float(value) for value in said], text.text, ids[-1] in ends)

    def _change_adapters(self, path: str, body: dict[str, str]) -> None:
        """Load or unload an adapter; vLLM answers with a text."""
        try:
            self._ask(path, body)
        except RunError as error:
            status, cause = get_http_status(error), error.__cause__
            if status is None and isinstance(cause, SlimtuneError) and isinstance(cause.__cause__, ValueError):
                return
            if status in (403, 404, 405):
                hint = (
                    f"slimtune serve with --adapters-from {self.folder.parent.parent}, or another folder above the run"
                )
                hint += f"; vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; both must see {self.folder}"
                raise self._fail(error.message, hint) from error
            raise

    def _ask(self, path: str, body: Any = None) -> Any:
        """Send a request, again after a while if the server is busy or gone."""
        try:
            return ask_until_not_busy(lambda: self._server.request(path, body))
        except SlimtuneError as error:
            status, reason = get_http_status(error), error.__cause__
            is_key_missing = status in (401, 403) and path == "/v1/models"
            hint = f"set the variable {KEY_VARIABLE}" if is_key_missing else f"{START}; then train --resume"
            raise self._fail(error.message, hint) from (reason if status else error)

    def _fail(self, message: str, hint: str = "") -> RunError:
        expected = "a server that samples answers with the adapter that trains"
        return RunError(message, expected, hint, code="sampler-failed")
