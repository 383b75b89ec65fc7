"""Check an adapter's file, and everything that serves it and can be asked here: `slimtune check`, `slimtune verify`.

    the adapter's file        against its base (`adapter_check/`)
    a server, GGUF or folder  if it is given (`served_place.py`)
    verify: a run             what each export format says (`list_run_checks`), exported into a temporary folder
    verify: an export         what is in it, as its format says (`verify_folder`)

What cannot be checked is reported with the reason, and never counts as passed.
"""

import importlib.util
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.foundation.dtype_names import dtype_name, llama_cpp_dtype_name
from ..core.foundation.formatting import format_duration
from ..core.models.loader import load_base
from ..core.training.trained_model import TrainedModel, load_run
from ..errors import AdapterError, ModelError, SlimtuneError, UsageError
from ..generation.inference_engines import (
    InferenceEngine,
    InProcessLlamaCppEngine,
    TransformersInferenceEngine,
)
from ..generation.mlx_engine import MlxEngine
from ..generation.run_requirements import require_causal_lm_run
from . import merge as merging
from .adapter_check.check_file import BASE_WEIGHTS_UNPROVEN, FileCheck, check_file, load_as_trained
from .adapter_file_check import require_trained_adapter_in_gguf, require_trained_adapter_in_model
from .engine_diagnosis import CAUSES_IN_ADAPTER
from .expected_logps import (
    ADAPTER_TOLERANCES,
    KEPT_GAIN_TOLERANCE,
    TOLERANCES,
    AdapterReference,
    EngineTolerance,
    get_loosest_tolerance,
    judge_engine_against_adapter,
    make_fixed_and_held_out_reference_texts,
)
from .expert_layouts import has_split_experts, write_with_stacked_experts
from .export_format import EXPORT_FORMATS
from .export_results import AdapterReport, EngineVerdict, KeptGain
from .kept_gain import HeldOutRows, OpenScorer, list_held_out_rows, measure_kept_gain
from .llama_cpp_tools import LlamaCppToolFailedError, is_llama_cpp_library_installed
from .manifest import EXPORT_MANIFEST, ExportManifest, read_export_manifest
from .served_base import ServedBase, read_gguf_majority_precision, resolve_matching_ollama_base
from .served_place import ServedPlace, compute_loudest_reference, verify_place

if TYPE_CHECKING:
    from .stages import StageFiles


def check_adapter(
    path: Path, base: str | None = None, place: ServedPlace | None = None, log: Callable[[str], None] = lambda _: None
) -> AdapterReport:
    """Check an adapter's file, and what serves it, if a place is given.

    Args:
        path, base: as for `check_file`, which also says what is raised.
        place: where it is served.
        log: gets progress messages.
    """
    checked, checks = check_file(path, base, log), list[EngineVerdict]()
    if place is not None:
        checks = [EngineVerdict(str(place), place.precision, reason="the base is not at hand: nothing was computed")]
    if place is not None and checked.result.base is not None:
        with tempfile.TemporaryDirectory(prefix="slimtune-check-") as folder:
            try:
                loaded = load_as_trained(checked, Path(folder), log)
            except AdapterError as error:  # the file itself cannot be computed with: what the file's check says
                checks = [replace(checks[0], reason=error.message)]
            else:
                reference = compute_loudest_reference(loaded)
                checks = [verify_place(ExportVerifier(loaded, path, Path(folder), log=log, reference=reference), place)]
    return _make_report(path, base, checked, checks)


def verify(
    run_or_export: Path,
    *,
    rows_file: Path | None = None,
    place: ServedPlace | None = None,
    stages: "StageFiles | None" = None,
    threads: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> AdapterReport:
    """Compare everything of a run or an export that can be asked here with the trained adapter.

    Args:
        run_or_export: a run folder, an adapter folder, or a folder that `slimtune export` or `slimtune merge` wrote.
        rows_file: a file of rows to compare on, after fixed questions, in the format of the run's; None: the run's
            validation (else test) rows.
        place: where it is served, asked first; the name at a server is by default the export's.
        stages: compare each stage of a run with the one before instead, up to the first that differs.
        threads: of llama.cpp; None: half of the cores.
        log: gets progress messages.
    """
    path, run, manifest = Path(run_or_export), Path(run_or_export), read_export_manifest(Path(run_or_export))
    if manifest is not None and not (run := manifest.run).exists():
        raise UsageError(f"{path} was made from {run}, which does not exist any more", "the run to compare it with")
    require_causal_lm_run(run)
    facts = manifest.read_facts() if manifest is not None and manifest.load_format() is not None else None
    with tempfile.TemporaryDirectory(prefix="slimtune-verify-") as folder:
        verifier = ExportVerifier(merging.load_run_for_export(run), run, Path(folder), rows_file, threads, log)
        if stages is not None:
            from .stages import verify_stages

            checks, first = verify_stages(verifier, stages)
            return replace(_make_report(path, None, check_file(run, log=log), checks), first_difference=first)
        checks = [] if place is None else [_verify_place_of_export(verifier, place, facts)]
        checks += verifier.verify_run() if manifest is None else [verifier.verify_export(path, manifest)]
    return _make_report(path, None, check_file(run, log=log), checks, is_first_required=place is not None)


def _verify_place_of_export(verifier: "ExportVerifier", place: ServedPlace, facts: Any) -> EngineVerdict:
    """Compare what serves an export, whose manifest has `facts`, or a run (None), on the base as it is served."""
    dtype, base = getattr(facts, "dtype", None), verifier.loaded.base
    if dtype and (base.quantization or dtype != dtype_name(base.dtype)):  # its other rounding is no fault
        loaded = merging.load_run_for_export(verifier.run, dtype)
        verifier = replace(verifier, loaded=loaded, reference=None)  # type: ignore[arg-type]
    precision = llama_cpp_dtype_name(verifier.loaded.base.dtype)
    place = replace(place, name=place.name or getattr(facts, "name", None), precision=precision)
    return verify_place(verifier, place, find_nearest_lora_error_tolerance(facts))


def _make_report(
    path: Path, base: str | None, checked: FileCheck, checks: list[EngineVerdict], *, is_first_required: bool = False
) -> AdapterReport:
    """Return the report on a file and engines; the first engine may not stay unknown, if it is required."""
    file = checked.result
    if checks:  # they compute with the base's weights
        file = replace(file, not_proven=[text for text in file.not_proven if text != BASE_WEIGHTS_UNPROVEN])
    verdicts = {False if check.failed else check.passed for check in checks} or {True}
    passed = not file.faults and True in verdicts and False not in verdicts
    passed = passed and (not is_first_required or checks[0].passed is True)
    mends = [finding.mend for finding in file.findings if finding.mend is not None or finding.severity == "fault"]
    can_be_mended = file.base is not None and bool(mends) and None not in mends
    is_misread = not file.faults and any(check.cause in CAUSES_IN_ADAPTER for check in checks)
    names = shlex.join([str(path), *(["--base", base] if base else [])])
    repair = f"slimtune repair {names} --for ENGINE --out DIR" if can_be_mended or is_misread else None
    return AdapterReport(str(path), passed, file, checks, repair)


@dataclass
class ExportVerifier:
    """Opens engines on what a run exports to, and compares each with the trained adapter; arguments as for `verify`."""

    loaded: TrainedModel
    run: Path
    temp_folder: Path  # for temporary files; the caller deletes it
    rows_file: Path | None = None
    threads: int | None = None
    log: Callable[[str], None] = lambda _: None
    reference: AdapterReference = None  # type: ignore[assignment]  # by default on fixed questions and held-out rows

    def __post_init__(self) -> None:
        model: Any = self.loaded.model
        self.model, tokenizer = model, self.loaded.base.tokenizer
        if self.reference is None:
            texts = make_fixed_and_held_out_reference_texts(tokenizer, self.loaded.recipe, model.config, self.rows_file)
            self.reference = AdapterReference(model, tokenizer, texts)

    def verify_run(self) -> list[EngineVerdict]:
        """Export to every format that is compared for a run, and check each."""
        formats = (EXPORT_FORMATS.load(name)() for name in EXPORT_FORMATS.names())
        checks = [check for each in formats for check in each.list_run_checks(self)]
        verdicts, started = list[EngineVerdict](), time.monotonic()
        for check in checks:
            if verdicts:
                after = format_duration(time.monotonic() - started)
                self.log(f"{len(verdicts)} of {len(checks)} exports checked after {after}")
            verdicts.append(check())
        return verdicts

    def verify_export(self, folder: Path, manifest: ExportManifest) -> EngineVerdict:
        """Check what an export folder contains."""
        kind = manifest.load_format()
        reason = f"{folder} contains nothing that can be checked"
        unknown = EngineVerdict(manifest.kind, str(manifest.values.get("precision", "f32")), reason=reason)
        return (kind and kind().verify_folder(self, folder, manifest.read_facts())) or unknown

    def verify_adapter_gguf(
        self, name: str, adapter: Path, precision: str, tolerance: EngineTolerance | None, served_base: str | None
    ) -> EngineVerdict:
        """Check an adapter's GGUF beside the base that it will be served with, where its file is here."""
        is_converted, tolerance = tolerance is not None, tolerance or ADAPTER_TOLERANCES.get(precision)
        served = resolve_matching_ollama_base(served_base, self.loaded) if served_base is not None else ServedBase()
        if (file := served.file) is not None:
            precision = read_gguf_majority_precision(file)
            tolerance = get_loosest_tolerance(precision)

        def open_engine() -> InferenceEngine:
            if not is_converted:
                require_trained_adapter_in_gguf(adapter, self.model, self.loaded.adapter_name)
            return self.open_llama_cpp(file or self.write_base_in(), adapter)

        verdict = self.verify_engine(name, precision, open_engine, tolerance, InProcessLlamaCppEngine.without_adapter)
        if served.unproven and verdict.passed:
            verdict = replace(verdict, passed=None, reason=f"it is right beside the trained base; {served.unproven}")
        return self.note_quantized_base(verdict)

    def note_quantized_base(self, verdict: EngineVerdict) -> EngineVerdict:
        """Return the verdict of an adapter; it is not proven if the base that is served is not quantized as trained."""
        if self.loaded.base.quantization is None or not verdict.passed:
            return verdict
        effect = describe_16_bit_serving_effect(self.loaded, self.run, self.reference)
        return replace(verdict, passed=None, reason=effect)

    def verify_engine(
        self,
        name: str,
        precision: str,
        open_engine: Callable[[], InferenceEngine],
        tolerance: EngineTolerance | None = None,
        open_base: Callable[[Any], InferenceEngine] | None = None,
        *,
        are_chats_compared: bool = False,
    ) -> EngineVerdict:
        """Open an engine and compare it; one that cannot be opened gives a verdict, too."""
        self.log(f"checking {name}")
        if tolerance is None and self.loaded.base.quantization:
            # Dequantized values amplify an engine's own arithmetic: SmolLM2 in NF4, without an adapter, is 0.0027 nats
            # from llama.cpp on average, where float32 is 3e-6 from float64.
            tolerance = get_loosest_tolerance(precision, llama_cpp_dtype_name(self.model.dtype), "f16")
        try:
            with closing(open_engine()) as engine, self._compute_as(engine) as reference:
                engine.name = name
                return judge_engine_against_adapter(
                    reference, engine, precision, tolerance, open_base, are_chats_compared=are_chats_compared
                )
        except SlimtuneError as error:
            reason = " ".join(f"{error.message}{f' ({error.hint})' if error.hint else ''}".split())
            if isinstance(error, LlamaCppToolFailedError):
                return EngineVerdict(name, precision, failed=True, reason=reason)
            if isinstance(error, ModelError | UsageError):  # says nothing about the adapter
                return EngineVerdict(name, precision, reason=f"not checked: {reason}")
            return EngineVerdict(name, precision, passed=False, reason=reason)

    @contextmanager
    def _compute_as(self, engine: InferenceEngine) -> Iterator[AdapterReference]:
        """Yield the reference, with the factor of the embedding as the engine is known to round it."""
        if not (isinstance(engine, MlxEngine) and engine.rounds_embedding_scale):
            yield self.reference
            return
        self.log("mlx-lm rounds the factor of the embedding to bfloat16: it is compared with the adapter beside that")
        with merging.rounding_embedding_scales(self.model):
            yield AdapterReference(self.model, self.reference.engine.tokenizer, self.reference.texts)

    @cached_property
    def held_out_rows(self) -> HeldOutRows | str:
        """The rows that say how much of the gain is left; or why there are none."""
        return list_held_out_rows(self.loaded, self.rows_file)

    def find_rounding_tolerance(self, precision: str, can_score: bool | None = None) -> EngineTolerance | None:
        """Return the tolerance of a whole model if its held-out gain decides; None: that of the precision.

        `can_score` says whether the engine can score rows; None: llama.cpp is the engine.
        """
        can_score = is_llama_cpp_library_installed() if can_score is None else can_score
        decides = can_score and precision not in TOLERANCES and not isinstance(self.held_out_rows, str)
        return KEPT_GAIN_TOLERANCE if decides else None

    def add_kept_gain(
        self, verdict: EngineVerdict, min_kept: float, open_shipped: OpenScorer, open_rounded_base: OpenScorer
    ) -> EngineVerdict:
        """Return a whole model's verdict with the share of the held-out gain that is left; too little fails it."""
        if isinstance(rows := self.held_out_rows, str):
            return replace(verdict, kept_gain=KeptGain(reason=f"not measured: {rows}"))
        kept = measure_kept_gain(self.loaded, rows, open_shipped, open_rounded_base)
        verdict = replace(verdict, kept_gain=kept)
        if kept.share is None or kept.share >= min_kept:
            return verdict
        limit, reason = f"{min_kept:.0%} or more (--min-kept {min_kept:g})", f"{verdict.precision}: {kept.describe()}"
        return replace(verdict, passed=False, limit=limit, reason=reason)

    def require_mergeable(self) -> None:
        config = self.model.active_peft_config
        if not config.mergeable:
            raise UsageError(f"{config.name} does not change weights, and cannot be merged", code="merge-differs")

    def open_merged(self, folder: Path) -> InferenceEngine:
        base = load_base(str(folder), dtype=self.model.dtype, device="cpu")
        return TransformersInferenceEngine("merged folder", base.model, base.tokenizer)

    def open_adapter(self, folder: Path, *, is_converted: bool = False) -> InferenceEngine:
        base = self.loaded.base
        if has_split_experts(folder):  # as vLLM reads them; transformers has them stacked
            folder = write_with_stacked_experts(folder, self.model, self.temp_folder / "stacked")
        how: dict[str, Any] = {"dtype": dtype_name(base.dtype), "device": "cpu", "quantization": base.quantization}
        loaded: Any = load_run(folder, **how, dequantize=True)
        if not is_converted:
            require_trained_adapter_in_model(loaded.model, self.model, self.loaded.adapter_name)
        return self._open_unrounded("adapter folder", loaded.model.to(self.model.dtype), loaded.base.tokenizer)

    def open_in_peft(self, folder: Path) -> InferenceEngine:
        """Open an adapter as PEFT loads it, on the run's base; without PEFT as slimtune loads it."""
        if importlib.util.find_spec("peft") is None:
            return self.open_adapter(folder, is_converted=True)
        import peft

        base: Any = load_base(self.loaded.base.source.spec, dtype=self.loaded.base.dtype, device="cpu").model
        try:
            adapted = peft.PeftModel.from_pretrained(base.to(self.model.dtype), str(folder)).eval()
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"PEFT {peft.__version__} cannot load the file: {error}", "a file of PEFT's") from error
        return self._open_unrounded("PEFT", adapted, self.loaded.base.tokenizer)

    def _open_unrounded(self, name: str, model: Any, tokenizer: Any) -> InferenceEngine:
        if self.model.dtype.itemsize > 2:
            merging.set_unrounded_embedding_scales(model)
        return TransformersInferenceEngine(name, model, tokenizer)

    def write_base_in(self, precision: str = "f32") -> Path:
        """Return the untouched base as a whole GGUF in a precision, written once."""
        file = self.temp_folder / f"base-{precision}.gguf"
        if not file.is_file():
            merging.write_base_gguf(self.loaded, file, precision)
        return file

    def open_llama_cpp(self, model: Path, adapter: Path | None = None) -> InferenceEngine:
        longest = max(len(t.prompt_and_answer_ids) for t in self.reference.texts) + 64
        return InProcessLlamaCppEngine(model, adapter, max_tokens=longest, threads=self.threads)


def describe_16_bit_serving_effect(
    loaded: TrainedModel, run: Path, adapter_reference: AdapterReference | None = None
) -> str:
    """Return what it means that an adapter trained on a quantized base is served beside one in 16 bits.

    There it is added to W instead of the dequantized W_q. With a reference it is measured how far that moves answers.
    """
    trained = f"the adapter was trained on the base in {loaded.base.quantization}; beside the base in 16 bits"
    merged = f"merged they are what was trained: slimtune merge {shlex.quote(str(run))} --out FOLDER"
    if adapter_reference is None:
        return f"{trained} answers differ; {merged}"
    model: Any = load_run(run, dtype=dtype_name(loaded.base.dtype), device="cpu", quantization="none").model
    own, effect = adapter_reference.engine, adapter_reference.effect
    plain = AdapterReference(model.to(own.model.dtype), own.tokenizer, adapter_reference.texts)
    moved = adapter_reference.differences(plain.log_probs).abs().mean().item()
    moves = f"log p differs by {moved:.2g} nats on average, where the adapter changes it by {effect:.2g}"
    return f"{trained} {moves}; {merged}"


def find_nearest_lora_error_tolerance(export_facts: Any) -> EngineTolerance | None:
    """Return the tolerance of an adapter exported as the nearest LoRA, whose relative error is known; None for others.

    `export_facts` are those of its manifest.
    """
    conversion = getattr(export_facts, "conversion", None)
    if conversion is None:
        return None
    error = conversion.error
    if not 0 <= error <= 1:  # a larger one would allow any difference
        raise UsageError(f"{EXPORT_MANIFEST} is damaged: conversion.error is {error}", "0 to 1", "export again")
    return EngineTolerance(mean_difference=0.02, mean_difference_per_effect=error, strength_difference=0.02 + error)
