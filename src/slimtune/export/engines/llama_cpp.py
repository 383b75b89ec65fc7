"""llama.cpp, which is also what Ollama runs: its own server, started in this process by the package xllamacpp.

The server scores what it samples, so each token of a text is forced by a large bias and its log p read, which the
server takes from the logits before any bias; what came before in that text is kept in its cache.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ModelError, RunError
from . import Scores

PACKAGE = "xllamacpp"
_FORCED = 1e5
_EVERY = 1 << 22
_QUIET = -1


def installed() -> bool:
    """Return whether the package that brings llama.cpp is there."""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp:
    """A GGUF in llama.cpp, with an adapter's GGUF beside it or without.

    Keys and values are kept in f32, so that what differs is the file and not the cache.

    Args:
        model: a GGUF of the whole model.
        adapter: a GGUF of an adapter.
        longest: tokens of the longest text, answers included.
        likely: how many of the likeliest tokens `scores` gives.
        threads: None: half of the cores. Threads wait for one another, and one whose core is busy stops all of them.

    Raises:
        ModelError: xllamacpp is not installed.
        RunError: llama.cpp cannot load the files.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        longest: int = 1024,
        likely: int = 64,
        threads: int | None = None,
    ) -> None:
        if not installed():
            raise ModelError(
                f"llama.cpp is not here: the package {PACKAGE} is not installed", hint="pip install xllamacpp"
            )
        import xllamacpp

        self.name = "llama.cpp, base and adapter" if adapter else "llama.cpp"
        self.likely, self._began = likely, False
        params: Any = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = longest, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or max(1, (os.cpu_count() or 1) // 2)
        params.verbosity, params.warmup, params.fit_params = _QUIET, False, False
        # Else states of an earlier text are taken up again where windows slide, and give wrong numbers.
        params.n_ctx_checkpoints = params.cache_ram_mib = 0
        if adapter is not None:
            beside = xllamacpp.CommonAdapterLoraInfo()
            beside.path, beside.scale = str(adapter), 1.0
            params.lora_adapters = [beside]
        try:
            self.server: Any = xllamacpp.Server(params)
        except Exception as error:
            files = f"{model} with {adapter}" if adapter else str(model)
            raise RunError(
                f"llama.cpp cannot load {files}: {error}", "a GGUF, and an adapter of the same base"
            ) from error

    def tokens(self, text: str) -> list[int]:
        """Return the ids llama.cpp makes of a rendered prompt, with the beginning of text it adds by itself.

        Where the template wrote one and llama.cpp adds another, its chat takes the template's away, and so does this.
        """
        said = [
            self._ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]
            for special in (True, False)
        ]
        return said[1] if said[0][1:] == said[1] and said[0][:1] == said[1][:1] else said[0]

    def scores(self, ids: Sequence[int]) -> Scores:
        """Return log p of each token of a text but the first."""
        own, likely, values = [], [], []
        for at in range(1, len(ids)):
            log_p, top = self._score(ids[:at], ids[at])
            own.append(log_p)
            likely.append([each["id"] for each in top[: self.likely]])
            values.append([each["logprob"] for each in top[: self.likely]])
        return Scores(*(torch.tensor(t, dtype=d) for t, d in zip((own, likely, values), _KINDS, strict=True)))

    def _score(self, before: Sequence[int], token: int) -> tuple[float, list[dict[str, Any]]]:
        """Return log p of a token, and of the likeliest ones."""
        if said := self._forced(before, token, self.likely):
            return said["logprob"], said["top_logprobs"]
        # The server says nothing of a token that ends within a character: all of them are asked for, after a whole one.
        every = self._forced(before, self.tokens("a")[-1], _EVERY)
        found = {} if every is None else {each["id"]: each["logprob"] for each in every["top_logprobs"]}
        if every is None or token not in found:
            raise RunError(f"llama.cpp says nothing of token {token}", "a token of its vocabulary")
        return found[token], every["top_logprobs"]

    def _forced(self, before: Sequence[int], token: int, likely: int) -> dict[str, Any] | None:
        answer = self._next(before, len(before) > 1, n_probs=likely, logit_bias=[[token, _FORCED]])
        said = answer.get("completion_probabilities")
        return said[0] if said and said[0]["id"] == token else None

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        """Return the likeliest continuation, token by token, without its end-of-text."""
        said = self._next(ids, n_predict=most, return_tokens=True)
        return said["tokens"][:-1] if said["stop_type"] == "eos" else said["tokens"]

    def close(self) -> None:
        """Stop the server.

        Stopped before its loop began it would wait for itself for ever, so one that was asked nothing is asked first.
        """
        if not self._began:
            self._next([0])
        self.server = None
        gc.collect()

    def _next(self, ids: Sequence[int], follows: bool = False, **settings: Any) -> dict[str, Any]:
        """Ask for what comes next; `follows`: these are the tokens asked about last, and some more.

        Of another text nothing must be taken from the cache: where windows slide, llama.cpp gives wrong numbers then.
        """
        self._began = True
        asked = {"n_predict": 1, "prompt": list(ids), "temperature": 0.0, "samplers": ["temperature"]}
        return self._ask("/completion", **{**asked, "cache_prompt": follows, **settings})

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise RunError(f"llama.cpp refused {path}: {said[:300]}") from error
        except OSError as error:
            raise RunError(f"llama.cpp did not answer {path}: {error}") from error


_KINDS = (torch.float64, torch.int64, torch.float64)
