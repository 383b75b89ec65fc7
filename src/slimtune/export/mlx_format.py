"""The export for MLX: an adapter of mlx-lm; merged: the folder that `mlx_lm.generate` and LM Studio open."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.json_results import OMIT_NONE
from ..errors import UsageError, format_names, suggest
from .export_format import (
    CONVERT_TO_LORA,
    MERGED,
    ExportFormat,
    ExportJob,
    LoraConversion,
    WrittenExport,
    make_flag_metadata,
)
from .export_results import EngineVerdict
from .gguf_format import DEFAULT_MIN_KEPT, MIN_KEPT, PRECISION, WITH_ROWS, describe_rounding

if TYPE_CHECKING:
    from ..generation.inference_engines import InferenceEngine
    from .verify import ExportVerifier

ADAPTER_ENGINE, MODEL_ENGINE = "mlx-lm, adapter", "mlx-lm, merged folder"
UNROUNDED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
BITS = {"8bit": 8, "6bit": 6, "5bit": 5, "4bit": 4, "3bit": 3, "2bit": 2}
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class MlxExportFacts:
    """What the manifest of an export for MLX says beside the run."""

    precision: str = "f32"
    """Of the weights."""
    base: str | None = field(default=None, metadata=OMIT_NONE)
    """Folder or Hub id of an adapter's base; "base": in this folder."""
    fine_tune_type: str | None = field(default=None, metadata=OMIT_NONE)
    """lora or dora; of an adapter."""
    rank: int | None = field(default=None, metadata=OMIT_NONE)
    """Of all modules of an adapter, smaller ones padded."""
    scale: float | None = field(default=None, metadata=OMIT_NONE)
    """Of an adapter; 1 if scales were multiplied into B."""
    num_layers: int | None = field(default=None, metadata=OMIT_NONE)
    """Last layers that mlx-lm looks at, of an adapter."""
    bytes: int | None = field(default=None, metadata=OMIT_NONE)
    """Of an adapter's files."""
    conversion: LoraConversion | None = field(default=None, metadata=OMIT_NONE)
    """How the adapter became a LoRA; absent if it is one."""
    group_size: int | None = field(default=None, metadata=OMIT_NONE)
    """Weights that share a scale; of a quantized model."""
    min_kept: float | None = field(default=None, metadata=OMIT_NONE)
    """Least share of the held-out gain that may be left; of a quantized model."""
    matrices_rounded_with_rows: int | None = field(default=None, metadata=OMIT_NONE)
    """Matrices rounded so that their outputs on the run's rows change little; absent outside few bits."""


@dataclass(frozen=True)
class MlxFormat(ExportFormat):
    """An adapter for mlx-lm, or base and adapter as one MLX folder.

    The precision of a merged model is that of the run's base (f32, f16 or bf16) by default, or 8bit, 6bit, 5bit, 4bit,
    3bit, 2bit.
    """

    kind: ClassVar[str] = "mlx"
    facts: ClassVar[type] = MlxExportFacts

    merged: bool | None = field(default=None, metadata=MERGED)
    precision: str | None = field(default=None, metadata=PRECISION)
    group_size: int | None = field(
        default=None, metadata=make_flag_metadata("Weights of MLX that share a scale: 32, 64 (the default) or 128.")
    )
    min_kept: float | None = field(default=None, metadata=MIN_KEPT)
    with_rows: bool | None = field(default=None, metadata=WITH_ROWS)
    convert_to_lora: float | None = field(default=None, metadata=CONVERT_TO_LORA)

    def resolve(self) -> MlxFormat:
        """Return the format with the precision as the files have it; UsageError for impossible options."""
        precision = self.precision and re.sub(r"^(?:q|int|)(\d)[_-]?(?:bits?|)$", r"\1bit", self.precision.lower())
        names = [*UNROUNDED, *BITS]
        if precision is not None and precision not in names:
            close = suggest(precision, names)
            raise UsageError(f"MLX has no precision {self.precision!r}{close}", format_names(names))
        if not self.merged and precision not in (None, "f32"):
            raise UsageError(
                f"--precision {self.precision} without --merged", "f32: an adapter of mlx-lm is small", "add --merged"
            )
        if self.merged and self.convert_to_lora is not None:
            raise UsageError("--merged and --convert-to-lora together", "one of them: merged, nothing needs a LoRA")
        if precision not in BITS and (self.group_size, self.min_kept) != (None, None):
            raise UsageError("--group-size and --min-kept are for a model in few bits", "--merged --precision 4bit")
        if self.with_rows is not None and BITS.get(precision or "", 8) == 8:
            raise UsageError("--with-rows and --without-rows are for fewer than 8 bits", "--merged --precision 4bit")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(f"--group-size {self.group_size}", format_names([*map(str, GROUP_SIZES)]))
        return replace(self, precision=precision)

    def write(self, job: ExportJob) -> WrittenExport:
        """Write adapters.safetensors and its config, or a whole model."""
        return self._write_merged(job) if self.merged else self._write_adapter(job)

    def _write_adapter(self, job: ExportJob) -> WrittenExport:
        from . import mlx

        model: Any = job.loaded.model
        adapter, conversion = model.active_adapters[0], None
        if self.convert_to_lora is not None:
            report = model.to_lora(adapter, self.convert_to_lora)
            conversion = LoraConversion(model.peft_config[adapter].name, error=report.error)
            adapter = report.adapter
        pairs, other = mlx.collect_mlx_lora_pairs(model, adapter)
        mlx.require_held_by_mlx_lm(job.run, model, adapter, pairs, other)
        base, notes = mlx.find_mlx_base_or_write_it(job.loaded, job.folder)
        place = str(job.final_path.resolve() / mlx.BASE_FOLDER) if base == mlx.BASE_FOLDER else base
        written = mlx.write_mlx_adapter(model, adapter, pairs, job.folder, place)
        mlx.require_trained_adapter_in_mlx(job.folder, pairs)
        if written.are_keys_whole_names and written.num_layers:
            notes.append(
                "not the last layers all alike are adapted, so the keys are whole names, which mlx-lm reads; other "
                "readers of its adapters may expect names inside a layer"
            )
        facts = MlxExportFacts(
            base=base,
            fine_tune_type=written.fine_tune_type,
            rank=written.rank,
            scale=written.scale,
            num_layers=written.num_layers,
            bytes=written.bytes,
            conversion=conversion,
        )
        command = ["mlx_lm.generate", "--model", place, "--adapter-path", str(job.final_path), "--prompt", "Hello"]
        return WrittenExport(facts, [shlex.join(command)], notes)

    def _write_merged(self, job: ExportJob) -> WrittenExport:
        from . import mlx

        precision = self.precision or mlx.find_16_bit_precision(job.loaded)
        bits = BITS.get(precision)
        size, dtype = self.group_size or (64 if bits else None), UNROUNDED.get(precision)
        moments: Any = "--without-rows"
        if bits is not None and bits < 8 and self.with_rows is not False:
            moments = mlx.record_second_moments_by_mlx_name(job.loaded)
            if self.with_rows and isinstance(moments, str):
                raise UsageError(f"--with-rows: {moments}", hint="leave it out")
        given = None if isinstance(moments, str) else moments
        notes, rounded = mlx.write_merged_mlx_folder(job.loaded, job.run, job.folder, dtype, bits, size, given)
        if bits is not None and bits < 8:
            notes.append(describe_rounding(rounded, moments, "mlx-lm"))
        least = DEFAULT_MIN_KEPT if self.min_kept is None else self.min_kept
        facts = MlxExportFacts(
            precision,
            group_size=size,
            min_kept=least if bits else None,
            matrices_rounded_with_rows=len(rounded) if bits is not None and bits < 8 else None,
        )
        place = shlex.quote(str(job.final_path))
        commands = [
            f"mlx_lm.generate --model {place} --prompt Hello",
            f"mkdir -p ~/.lmstudio/models/me && cp -r {place} ~/.lmstudio/models/me/  # LM Studio lists it",
        ]
        return WrittenExport(facts, commands, notes)

    def verify_folder(self, verifier: ExportVerifier, folder: Path, facts: Any) -> EngineVerdict | None:
        """Compare what mlx-lm computes from the folder with the trained adapter."""
        from . import mlx
        from .verify import find_nearest_lora_error_tolerance

        if (folder / mlx.ADAPTER_FILE).is_file():
            tolerance = find_nearest_lora_error_tolerance(facts)
            return self._verify_adapter(verifier, folder, facts, tolerance)
        if not (folder / "config.json").is_file():
            return None
        return self._verify_merged(verifier, folder, facts)

    def _verify_adapter(self, verifier: ExportVerifier, folder: Path, facts: Any, tolerance: Any) -> EngineVerdict:
        from ..generation.mlx_engine import MlxEngine, require_mlx_lm
        from . import mlx
        from .expected_logps import ADAPTER_TOLERANCES

        def open_engine() -> InferenceEngine:
            require_mlx_lm()
            if facts.conversion is None:
                pairs = mlx.collect_mlx_lora_pairs(verifier.model, verifier.loaded.adapter_name)[0]
                mlx.require_trained_adapter_in_mlx(folder, pairs)
            base = mlx.find_local_mlx_base(verifier, folder, facts.base)
            return MlxEngine(base, folder, base_dtype=mlx.get_training_dtype_name(verifier.loaded))

        tolerance = tolerance or ADAPTER_TOLERANCES["f32"]
        verdict = verifier.verify_engine(
            ADAPTER_ENGINE, facts.precision, open_engine, tolerance, MlxEngine.without_adapter
        )
        return verifier.note_quantized_base(verdict)

    def _verify_merged(self, verifier: ExportVerifier, folder: Path, facts: Any) -> EngineVerdict:
        from ..generation.mlx_engine import MlxEngine, is_mlx_lm_installed
        from . import mlx
        from .expected_logps import TOLERANCES

        def open_base(_: Any = None) -> MlxEngine:
            return MlxEngine(mlx.write_mlx_base_in(verifier, facts.precision, facts.group_size))

        bits = BITS.get(facts.precision)
        tolerance = TOLERANCES["q8_0"] if bits == 8 else None
        if bits and bits < 8:
            tolerance = verifier.find_rounding_tolerance(facts.precision, is_mlx_lm_installed())
        verdict = verifier.verify_engine(MODEL_ENGINE, facts.precision, lambda: MlxEngine(folder), tolerance, open_base)
        if bits is None or not verdict.passed:
            return verdict
        return verifier.add_kept_gain(
            verdict, facts.min_kept or 0.0, lambda _: MlxEngine(folder), lambda _: open_base()
        )

    def list_ways_to_keep_gain(self, run: Path) -> list[str]:
        """Return what to do if too little of the held-out gain is left, each with its command."""
        export = ["slimtune", "export", str(run), "--out", "DIR", "--to", "mlx"]
        more = ["--precision", "8bit"] if self.precision != "8bit" else []
        rows = ["rounding with the run's rows: without --without-rows"] if self.with_rows is False else []
        return [
            *rows,
            f"more bits: {shlex.join([*export, '--merged', *more])}",
            f"the adapter beside its base: {shlex.join(export)}",
        ]
