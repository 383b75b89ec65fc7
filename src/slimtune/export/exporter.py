"""Export a run in the format an engine serves, checked by that engine before the folder appears: `slimtune export`.

A format is a class in a file of its own (`export_format.py`): this module names none.
"""

import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.adapters.peft_config import PeftConfig
from ..core.foundation.files import atomic_folder
from ..core.foundation.json_results import to_json_dict
from ..core.training.run_dir import ADAPTER_FILE, RunDir, find_adapter_folder
from ..core.training.trained_model import TrainedModel
from ..errors import AdapterError, RunError, UsageError
from ..generation.run_requirements import require_causal_lm_run, resolve_trained_base
from .export_format import ExportJob, make_export_format
from .export_results import EngineVerdict, ExportResult
from .manifest import write_export_manifest
from .merge import load_run_for_export
from .verify import ExportVerifier, describe_16_bit_serving_effect

NOT_ASKED = "the check was left out (--no-verify); `slimtune verify FOLDER` makes it later"


def export(
    run: Path,
    target: str,
    out: Path,
    options: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    require_proof: bool = False,
    threads: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Export a run.

    Args:
        run: a run folder, or an adapter folder.
        target: the name of a format: one of `list_export_targets`.
        out: folder to write; it does not exist yet, or is empty.
        options: of the format by name, the fields of its class; None is as if not given.
        verify: compare the engine with the trained adapter, and write nothing if they differ.
        require_proof: write nothing either if they could not be compared, or the base that will be served is not known.
        threads: of llama.cpp while verifying; None: half of the cores.
        log: gets progress messages.

    Raises:
        UsageError: an impossible target, option or name; the adapter is not a LoRA; `out` contains files; Ollama's base
            is not the base of the training.
        AdapterError: the adapter does not fit its base, or the target cannot take it; the alternatives are given.
        ModelError: a program of llama.cpp, or a package, is not installed.
        RunError: the disk is full, the engine differs from the trained adapter, or proof is required and there is none.
    """
    run, out = Path(run), Path(out).expanduser()
    chosen = make_export_format(target, options or {})
    if require_proof and not verify:
        raise UsageError("--require-proof and --no-verify together", "one of them: the check is the proof")
    RunDir.require_free(out)
    require_causal_lm_run(run)
    require_exported_method(run)
    base = resolve_trained_base(run)
    chosen.require_base(base)
    log(f"loading {run} and its base {base.spec}")
    loaded = load_run_for_export(run)
    model: Any = loaded.model
    needed = (loaded.adapter_folder / ADAPTER_FILE).stat().st_size
    if chosen.is_merged:
        needed = 2 * sum(p.numel() for p in model.parameters())
    else:
        refuse_adapter_bound_to_quantized_base(loaded, run)
    with atomic_folder(out, needed) as folder:
        log(f"writing {out}")
        written = chosen.write(ExportJob(loaded, run, folder, out, verify))
        facts, notes = to_json_dict(written.facts), written.notes
        write_export_manifest(folder, target, run, facts)
        verdict = EngineVerdict(target, "", reason=NOT_ASKED)
        if verify:
            with tempfile.TemporaryDirectory(prefix=".slimtune-verify-", dir=folder.parent) as temporary:
                verifier = ExportVerifier(loaded, run, Path(temporary), threads=threads, log=log)
                verdict = chosen.verify_folder(verifier, folder, written.facts) or verdict
        elif not chosen.is_merged and loaded.base.quantization is not None:
            notes = [*notes, describe_16_bit_serving_effect(loaded, run)]
        if verdict.passed is False and verdict.kept_gain is not None:
            ways = [*chosen.list_ways_to_keep_gain(run), "this file as it is: --min-kept 0"]
            message, hint = f"nothing is written, as rounding loses too much: {verdict.reason}", "; or ".join(ways)
            raise RunError(message, verdict.limit, hint, code="merge-differs")
        if verdict.passed is False:
            message = f"{verdict.engine} differs from the trained adapter: {verdict.reason}"
            raise RunError(message, verdict.limit, chosen.hint_if_different(), code="merge-differs")
        if require_proof and verdict.kept_gain is not None and verdict.kept_gain.share is None:
            raise RunError(f"the export is not proven: {verdict.kept_gain.describe()}", "a share that was measured")
        if verdict.passed is None and require_proof:
            hint = "without --require-proof the folder is written, unproven"
            raise RunError(f"the export is not proven: {verdict.reason}", "an export that the engine was asked", hint)
        files = {f.relative_to(folder).as_posix(): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    return ExportResult(str(run), str(out), target, files, facts, written.commands, notes, verdict)


def require_exported_method(run: Path) -> None:
    """Raise AdapterError if a run's method can be exported in no form; before its base is loaded."""
    config = PeftConfig.from_pretrained(find_adapter_folder(run))
    if not config.is_exported():
        raise AdapterError(
            f"{run} was trained with {config.name}, which changes no weight of the base: it has no export",
            "a run of a method whose adapter is a LoRA or can be merged: `slimtune methods` lists them",
            f"slimtune chat {shlex.quote(str(run))}, slimtune serve, or HF PEFT",
        )


def refuse_adapter_bound_to_quantized_base(loaded: TrainedModel, run: Path) -> None:
    """Raise AdapterError if an adapter belongs to its quantized base alone, so that no engine can add it to another."""
    if loaded.recipe is not None and loaded.recipe.method_config().compensates_quantization:
        raise AdapterError(
            f"the adapter of {run} started with what quantization to {loaded.recipe.model.quantization} removed from "
            "the base (loftq); a base in 16 bits still has it, and would have it twice",
            "base and adapter as one model",
            f"slimtune merge {shlex.quote(str(run))} --out FOLDER, or --merged",
        )
