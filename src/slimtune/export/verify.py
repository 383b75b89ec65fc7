"""Check everything of a run or an export that can be asked here: `slimtune verify`.

    a run or adapter folder   merged folder · adapter GGUF beside its base in llama.cpp · merged GGUF in llama.cpp
    an export                 what is in it
    either                    a vLLM server, if its address is given

What cannot be checked is reported with the reason, and never counts as passed.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, RunError, SlimtuneError, UsageError
from ..models.loader import load_base
from ..setup import TrainedModel, load_run
from . import merge as merging
from .engines import Engine, LlamaCppEngine, TransformersEngine, VllmClient
from .gguf import write_adapter_gguf
from .manifest import ADAPTER_GGUF, MODEL_GGUF, read_manifest
from .reference import PRECISIONS, Reference, Tolerance, Verdict, compare_engine, get_tolerance, make_texts


def verify(
    path: Path,
    *,
    rows: Path | None = None,
    vllm: str | None = None,
    vllm_model: str | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compare everything of a run or an export that can be asked here with the trained adapter.

    Args:
        path: a run folder, an adapter folder, or a folder that `slimtune export` or `slimtune merge` wrote.
        rows: a file of rows to compare on, after fixed questions; None: the run's validation (else test) rows.
        vllm, vllm_model: URL of a vLLM server, and the model's name there (by default the export's or the folder's).
        threads: of llama.cpp; None: half of the cores.
        log: gets progress messages.

    Returns:
        `path`, `run`, `passed`, and `checks`: the fields of each `Verdict`.
    """
    path = Path(path)
    manifest = read_manifest(path) or {}
    run = manifest.get("run", path)
    if not run.exists() and manifest:
        raise UsageError(f"{path} was made from {run}, which does not exist any more", "the run to compare it with")
    with tempfile.TemporaryDirectory(prefix="slimtune-verify-") as folder:
        verifier = Verifier(merging.load_trained(run), run, Path(folder), rows, threads, log)
        checks = [*(verifier.verify_export(path, manifest) if manifest else verifier.export_and_verify_all())]
        if vllm:
            dtype, base = manifest.get("dtype"), verifier.loaded.base
            if dtype and (base.quantization or dtype != str(base.dtype).removeprefix("torch.")):
                # Compare on the base as it is served: its other rounding is not a fault of the adapter.
                verifier = Verifier(merging.load_trained(run, dtype), run, Path(folder), rows, threads, log)
            name = vllm_model or str(manifest.get("name", run.resolve().name))
            precision, tolerance = PRECISIONS[verifier.loaded.base.dtype], _get_conversion_tolerance(manifest)
            checks.append(verifier.verify_engine("vLLM", precision, lambda: VllmClient(vllm, name), tolerance))
    checked = [c for c in checks if c.passed is not None]
    passed = bool(checked) and all(c.passed for c in checked) and not (vllm and checks[-1].passed is None)
    return {"path": str(path), "run": str(run), "passed": passed, "checks": [asdict(c) for c in checks]}


@dataclass
class Verifier:
    """Opens engines on what a run exports to, and compares each with the trained adapter; arguments as for `verify`."""

    loaded: TrainedModel
    run: Path
    folder: Path  # for temporary files; the caller deletes it
    rows: Path | None = None
    threads: int | None = None
    log: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        model: Any = self.loaded.model
        tokenizer = self.loaded.base.tokenizer
        texts = make_texts(tokenizer, self.loaded.recipe, model.config.get_text_config(), self.rows)
        self.model, self.reference = model, Reference(model, tokenizer, texts)

    def export_and_verify_all(self) -> Iterator[Verdict]:
        """Export to every format, and check each."""
        merged, adapter, whole = (self.folder / name for name in ("merged", ADAPTER_GGUF, MODEL_GGUF))

        def open_merged() -> Engine:
            self._require_mergeable()
            merging.merge(self.run, merged)
            return self._open_merged(merged)

        def open_adapter() -> Engine:
            write_adapter_gguf(adapter, self.model)
            return self._open_beside_base(adapter)

        def open_whole() -> Engine:
            self._require_mergeable()
            merging.write_merged_gguf(self.loaded, self.run, whole, "f16")
            return self._open_llama_cpp(whole)

        yield self.verify_engine("merged folder", PRECISIONS[self.loaded.base.dtype], open_merged)
        yield self.verify_engine("llama.cpp, adapter GGUF", "f32", open_adapter)
        yield self.verify_engine("llama.cpp, merged GGUF", "f16", open_whole)

    def verify_export(self, path: Path, manifest: dict[str, Any]) -> Iterator[Verdict]:
        """Check what an export folder contains."""
        precision, tolerance = str(manifest.get("precision", "f32")), _get_conversion_tolerance(manifest)
        adapter, model = path / ADAPTER_GGUF, path / MODEL_GGUF
        if manifest["kind"] == "merged":
            precision = next(p for dtype, p in PRECISIONS.items() if str(dtype) == f"torch.{manifest['dtype']}")
            yield self.verify_engine("merged folder", precision, lambda: self._open_merged(path))
        elif adapter.is_file():
            engine = "llama.cpp, adapter GGUF"
            yield self.verify_engine(engine, precision, lambda: self._open_beside_base(adapter), tolerance)
        elif model.is_file():
            yield self.verify_engine("llama.cpp, merged GGUF", precision, lambda: self._open_llama_cpp(model))
        elif manifest["kind"] == "vllm":
            yield self.verify_engine("adapter folder, read back", "f32", lambda: self._open_adapter(path), tolerance)
        else:
            yield Verdict(manifest["kind"], precision, reason=f"{path} contains nothing that can be checked")

    def verify_engine(
        self, name: str, precision: str, open_engine: Callable[[], Engine], tolerance: Tolerance | None = None
    ) -> Verdict:
        """Open an engine and compare it; one that cannot be opened gives a verdict, too."""
        self.log(f"checking {name}")
        if tolerance is None and self.loaded.base.quantization:
            # Dequantized values amplify an engine's own arithmetic: SmolLM2 in NF4, without an adapter, is 0.0027 nats
            # from llama.cpp on average, where float32 is 3e-6 from float64.
            tolerance = get_tolerance(precision, PRECISIONS[self.model.dtype], "f16")
        try:
            with closing(open_engine()) as engine:
                engine.name = name
                return compare_engine(self.reference, engine, precision, tolerance)
        except SlimtuneError as error:
            reason = " ".join(f"{error.message}{f' ({error.hint})' if error.hint else ''}".split())
            if isinstance(error, ModelError | UsageError):  # says nothing about the adapter
                return Verdict(name, precision, reason=f"not checked: {reason}")
            return Verdict(name, precision, passed=False, reason=reason)

    def _require_mergeable(self) -> None:
        config = self.model.active_peft_config
        if not config.mergeable:
            raise UsageError(f"{config.name} does not change weights, and cannot be merged")

    def _open_merged(self, folder: Path) -> Engine:
        base = load_base(str(folder), dtype=self.model.dtype, device="cpu")
        if base.tokenizer.chat_template != self.loaded.base.tokenizer.chat_template:
            raise RunError(f"{folder} has another chat template than the run was trained with")
        return TransformersEngine("merged folder", base.model, base.tokenizer)

    def _open_adapter(self, folder: Path) -> Engine:
        base = self.loaded.base
        dtype = str(base.dtype).removeprefix("torch.")
        loaded = load_run(folder, dtype=dtype, device="cpu", quantization=base.quantization, unpack=True)
        model: Any = loaded.model
        return TransformersEngine("adapter folder", model.to(self.model.dtype), loaded.base.tokenizer)

    def _open_beside_base(self, adapter: Path) -> Engine:
        base = self.folder / "base.gguf"
        if not base.is_file():
            try:
                merging.write_base_gguf(self.loaded, base)
            except RunError as error:  # says nothing about the adapter
                message = f"the base could not be made a GGUF: {error.message}"
                raise ModelError(message, error.expected, error.hint) from error
        return self._open_llama_cpp(base, adapter)

    def _open_llama_cpp(self, model: Path, adapter: Path | None = None) -> Engine:
        longest = max(len(t.ids) for t in self.reference.texts) + 64
        return LlamaCppEngine(model, adapter, max_tokens=longest, threads=self.threads)


def _get_conversion_tolerance(manifest: dict[str, Any]) -> Tolerance | None:
    """Return the tolerance of an adapter exported as the nearest LoRA, whose relative error is known."""
    error = manifest.get("conversion", {}).get("error")
    return None if error is None else Tolerance(mean_difference=0.02, effect_share=error)
