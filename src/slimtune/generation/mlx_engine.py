"""A model folder in mlx-lm, alone or with an adapter of mlx-lm: scored and continued in a process of its own.

mlx-lm runs on a Mac's GPU, and on the CPU under Linux (the package `mlx-cpu`). It has a process of its own because
importing it lowers the number of files that a process may open, and because MLX ends the process where a kernel fails.
Parent and worker exchange one line of JSON for each question. Weights are widened to float32 before they are used, and
quantized ones unpacked by mlx-lm's own `dequantize_model`, so that a difference comes from the files and not from the
arithmetic of 16 bits.
"""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError, RunError, format_install_command
from .inference_engines import TOP_K, TextTokenScores


def is_mlx_lm_installed() -> bool:
    """Return whether mlx-lm is installed; on Linux it also needs `mlx-cpu`, which only an import shows."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


class MlxEngine:
    """A model in mlx-lm.

    Args:
        model: the folder that `mlx_lm.load` takes: of a base or of a merged model, quantized or not.
        adapter: a folder with `adapters.safetensors`; None: the model alone.
        base_dtype: dtype to which the model's weights are rounded before they are widened to float32; "": none.

    Raises:
        ModelError: mlx-lm is not installed, or cannot be imported.
        RunError: mlx-lm cannot load the files.
    """

    name = "mlx-lm"

    def __init__(self, model: Path, adapter: Path | None = None, *, base_dtype: str = "") -> None:
        require_mlx_lm()
        self.model, self.base_dtype = model, base_dtype
        self._loaded = [str(model), str(adapter or ""), base_dtype]
        try:
            self._ask("load", None)
        except RunError as error:
            names = f"{model} with {adapter}" if adapter is not None else str(model)
            raise RunError(f"mlx-lm cannot load {names}: {error.message}", "files that mlx-lm reads") from error

    @property
    def rounds_embedding_scale(self) -> bool:
        """Whether mlx-lm rounds the factor of the embedding to bfloat16, also in float32: 25.25 for √640 of Gemma 3."""
        return json.loads((self.model / "config.json").read_text()).get("model_type") in ("gemma3", "gemma3_text")

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt; the template wrote the beginning-of-sequence token."""
        return [int(i) for i in self._ask("tokenize", text)]

    def tokenize_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a chat that the folder's own template renders, ready for an answer."""
        return [int(i) for i in self._ask("tokenize_chat", list(messages))]

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        import torch

        own, top_ids, top = self._ask("score", list(ids))
        return TextTokenScores(
            torch.tensor(own, dtype=torch.float64), torch.tensor(top_ids), torch.tensor(top, dtype=torch.float64)
        )

    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Any:
        return self.score(ids).token_log_probs[[i - 1 for i in indices]]

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        return [int(i) for i in self._ask("generate", [list(ids), max_new_tokens])]

    def without_adapter(self) -> "MlxEngine":
        """Return another engine on the same model, without its adapter."""
        return MlxEngine(self.model, base_dtype=self.base_dtype)

    def close(self) -> None:
        """Release the model; the process stays for the next one."""
        if _MlxWorker.running is not None:
            _MlxWorker.running.ask("release", [])

    def _ask(self, question: str, value: Any) -> Any:
        return _MlxWorker.get().ask(question, [self._loaded, value])


def convert_to_mlx_folder(
    source: Path, target: Path, dtype: str, bits: int | None = None, group_size: int | None = None
) -> None:
    """Write a Hugging Face folder as an MLX folder, its weights, or the scales of quantized ones, in a dtype.

    Raises:
        ModelError: mlx-lm is not installed.
        RunError: it cannot convert the folder.
    """
    try:
        _MlxWorker.get().ask("convert", [str(source), str(target), dtype, bits, group_size])
    except RunError as error:
        raise RunError(
            f"mlx-lm cannot convert the model: {error.message}", "an architecture that mlx-lm has"
        ) from error


class _MlxWorker:
    """The process with mlx-lm: one, which serves one engine after the other, because its start takes seconds."""

    running: "_MlxWorker | None" = None

    def __init__(self) -> None:
        require_mlx_lm()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `stop`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_make_worker_environment(),
        )

    @classmethod
    def get(cls) -> "_MlxWorker":
        """Return the worker, started if there is none."""
        if cls.running is None:
            cls.running = cls()
            atexit.register(cls.running.stop)
        return cls.running

    def ask(self, question: str, values: Sequence[Any]) -> Any:
        """Return the answer to a question.

        Raises:
            ModelError: mlx-lm cannot be imported.
            RunError: mlx-lm raised an error, or its process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # its last words are read below
            self._process.stdin.write(json.dumps([question, *values], allow_nan=False) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            words = self._log.read().strip().splitlines() or [f"exit code {code}"]
            self.stop()
            raise RunError(f"mlx-lm ended: {words[-1]}", "a model that mlx-lm computes")
        answer, error = json.loads(line)
        if error.startswith("ImportError"):
            raise ModelError(f"mlx-lm cannot be imported: {error}", "mlx-cpu on Linux", format_install_command("mlx"))
        if error:
            raise RunError(error, "files that mlx-lm reads")
        return answer

    def stop(self) -> None:
        """End the process."""
        _MlxWorker.running = None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
        self._log.close()


def _make_worker_environment() -> dict[str, str]:
    """Return the environment of the worker, in which MLX multiplies matrices by torch's BLAS under Linux.

    The wheel `mlx-cpu` has the reference BLAS, whose `cblas_sgemm` calls the symbol `sgemm_`: 2.4 s for the head of
    SmolLM2 over 61 tokens on one core, where torch's takes 0.11 s. A library that cannot be preloaded is ignored.
    """
    environment, torch = dict(os.environ), importlib.util.find_spec("torch")
    if sys.platform == "linux" and torch is not None and torch.origin is not None:
        blas = str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so")
        environment["LD_PRELOAD"] = f"{environment.get('LD_PRELOAD', '')} {blas}".strip()
    return environment


def require_mlx_lm() -> None:
    """Raise ModelError unless mlx-lm is installed."""
    if not is_mlx_lm_installed():
        raise ModelError("mlx-lm is not installed", "the packages mlx-lm and mlx", format_install_command("mlx"))


# --- the worker ------------------------------------------------------------------------------------------------------


class _MlxLm:
    """Answers the questions: each method is one."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.model: Any = None
        self.tokenizer: Any = None

    def load(self, names: list[str], _: None) -> None:
        """Load a model folder, with an adapter folder or "", its weights rounded to a dtype or ""."""
        if names == self.loaded:
            return
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.utils import dequantize_model, load, load_adapters

        self.release()
        model_folder, adapter_folder, base_dtype = names
        if not os.path.isdir(model_folder):
            raise FileNotFoundError(f"there is no folder {model_folder}")  # mlx-lm would look for it in the Hub
        loaded: Any = load(model_folder, lazy=True)
        model, self.tokenizer = loaded

        def widen(values: Any) -> Any:
            if not mx.issubdtype(values.dtype, mx.floating):
                return values
            return (values.astype(getattr(mx, base_dtype)) if base_dtype else values).astype(mx.float32)

        model.update(tree_map(widen, model.parameters()))
        model = dequantize_model(model)
        if adapter_folder:
            load_adapters(model, adapter_folder)
        model.eval()
        self.model, self.loaded = model, names

    def release(self) -> None:
        """Forget the model."""
        self.loaded, self.model, self.tokenizer = [], None, None

    def tokenize(self, names: list[str], text: str) -> list[int]:
        """Return a rendered prompt's ids."""
        self.load(names, None)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def tokenize_chat(self, names: list[str], messages: list[dict[str, str]]) -> list[int]:
        """Return a chat's ids."""
        self.load(names, None)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def score(self, names: list[str], ids: list[int]) -> tuple[list[float], list[list[int]], list[list[float]]]:
        """Return the log-probabilities of a text's tokens but the first, and the likeliest tokens with theirs."""
        import mlx.core as mx

        self.load(names, None)
        logits = self.model(mx.array([ids]))[0, :-1]
        own, top_ids, top = [], [], []
        for start in range(0, len(ids) - 1, 32):  # 256 × 128,000 in float64 would be 262 MB
            rows = np.array(logits[start : start + 32].astype(mx.float32)).astype(np.float64)
            highest = rows.max(1, keepdims=True)
            rows = rows - highest - np.log(np.exp(rows - highest).sum(1, keepdims=True))
            following = np.array(ids[start + 1 : start + 1 + len(rows)])
            best = np.argpartition(-rows, min(TOP_K, rows.shape[1]) - 1, 1)[:, :TOP_K]
            own += rows[np.arange(len(rows)), following].tolist()
            top_ids += best.tolist()
            top += np.take_along_axis(rows, best, 1).tolist()
        return own, top_ids, top

    def generate(self, names: list[str], request: tuple[list[int], int]) -> list[int]:
        """Return a prompt's greedy continuation without its end."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self.load(names, None)
        (ids, count), found = request, []
        for token, _ in generate_step(mx.array(ids), self.model, max_tokens=count):
            if int(token) in self.tokenizer.eos_token_ids:
                break
            found.append(int(token))
        return found

    def convert(self, source: str, target: str, dtype: str, bits: int | None, group_size: int | None) -> None:
        """Write a Hugging Face folder as an MLX folder, by the steps of mlx-lm's `convert`, in another order.

        It rounds to 16 bits before it quantizes, which takes 14 to 35 % of what a short training changed from the
        matrices of SmolLM2. Quantized first, and the scales rounded then, 3 to 4 % are lost in 8 bits.
        """
        import mlx.core as mx
        from mlx.utils import tree_map_with_path
        from mlx_lm.utils import load, quantize_model, save

        loaded: Any = load(source, return_config=True, lazy=True)
        model, tokenizer, config = loaded
        if bits is not None:
            model, config = quantize_model(model, config, group_size, bits)
        is_cast = getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, values: Any) -> Any:
            is_float = mx.issubdtype(values.dtype, mx.floating)
            return values.astype(getattr(mx, dtype)) if is_float and is_cast(name) else values

        model.update(tree_map_with_path(cast, model.parameters()))
        save(target, source, model, tokenizer, config)


def _serve() -> None:
    """Answer each line of stdin, a question and its values, by a line with the answer and "", or null and an error."""
    out, model = os.fdopen(os.dup(1), "w"), _MlxLm()
    os.dup2(2, 1)  # whatever mlx-lm prints goes to stderr
    for line in sys.stdin:
        question, *values = json.loads(line)
        try:
            answer = json.dumps([getattr(model, question)(*values), ""], allow_nan=False)
        except ImportError as e:
            answer = json.dumps([None, f"ImportError: {e}"], allow_nan=False)
        except Exception as e:  # mlx-lm raises many kinds
            answer = json.dumps([None, f"{type(e).__name__}: {' '.join(str(e).split())}"], allow_nan=False)
        out.write(answer + "\n")
        out.flush()


if __name__ == "__main__":
    _serve()
