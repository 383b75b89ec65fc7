"""A vLLM server that runs, asked over HTTP as its users ask it.

    tokens    POST /tokenize          what /v1/chat/completions would make of the rendered prompt
    scores    POST /v1/completions    token ids in, `prompt_logprobs` out
    answer    POST /v1/completions    temperature 0, and every other sampling setting at what changes nothing: a base's
                                      generation_config.json would set them otherwise

vLLM gives the 20 likeliest tokens of a position at most, unless it was started with a larger --max-logprobs.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from ...errors import RunError, UsageError, format_names, nearest
from . import Scores

LIKELY = 20
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0}  # fmt: skip
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class VllmServer:
    """A model that a vLLM server serves: the base, or an adapter by its name.

    Args:
        url: the server's address, `http://127.0.0.1:8000`; an ending `/v1` is taken, too.
        model: the name it serves the model by.
        likely: how many of the likeliest tokens `scores` gives; above 20 the server needs --max-logprobs.
        timeout: seconds an answer may take.
        key: what the server was started with as --api-key.

    Raises:
        UsageError: the address is none, or the server does not know the model (the nearest name is given).
        RunError: no vLLM answers there.
    """

    name = "vLLM"

    def __init__(
        self, url: str, model: str, *, likely: int = LIKELY, timeout: float = 300, key: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a server", "such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.likely, self.timeout = model, likely, timeout
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # A proxy set for the outside must not get what goes to this machine.
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._open = urllib.request.build_opener(*proxies).open
        if model not in (names := self.models()):
            raise UsageError(
                f"the vLLM server at {self.url} serves no model {model!r}{nearest(model, names)}",
                f"one of {format_names(names)}",
                f"start it with --enable-lora --lora-modules {model}=FOLDER",
            )

    def models(self) -> list[str]:
        """Return the names the server serves models by."""
        return [each["id"] for each in self._ask("/v1/models")["data"]]

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt as a chat request gets them: the template wrote its first token."""
        return self._ask("/tokenize", model=self.model, prompt=text, add_special_tokens=False)["tokens"]

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a chat that the server renders by its own template, ready for an answer."""
        return self._ask("/tokenize", model=self.model, messages=list(messages))["tokens"]

    def scores(self, ids: Sequence[int]) -> Scores:
        """Return log p of each token of a text but the first."""
        said = self._complete(ids, 1, prompt_logprobs=self.likely)["prompt_logprobs"]
        if said is None or len(said) != len(ids):
            raise RunError(f"the vLLM server at {self.url} gave no log-probabilities of the prompt", "prompt_logprobs")
        own, likely, values = [], [], []
        for token, place in zip(ids[1:], said[1:], strict=True):
            own.append(place[str(token)]["logprob"])
            # The token itself comes along even where it is not among the likeliest.
            best = sorted((e["rank"], int(i), e["logprob"]) for i, e in place.items() if e["rank"] <= self.likely)
            likely.append([i for _, i, _ in best[: self.likely]])
            values.append([value for _, _, value in best[: self.likely]])
        return Scores(
            torch.tensor(own, dtype=torch.float64), torch.tensor(likely), torch.tensor(values, dtype=torch.float64)
        )

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        """Return the likeliest continuation, token by token, without its end-of-text."""
        said = self._complete(ids, most, return_token_ids=True)
        found = said.get("token_ids")
        if found is None:
            raise RunError(f"the vLLM server at {self.url} returns no token ids", "vLLM 0.11 or newer")
        # `stop_reason` names a text or token that was asked for; the model's own end of text is none of them.
        return found[:-1] if said["finish_reason"] == "stop" else found

    def close(self) -> None:
        """Do nothing: the server is not ours to stop, and no connection stays open."""

    def _complete(self, ids: Sequence[int], most: int, **settings: Any) -> dict[str, Any]:
        asked = {"model": self.model, "prompt": list(ids), "max_tokens": most, **_NEUTRAL, **settings}
        return self._ask("/v1/completions", **asked)["choices"][0]

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None, self._headers)
        started = "start it (sh serve.sh in the export's folder), and wait until it says that startup is complete"
        try:
            with self._open(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RunError(f"the vLLM server at {self.url} refused {path}: {_said(error)}") from error
        except TimeoutError as error:
            raise RunError(f"the vLLM server at {self.url} did not answer {path} in {self.timeout:g} s") from error
        except json.JSONDecodeError as error:
            raise RunError(f"what answers at {self.url}{path} is no vLLM server: no JSON came back") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise RunError(f"no vLLM server answers at {self.url}: {reason}", "a running server", started) from error


def _said(error: urllib.error.HTTPError) -> str:
    """Return the server's own words, which lie in the JSON of its answer."""
    text = error.read().decode(errors="replace")
    try:
        said = json.loads(text)
        return f"{error.code}, {said['error']['message'] if 'error' in said else said.get('detail', text)}"[:600]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{error.code}, {text[:300]}"
