"""`slimtune verify`: what of a run, or of an export, can be asked here, and the asking.

    a run, an adapter    merged folder · adapter GGUF beside its base, in llama.cpp · merged GGUF
    an export            what lies in it
    either               a vLLM server, if its address is given

What cannot be asked is said, with what is missing; it never counts as passed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, RunError, SlimtuneError, UsageError
from ..models.loader import load_base
from ..models.quantization import dequantize_model
from ..setup import TrainedModel, load_run
from . import merge as merging
from . import proof
from .engines import Engine
from .engines.llama_cpp import LlamaCpp
from .engines.transformers import Transformers
from .engines.vllm import VllmServer
from .folder import read_note
from .gguf import write_adapter
from .gguf_model import converted, like
from .verify import LIMITS, Limit, Text, Trained, Verdict, as_near, gate

ADAPTER, MODEL = "adapter.gguf", "model.gguf"
"""Names of GGUF files in exports."""
POSITIONS = 300
"""Next tokens to compare, about: llama.cpp tells of one at a time."""


def verify(
    path: Path,
    *,
    rows: Path | None = None,
    vllm: str | None = None,
    vllm_model: str | None = None,
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compare whatever of a run or an export can be asked here with the trained adapter.

    Args:
        path: a run folder, an adapter folder, or a folder that `slimtune export` or `slimtune merge` wrote.
        rows: a file of rows to compare on; None: the run's validation (else test) rows. Fixed questions come first.
        vllm: URL of a vLLM server that serves the adapter or the merged model.
        vllm_model: its name there; None: the export's, or the run folder's.
        threads: of llama.cpp; None: half of the cores.
        say: told what is being done.

    Returns:
        `run`, `path`, `passed`, and `checks`: the fields of each `Verdict`.

    Raises:
        UsageError: neither a run nor an export lies there.
        AdapterError: the adapter does not fit its base.
    """
    path = Path(path)
    note = read_note(path)
    run = note["run"] if note else path
    if note and not run.exists():
        raise UsageError(
            f"{path} was made from {run}, which is not there any more", "the run: it is what an export is compared with"
        )
    loaded = load_trained(run)
    with tempfile.TemporaryDirectory(prefix="slimtune-verify-") as made:
        bench = Bench(loaded, run, Path(made), rows, threads, say)
        checks = [*bench.export(path, note)] if note else [*bench.everything()]
        if vllm:
            facts = note or {}
            served, dtype = vllm_model or str(facts.get("name", run.resolve().name)), facts.get("dtype")
            if dtype and (loaded.base.quantization or dtype != str(loaded.base.dtype).removeprefix("torch.")):
                # The base as it is served, not as the run held it: another rounding of it is no fault of the adapter.
                bench = Bench(load_trained(run, dtype), run, Path(made), rows, threads, say)
            precision = PRECISION[str(bench.loaded.base.dtype).removeprefix("torch.")]
            checks.append(bench.asked("vLLM", precision, lambda: _server(vllm, served), _limit(facts)))
    verdicts = [c.facts() for c in checks]
    asked = [c for c in checks if c.passed is not None]
    passed = bool(asked) and all(c.passed for c in asked) and not (vllm and checks[-1].passed is None)
    return {"path": str(path), "run": str(run), "passed": passed, "checks": verdicts}


def load_trained(run: Path, dtype: str | None = None) -> TrainedModel:
    """Load a run's adapter on its base, on the CPU; in fp32 where the model is small.

    Args:
        run: a run folder, or an adapter folder.
        dtype: what the base's weights are rounded to, none of them quantized; None: as it was trained on. A base that
            was quantized then has the values it had, as plain floats: those of an export are no others.
    """
    quantization = None if dtype is None else "none"
    loaded = load_run(
        run, dtype=dtype or merging._trained_dtype(run), device="cpu", quantization=quantization, unpack=True
    )
    model: Any = loaded.model
    if sum(p.numel() for p in model.parameters()) < merging.SMALL:
        model.to(torch.promote_types(loaded.base.dtype, torch.float32))
    return loaded


class Bench:
    """The trained adapter, and a folder to make in what has to be made for a comparison.

    Args:
        loaded: the adapter on its base.
        run: where it came from.
        folder: for files that are gone afterwards.
        rows, threads, say: see `verify`.
    """

    def __init__(
        self,
        loaded: TrainedModel,
        run: Path,
        folder: Path,
        rows: Path | None = None,
        threads: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.loaded, self.run, self.folder, self.threads, self.say = loaded, run, folder, threads, say
        model: Any = loaded.model
        self.model = model
        tokenizer, config = loaded.base.tokenizer, model.config.get_text_config()
        texts: list[Text] = []
        for talk in proof.talks(loaded.recipe, rows):
            ids = proof.token_ids(tokenizer, talk, config)
            if len(ids) > 1 and sum(len(t.ids) - 1 for t in texts) < POSITIONS:
                texts.append(Text(proof.prompt(tokenizer, talk), ids))
        self.trained = Trained(model, tokenizer, texts)

    def everything(self) -> Iterator[Verdict]:
        """Ask whatever the adapter could ship as."""
        merged = self.folder / "merged"
        dtype = str(self.loaded.base.dtype).removeprefix("torch.")
        yield self.asked("merged folder", PRECISION[dtype], lambda: self._merged_now(merged))
        adapter = self.folder / ADAPTER
        yield self.asked("llama.cpp, adapter GGUF", "f32", lambda: self._beside_base(self._written(adapter)))
        yield self.asked("llama.cpp, merged GGUF", "f16", lambda: self._whole_gguf(self.folder / MODEL, "f16"))

    def export(self, path: Path, note: dict[str, Any]) -> Iterator[Verdict]:
        """Ask what lies in an export."""
        kind, precision = note["kind"], str(note.get("precision", "f32"))
        limit = _limit(note)
        if kind == "merged":
            yield self.asked("merged folder", PRECISION[note["dtype"]], lambda: self._folder(path))
        elif (path / ADAPTER).is_file():
            yield self.asked("llama.cpp, adapter GGUF", precision, lambda: self._beside_base(path / ADAPTER), limit)
        elif (path / MODEL).is_file():
            yield self.asked("llama.cpp, merged GGUF", precision, lambda: self._llama(path / MODEL))
        elif kind == "vllm":
            yield self.asked("adapter folder, read back", "f32", lambda: self._read_back(path), limit)
        else:
            yield Verdict(kind, precision, reason=f"nothing in {path} can be asked")

    def asked(self, name: str, precision: str, make: Callable[[], Engine], limit: Limit | None = None) -> Verdict:
        """Make an engine and ask it; what cannot be made is a verdict, too."""
        self.say(f"asking {name}")
        if limit is None and self.model.dtype in (torch.float16, torch.bfloat16) and precision == "f32":
            limit = LIMITS[PRECISION[str(self.model.dtype).removeprefix("torch.")]]  # a large model's own arithmetic
        if limit is None and self.loaded.base.quantization and precision == "f32":
            # Values from few bits make more of an engine's own arithmetic: base alone, SmolLM2 in NF4 is 0.0027 nats
            # from llama.cpp on average, where fp32 is 3e-6 from fp64.
            limit = LIMITS["f16"]
        try:
            with closing(make()) as engine:
                engine.name = name
                return gate(self.trained, engine, precision, limit=limit)
        except (ModelError, UsageError) as error:
            return Verdict(name, precision, reason=f"not checked: {_in_one_line(error)}")
        except SlimtuneError as error:
            return Verdict(name, precision, passed=False, reason=_in_one_line(error))

    def _merged_now(self, out: Path) -> Engine:
        config = self.model.active_peft_config
        if not config.mergeable:
            raise UsageError(f"{config.name} is no change of weights, and cannot be merged")
        merging.merge(self.run, out)
        return self._folder(out)

    def _folder(self, folder: Path) -> Engine:
        base = load_base(str(folder), dtype=self.model.dtype, device="cpu")
        if base.tokenizer.chat_template != self.loaded.base.tokenizer.chat_template:
            raise RunError(f"{folder} has another chat template than the run was trained with")
        return Transformers("merged folder", base.model, base.tokenizer)

    def _read_back(self, folder: Path) -> Engine:
        base = self.loaded.base
        dtype, quantization = str(base.dtype).removeprefix("torch."), base.quantization
        loaded = load_run(folder, dtype=dtype, device="cpu", quantization=quantization, unpack=True)
        model: Any = loaded.model
        return Transformers("adapter folder", model.to(self.model.dtype), loaded.base.tokenizer)

    def _written(self, file: Path) -> Path:
        write_adapter(file, self.model)
        return file

    def _beside_base(self, adapter: Path) -> Engine:
        base = self.folder / "base.gguf"
        if not base.is_file():
            try:
                base_gguf(self.loaded, base)
            except RunError as error:  # nothing is said of the adapter
                raise ModelError(
                    f"the base could not be made a GGUF: {error.message}", error.expected, error.hint
                ) from error
        return self._llama(base, adapter)

    def _whole_gguf(self, file: Path, precision: str) -> Engine:
        config = self.model.active_peft_config
        if not config.mergeable:
            raise UsageError(f"{config.name} is no change of weights, and cannot be merged")
        merged_gguf(self.loaded, self.run, file, precision)
        return self._llama(file)

    def _llama(self, model: Path, adapter: Path | None = None) -> Engine:
        longest = max(len(t.ids) for t in self.trained.texts) + 64
        return LlamaCpp(model, adapter, longest=longest, threads=self.threads)


PRECISION = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f32"}


def merged_gguf(loaded: TrainedModel, run: Path, file: Path, precision: str) -> int:
    """Write base and adapter as one GGUF; return its bytes. The model is as it was afterwards, bit for bit.

    Raises:
        AdapterError: the adapter is no change of weights, or holds numbers that are not finite.
        UsageError, ModelError, RunError: as `like` and `converted`.
    """
    source, model = loaded.base.source, loaded.model
    if source.kind != "gguf":
        with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=file.parent) as folder:
            merging.merge(run, Path(folder, "merged"))
            return converted(Path(folder, "merged"), file, precision)
    with merging._refusals(run):
        model.merge_adapter(safe_merge=True)
    try:
        return like(Path(source.path), model, file, precision)
    finally:
        model.unmerge_adapter()


def base_gguf(loaded: TrainedModel, file: Path) -> int:
    """Write the base an adapter was trained on as one GGUF in f32; return its bytes."""
    source = loaded.base.source
    if source.kind == "gguf":
        return like(Path(source.path), loaded.model, file, "f32")
    with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=file.parent) as folder:
        base = load_base(source.spec, dtype=loaded.base.dtype, device="cpu", quantization=loaded.base.quantization)
        if base.quantization is not None:
            dequantize_model(base.model, base.dtype)
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return converted(Path(folder), file, "f32")


def _limit(note: Mapping[str, Any]) -> Limit | None:
    return as_near(note["conversion"]["error"]) if "conversion" in note else None


def _server(url: str, model: str) -> Engine:
    try:
        return VllmServer(url, model)
    except RunError as error:  # nobody there: nothing is said of the adapter
        raise ModelError(error.message, error.expected, error.hint) from error


def _in_one_line(error: Exception) -> str:
    got, fix = getattr(error, "message", str(error)), getattr(error, "hint", "")
    return " ".join(f"{got}{f' ({fix})' if fix else ''}".split())
