"""The export for llama.cpp: adapter.gguf beside a GGUF of the base; merged: model.gguf, a whole model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.json_results import OMIT_NONE
from ..errors import ModelError, UsageError, format_install_command, format_names, suggest
from .export_format import (
    CONVERT_TO_LORA,
    LICENCE_FILES,
    MERGED,
    ExportFormat,
    ExportJob,
    LoraConversion,
    WrittenExport,
    make_flag_metadata,
)
from .export_results import EngineVerdict, KeptGain

if TYPE_CHECKING:
    from ..core.models.model_source import ModelSource
    from ..generation.inference_engines import InferenceEngine
    from .verify import ExportVerifier

ADAPTER_GGUF, MODEL_GGUF = "adapter.gguf", "model.gguf"
ADAPTER_PRECISIONS = ("f32", "f16")
ADAPTER_ENGINE, MODEL_ENGINE = "llama.cpp, adapter GGUF", "llama.cpp, merged GGUF"
PRECISION = make_flag_metadata(
    "f32, f16; merged also bf16, q8_0 and Q4_K_M, Q4_0, … of llama.cpp, 8bit and 4bit of MLX.",
    "--precision",
    "--quantize",
)

IMATRIX = make_flag_metadata(
    "Weigh the errors of few bits by the inputs that the run's rows give each matrix.", "--imatrix"
)
WITH_ROWS = make_flag_metadata(
    "Round to few bits with the run's rows; by default below a billion parameters.",
    "--with-rows/--without-rows",
)

DEFAULT_MIN_KEPT = 0.9


def _parse_share(text: str | float) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--min-kept {text}", "a share, 0 to 1")
    return share


MIN_KEPT = make_flag_metadata(
    f"Least share of the held-out gain that few bits may leave; 0 takes any. By default {DEFAULT_MIN_KEPT:g}.",
    parse=_parse_share,
)
UNROUNDED = ("f32", "f16", "bf16")
"""Precisions in which nothing of the gain is lost, or the check of the strength says so."""


@dataclass(frozen=True, kw_only=True)
class GgufExportFacts:
    """What the manifest of an export for llama.cpp says beside the run."""

    architecture: str | None = field(default=None, metadata=OMIT_NONE)
    """Of an adapter's base, by llama.cpp's name."""
    alpha: float | None = field(default=None, metadata=OMIT_NONE)
    """Of an adapter's file."""
    ranks: list[int] | None = field(default=None, metadata=OMIT_NONE)
    """Different ranks of an adapter, ascending."""
    tensors: int | None = field(default=None, metadata=OMIT_NONE)
    """Tensors of an adapter's file."""
    bytes: int | None = field(default=None, metadata=OMIT_NONE)
    """Of an adapter's file."""
    conversion: LoraConversion | None = field(default=None, metadata=OMIT_NONE)
    """How the adapter became a LoRA; absent if it is one."""
    precision: str = "f32"
    """Of the weights."""
    min_kept: float | None = field(default=None, metadata=OMIT_NONE)
    """Least share of the held-out gain that may be left; of a model in few bits."""
    importance_matrices: int | None = field(default=None, metadata=OMIT_NONE)
    """Matrices rounded with errors weighted by their inputs on the run's rows; absent without --imatrix."""
    matrices_rounded_with_rows: int | None = field(default=None, metadata=OMIT_NONE)
    """Matrices rounded so that their outputs on the run's rows change little; absent outside few bits."""
    matrices_rounded_as_trained: int | None = field(default=None, metadata=OMIT_NONE)
    """Matrices with the values that training saw; absent unless the run was trained through this precision."""


@dataclass(frozen=True)
class GgufFormat(ExportFormat):
    """A GGUF for llama.cpp.

    An adapter's precision is "f32" (the default) or "f16"; a merged model's also "bf16", "q8_0", or what llama.cpp's
    quantizer makes, such as "Q4_K_M" (by default "f16").
    """

    kind: ClassVar[str] = "gguf"
    facts: ClassVar[type] = GgufExportFacts
    upload_kind: ClassVar[str] = "gguf"
    upload_marker: ClassVar[str] = r".*\.gguf"
    upload_files: ClassVar[str] = rf".+\.gguf|README\.md|{LICENCE_FILES}"

    merged: bool | None = field(default=None, metadata=MERGED)
    precision: str | None = field(default=None, metadata=PRECISION)
    imatrix: bool | None = field(default=None, metadata=IMATRIX)
    with_rows: bool | None = field(default=None, metadata=WITH_ROWS)
    min_kept: float | None = field(default=None, metadata=MIN_KEPT)
    convert_to_lora: float | None = field(default=None, metadata=CONVERT_TO_LORA)

    def resolve(self) -> GgufFormat:
        """Return the format with the precision as files have it; UsageError for impossible options."""
        from .llama_cpp_tools import PRECISIONS, resolve_gguf_precision

        for name in ("imatrix", "with_rows"):
            if getattr(self, name) and (not self.merged or (self.precision or "f16").lower() in PRECISIONS):
                expected = "--merged, and a precision that llama.cpp's quantizer makes, such as --precision Q4_K_M"
                raise UsageError(f"--{name.replace('_', '-')} without rounding to few bits", expected)
        if self.imatrix and self.with_rows:
            expected = "one of them: --imatrix takes llama.cpp's own rounding"
            raise UsageError("--imatrix and --with-rows together", expected)
        if self.min_kept is not None:
            _parse_share(self.min_kept)
            if not self.merged or (self.precision or "f16").lower() in UNROUNDED:
                raise UsageError("--min-kept without rounding to few bits", "--merged, and q8_0 or fewer bits")
        if self.merged and self.convert_to_lora is not None:
            raise UsageError("--merged and --convert-to-lora together", "one of them: a merged model has no adapter")
        if self.precision is None:
            return self
        if self.merged:
            return replace(self, precision=resolve_gguf_precision(self.precision))
        if (precision := self.precision.lower()) not in ADAPTER_PRECISIONS:
            message = f"an adapter in {self.precision!r}{suggest(precision, ADAPTER_PRECISIONS)}"
            raise UsageError(message, format_names(ADAPTER_PRECISIONS), "--merged takes every precision")
        return replace(self, precision=precision)

    def require_base(self, base: ModelSource) -> None:
        """Raise ModelError if llama.cpp's converter is needed and missing."""
        if self.merged and base.kind != "gguf":
            from .llama_cpp_tools import require_gguf_converter

            require_gguf_converter()

    def write(self, job: ExportJob) -> WrittenExport:
        """Write adapter.gguf or model.gguf."""
        from .adapter_file_check import require_trained_adapter_in_gguf
        from .gguf import write_adapter_gguf
        from .gguf_roundings import is_trained_precision
        from .llama_cpp_tools import PRECISIONS, describe_fallback_types
        from .merge import measure_input_importances, record_second_moments_by_gguf_name, write_merged_gguf

        model: Any = job.loaded.model
        if self.merged:
            file, precision = job.folder / MODEL_GGUF, self.precision or "f16"
            importances = measure_input_importances(job.loaded, job.run) if self.imatrix else None
            moments: Any = "it was left out"
            as_trained = is_trained_precision(model, precision) and not self.imatrix and not self.with_rows
            if precision not in PRECISIONS and not self.imatrix and self.with_rows is not False and not as_trained:
                moments = record_second_moments_by_gguf_name(job.loaded)
            if self.with_rows and isinstance(moments, str):
                raise UsageError(f"--with-rows: {moments}", hint="leave it out")
            rounded = write_merged_gguf(
                job.loaded, job.run, file, precision, importances, None if isinstance(moments, str) else moments
            )
            chat = shlex.join(["llama-cli", "-m", str(job.final_path / MODEL_GGUF)])
            notes = [note] if (note := describe_fallback_types(file, precision)) else []
            if as_trained:
                notes += [f"{len(rounded)} matrices are in {precision} with the values that training saw"]
            elif precision not in PRECISIONS:
                notes += [describe_rounding(rounded, moments, is_weighted=bool(self.imatrix))]
                if (trained := getattr(model.active_peft_config, "qat", None)) is not None:
                    notes += [f"the run was trained to be exported in {trained}, and rounding to {precision} is added"]
            commands = [chat, *_list_serve_commands(model, job.run)]
            matrices = len(importances) if importances is not None else None
            least = DEFAULT_MIN_KEPT if self.min_kept is None else self.min_kept
            facts = GgufExportFacts(
                precision=precision,
                min_kept=None if precision in UNROUNDED else least,
                importance_matrices=matrices,
                matrices_rounded_with_rows=None if precision in PRECISIONS or as_trained else len(rounded),
                matrices_rounded_as_trained=len(rounded) if as_trained else None,
            )
            return WrittenExport(facts, commands, notes)
        adapter, conversion = model.active_adapters[0], None
        if self.convert_to_lora is not None:
            report = model.to_lora(adapter, self.convert_to_lora)
            conversion = LoraConversion(model.peft_config[adapter].name, error=report.error)
            adapter = report.adapter
        facts = write_adapter_gguf(job.folder / ADAPTER_GGUF, model, adapter, self.precision or "f32")
        if conversion is not None and job.verify:  # the engine is compared with the trained adapter, not with this LoRA
            require_trained_adapter_in_gguf(job.folder / ADAPTER_GGUF, model, adapter)
        source = job.loaded.base.source
        base = source.path if source.kind == "gguf" else "BASE.gguf"
        command = shlex.join(["llama-cli", "-m", base, "--lora", str(job.final_path / ADAPTER_GGUF)])
        return WrittenExport(replace(facts, conversion=conversion), [command, *_list_serve_commands(model, job.run)])

    def verify_folder(self, verifier: ExportVerifier, folder: Path, facts: Any) -> EngineVerdict | None:
        """Compare the GGUF in llama.cpp with the trained adapter."""
        from .llama_cpp_scorer import LlamaCppScorer
        from .llama_cpp_tools import is_llama_cpp_library_installed
        from .verify import find_nearest_lora_error_tolerance

        adapter, model, precision = folder / ADAPTER_GGUF, folder / MODEL_GGUF, facts.precision
        if adapter.is_file():
            tolerance = find_nearest_lora_error_tolerance(facts)
            served_base = getattr(facts, "ollama_base", None)
            return verifier.verify_adapter_gguf(ADAPTER_ENGINE, adapter, precision, tolerance, served_base)
        if not model.is_file():
            return None
        tolerance = verifier.find_rounding_tolerance(precision)
        verdict = verifier.verify_engine(
            MODEL_ENGINE, precision, lambda: verifier.open_llama_cpp(model), tolerance,
            lambda _: verifier.open_llama_cpp(verifier.write_base_in(precision)),
        )  # fmt: skip
        if precision in UNROUNDED or verdict.passed is False or verdict.failed:
            return verdict
        if not is_llama_cpp_library_installed():
            reason = f"not measured: {format_install_command('export-check')} brings what scores rows in llama.cpp"
            return replace(verdict, kept_gain=KeptGain(reason=reason))
        base, threads = verifier.write_base_in(precision), verifier.threads
        return verifier.add_kept_gain(
            verdict,
            getattr(facts, "min_kept", None) or 0.0,
            lambda longest: LlamaCppScorer(model, max_tokens=longest, threads=threads),
            lambda longest: LlamaCppScorer(base, max_tokens=longest, threads=threads),
        )

    def list_run_checks(self, verifier: ExportVerifier) -> list[Callable[[], EngineVerdict]]:
        """Return the comparisons of the run's adapter, and of its whole model, in llama.cpp."""
        if self.kind != GgufFormat.kind:  # Ollama reads the same files
            return []
        from ..generation.inference_engines import InProcessLlamaCppEngine
        from .adapter_file_check import require_trained_adapter_in_gguf
        from .expected_logps import ADAPTER_TOLERANCES
        from .gguf import write_adapter_gguf
        from .merge import write_merged_gguf

        adapter, whole = verifier.temp_folder / ADAPTER_GGUF, verifier.temp_folder / MODEL_GGUF

        def open_adapter() -> InferenceEngine:
            write_adapter_gguf(adapter, verifier.model)
            require_trained_adapter_in_gguf(adapter, verifier.model)
            return verifier.open_llama_cpp(verifier.write_base_in(), adapter)

        def open_base(_: Any) -> InferenceEngine:
            return verifier.open_llama_cpp(verifier.write_base_in("f16"))

        def open_whole() -> InferenceEngine:
            verifier.require_mergeable()
            write_merged_gguf(verifier.loaded, verifier.run, whole, "f16")
            return verifier.open_llama_cpp(whole)

        without, tolerance = InProcessLlamaCppEngine.without_adapter, ADAPTER_TOLERANCES["f32"]
        return [
            lambda: verifier.verify_engine(ADAPTER_ENGINE, "f32", open_adapter, tolerance, without),
            lambda: verifier.verify_engine(MODEL_ENGINE, "f16", open_whole, None, open_base),
        ]

    def list_ways_to_keep_gain(self, run: Path) -> list[str]:
        """Return what to do if too little of the held-out gain is left, each with its command."""
        export = ["slimtune", "export", str(run), "--out", "DIR", "--to"]
        more = [] if self.precision == "q8_0" else ["--precision", "q8_0"]
        ways = [
            f"more bits: {shlex.join([*export, self.kind, '--merged', *more])}",
            f"two files, the adapter beside its base: {shlex.join([*export, 'gguf'])}",
        ]
        if self.imatrix or self.with_rows is False:
            ways.insert(0, "rounding with the run's rows: without --imatrix and --without-rows")
        if re.match("I?Q[456]", self.precision or ""):
            ways.append(f"a LoRA that is trained for these bits: slimtune train … --set method.qat={self.precision}")
        return ways

    def check_upload(self, folder: Path, files: dict[str, Path | bytes], notes: list[str]) -> str:
        """Raise ModelError if a GGUF file is damaged."""
        from ..extras.gguf_loading import open_gguf_reader

        for file in (folder / n for n in files if n.endswith(".gguf")):
            try:
                open_gguf_reader(file)
            except ImportError as e:
                raise ModelError("checking a GGUF file needs the package gguf", hint="pip install gguf") from e
            except Exception as e:  # the reader fails in many ways
                raise ModelError(
                    f"{file} is damaged: {type(e).__name__}", "a complete GGUF file", "export again"
                ) from e
        return f"{folder.resolve().name} as GGUF"


def describe_rounding(rounded: list[str], moments: Any, engine: str = "llama.cpp", *, is_weighted: bool = False) -> str:
    """Return which way a model was rounded to few bits; `moments` may say why there are none."""
    if rounded:
        return f"{len(rounded)} matrices were rounded with rows that the run was trained on"
    if is_weighted:
        return f"rounded by {engine}, its errors weighted by the inputs that the run's rows give"
    reason = moments if isinstance(moments, str) else "these types of the matrices are not rounded with rows"
    return f"rounded by {engine} without the run's rows: {reason}"


def _list_serve_commands(model: Any, run: Path) -> list[str]:
    """Return the command that answers from llama.cpp without its programs, if it can serve the run: [] or one."""
    from .export_support import get_export_support_flags

    serve = shlex.join(["slimtune", "serve", str(run), "--engine", "llama.cpp"])
    return (
        [f"{serve}  # in place of llama-cli, where it is not installed"] if get_export_support_flags(model).gguf else []
    )
