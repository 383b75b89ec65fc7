"""Log-probabilities of a whole text in one pass of llama.cpp, by its library (the package `llama-cpp-py-sync`).

llama.cpp's server gives a probability only of a token that it samples, one at a time: a file of held-out rows takes
minutes. The library gives the logits of every position of a pass. It runs in a process of its own, because llama.cpp
ends the process where an assertion fails. Parent and worker exchange a line of JSON for each text.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from .llama_cpp_tools import LlamaCppToolFailedError

PASS_TOKENS = 512
"""Of a text that are computed together; so the logits of at most as many positions are in memory."""


class LlamaCppScorer:
    """Scores tokens of texts by a GGUF in llama.cpp, on the CPU.

    Keys and values are cached in float32, so that a difference comes from the file and not from the cache.

    Args:
        model: the GGUF of a whole model.
        adapter: the GGUF of an adapter beside it; None: the model alone.
        max_tokens: of the longest text.
        threads: None: half of the cores. The threads wait for one another, so one on a busy core slows all.
        pass_tokens: of a text that are computed together.

    Raises:
        RunError: llama.cpp cannot load the file.
    """

    name = "llama.cpp"

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        max_tokens: int,
        threads: int | None = None,
        pass_tokens: int = PASS_TOKENS,
    ) -> None:
        numbers = (max_tokens, threads or max(1, (os.cpu_count() or 1) // 2), pass_tokens)
        command = [sys.executable, "-m", __name__, str(model), str(adapter or ""), *map(str, numbers)]
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `close`)
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self._read_line()
        except LlamaCppToolFailedError as error:
            self.close()
            raise RunError(f"llama.cpp cannot load {model}: {error.message}", "a GGUF") from error

    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Any:
        """Return the log-probabilities of a text's tokens at some indices, 1 or more, ascending, in float64."""
        import torch

        assert self._worker.stdin is not None
        try:
            self._worker.stdin.write(json.dumps([list(ids), list(indices)], allow_nan=False) + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are read below
        return torch.tensor(self._read_line(), dtype=torch.float64)

    def close(self) -> None:
        """End the worker."""
        for pipe in (self._worker.stdin, self._worker.stdout):
            assert pipe is not None
            pipe.close()
        self._worker.wait()
        self._log.close()

    def _read_line(self) -> Any:
        """Return the worker's next answer; raise LlamaCppToolFailedError with its last words if it has ended."""
        assert self._worker.stdout is not None
        if line := self._worker.stdout.readline():
            return json.loads(line)
        code = self._worker.wait()
        self._log.seek(0)
        words = self._log.read().strip().splitlines() or [f"exit code {code}"]
        raise LlamaCppToolFailedError(f"llama.cpp ended: {words[-1]}", "an architecture that it knows")


# --- the worker ------------------------------------------------------------------------------------------------------


def _serve_scores(model_file: str, adapter_file: str, max_tokens: int, threads: int, pass_tokens: int) -> None:
    """Read a text's ids and indices from each line of stdin; write the log-probabilities there to stdout."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to stderr
    ffi, library = get_ffi(), get_lib()
    library.llama_backend_init()
    model = library.llama_model_load_from_file(os.fsencode(model_file), library.llama_model_default_params())
    if model == ffi.NULL:
        sys.exit(1)  # llama.cpp has printed why
    params = library.llama_context_default_params()
    params.n_ctx = max_tokens
    params.n_batch = params.n_ubatch = min(max_tokens, pass_tokens)
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = library.GGML_TYPE_F32
    params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = True
    context = library.llama_init_from_model(model, params)
    if context == ffi.NULL:
        sys.exit(1)
    if adapter_file:
        adapter = library.llama_adapter_lora_init(model, os.fsencode(adapter_file))
        one = [ffi.new("struct llama_adapter_lora *[]", [adapter]), ffi.new("float[]", [1.0])]
        if adapter == ffi.NULL or library.llama_set_adapters_lora(context, one[0], 1, one[1]):
            sys.exit(1)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    batch = library.llama_batch_init(pass_tokens, 0, 1)
    out.write("[]\n")
    out.flush()
    for line in sys.stdin:
        ids, indices = json.loads(line)
        wanted = {i - 1 for i in indices}  # the logits before a token are its distribution
        library.llama_memory_clear(library.llama_get_memory(context), True)
        found = []
        for start in range(0, len(ids), pass_tokens):
            part = ids[start : start + pass_tokens]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = start + i in wanted
            if code := library.llama_decode(context, batch):
                sys.exit(f"llama_decode returned {code}")
            for i in range(len(part)):
                if batch.logits[i]:
                    row = ffi.buffer(library.llama_get_logits_ith(context, i), 4 * size)
                    logits = np.frombuffer(row, np.float32).astype(np.float64)
                    highest = logits.max()
                    total = highest + np.log(np.exp(logits - highest).sum())
                    found.append(logits[ids[start + i + 1]] - total)
        out.write(json.dumps(found, allow_nan=False) + "\n")
        out.flush()


if __name__ == "__main__":
    model, adapter, *numbers = sys.argv[1:]
    _serve_scores(model, adapter, *map(int, numbers))
