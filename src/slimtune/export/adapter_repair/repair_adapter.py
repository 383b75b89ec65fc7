"""Write an adapter of any trainer so that an engine reads it rightly: `slimtune repair`.

    check → mend each finding that can be mended → check again, until nothing changes → an adapter as PEFT writes it
    → the export for the engine; where the engine cannot add such an adapter, base and adapter as one model
    → log-probabilities of what was written, in the engine that is here, against the mended adapter

A fault that is left is an error: what was not saved cannot be mended.
"""

import dataclasses
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ...core.adapters.peft_config import CONFIG_FILE, write_adapter_config
from ...core.adapters.peft_model import PeftModel
from ...core.foundation.dtype_names import llama_cpp_dtype_name
from ...core.foundation.files import atomic_folder, read_json_object
from ...core.models.base_config import load_base_config
from ...core.models.loader import load_base
from ...core.models.model_source import resolve_model_source
from ...core.training.run_dir import RunDir
from ...core.training.trained_model import TrainedModel
from ...errors import AdapterError, ModelError, UsageError, format_names, suggest
from ..adapter_check.adapter_findings import FINDING_KINDS, Mend
from ..adapter_check.check_file import FileCheck, check_file
from ..export_format import TOKENIZER_FILES, list_export_targets
from ..export_results import EngineVerdict, MergeResult
from ..export_support import get_export_support_flags, split_low_rank_and_other_changes
from ..exporter import export
from ..manifest import EXPORT_MANIFEST
from ..merge import load_run_for_export, merge
from ..mlx import collect_mlx_lora_pairs
from ..served_place import compute_loudest_reference
from ..verify import ExportVerifier
from ..vllm import list_unfixable_and_convertible_vllm_refusals, write_plain_lora_files
from .adapter_mends import MENDS, AdapterContents, RepairAnswers
from .repair_result import AppliedMend, RepairResult, WrittenForm

EXPORT_TARGETS = {"vllm": "vllm", "ollama": "ollama", "llama.cpp": "gguf", "mlx": "mlx", "peft": ""}
"""Export format by engine; PEFT reads the mended adapter as it is."""
MENDED_FOLDER = "peft"
"""Folder, beside an engine's files, with the mended adapter that they were made from."""
_MOST_PASSES = 6
_BY_EXPORT = (Mend.FOLD_START, Mend.MERGE, Mend.CARRY_TOKENIZER)
"""What the writing for the engine mends."""


class MendedAdapter(NamedTuple):
    """An adapter folder whose findings are mended, and its check."""

    source: Path
    folder: Path
    mended: list[AppliedMend]
    check: FileCheck

    def has(self, code: str) -> bool:
        """Return whether a finding is left."""
        return any(finding.code == code for finding in self.check.result.findings)


class WrittenRepair(NamedTuple):
    """What writing for an engine gave."""

    proof: EngineVerdict
    commands: list[str]
    notes: list[str]


def repair_adapter(
    path: Path,
    engine: str,
    out: Path,
    base: str | None = None,
    answers: RepairAnswers | None = None,
    *,
    may_merge: bool = True,
    threads: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> RepairResult:
    """Write an adapter as an engine reads it rightly; the adapter itself is only read.

    Args:
        path: an adapter folder of any trainer that writes PEFT's files, or a run folder.
        engine: a key of `EXPORT_TARGETS`.
        out: folder to write; it does not exist yet, or is empty.
        base: the base; None: the one that the adapter or the run names.
        answers: what the file does not say.
        may_merge: write base and adapter as one model where the engine cannot add the adapter.
        threads: of llama.cpp while comparing; None: half of the cores.
        log: gets progress messages.

    Raises:
        UsageError: there is no such adapter, engine or base; `out` contains files.
        AdapterError: a fault is left that cannot be mended, or the engine cannot add the adapter and merging is off.
        RunError: the disk is full, or what was written is not the mended adapter.
    """
    _require_engine(engine)
    out = Path(out).expanduser()
    RunDir.require_free(out)
    with tempfile.TemporaryDirectory(prefix="slimtune-repair-") as temporary:
        mended = mend_adapter(path, base, answers or RepairAnswers(), Path(temporary), log)
        reasons = _list_reasons_to_merge(mended, engine)
        if reasons and not may_merge:
            raise AdapterError(
                f"{engine} cannot add this adapter to its base: {'; '.join(reasons)}",
                "an adapter that it can add",
                "without --no-merge base and adapter are written as one model",
            )
        if mended.has("tied-weights-differ"):
            _untie_base(mended, Path(temporary, "untied"))
        form: WrittenForm = "merged" if reasons else "adapter"
        if engine == "peft" and not reasons:
            written = _write_for_peft(mended, out, log)
        else:
            written = _write_for_engine(mended, engine, out, bool(reasons), threads, log)
    result = mended.check.result
    later = [f for f in result.findings if FINDING_KINDS[f.code].mend in _BY_EXPORT]
    return RepairResult(
        adapter=str(path),
        base=str(result.base),
        engine=engine,
        out=str(out),
        form=form,
        merged_because=reasons,
        mended=[*mended.mended, *(AppliedMend(f.code, f.found, str(f.mend)) for f in later)],
        files={f.relative_to(out).as_posix(): f.stat().st_size for f in sorted(out.rglob("*")) if f.is_file()},
        check=dataclasses.replace(
            result, adapter=str(out if form == "adapter" and engine == "peft" else out / MENDED_FOLDER)
        ),
        proof=written.proof,
        commands=written.commands,
        notes=written.notes,
    )


def _require_engine(engine: str) -> None:
    if engine not in EXPORT_TARGETS:
        raise UsageError(f"--for {engine!r}{suggest(engine, EXPORT_TARGETS)}", f"one of {format_names(EXPORT_TARGETS)}")
    if (target := EXPORT_TARGETS[engine]) and target not in list_export_targets():
        raise UsageError(f"nothing is written for {engine} yet", format_names(list_export_targets()))


def mend_adapter(
    path: Path, base: str | None, answers: RepairAnswers, folder: Path, log: Callable[[str], None] = lambda _: None
) -> MendedAdapter:
    """Write an adapter with its findings mended, as PEFT reads it, into a folder of `folder`; see `repair_adapter`."""
    check, mended = check_file(path, base), []
    if check.result.base is None:
        raise UsageError(f"the base of {path} is not at hand", "the base that it was trained on", "--base BASE")
    adapter = check.adapter
    if adapter.config.get("init_lora_weights") == "loftq":
        raise AdapterError(
            "init_lora_weights is 'loftq': the adapter makes up for the rounding of the base that it was trained on, "
            "and is wrong beside every other one",
            "an adapter of an unrounded base",
            "serve it beside the base quantized as in training, or merge the two where it was trained",
        )
    contents = AdapterContents(
        {key: adapter.load_tensor(key) for key in adapter.tensors}, dict(adapter.config), dict(adapter.metadata)
    )
    contents.config["base_model_name_or_path"] = _resolve_base_name(check.result.base)
    for number in range(_MOST_PASSES):
        place = folder / f"pass-{number}"
        pending = [f for f in check.result.findings if FINDING_KINDS[f.code].mend in MENDS]
        for kind in MENDS:
            if found := [f for f in pending if FINDING_KINDS[f.code].mend is kind]:
                log(f"{found[0].code}: {kind.value}")
                MENDS[kind](contents, check, answers)
                mended += [AppliedMend(f.code, f.found, kind.value) for f in found]
                break  # the next mend is of what this one left
        place.mkdir()
        contents.write(place)
        _copy_tokenizer_files(adapter.folder, place)
        check = check_file(place, base)
        if number:
            shutil.rmtree(folder / f"pass-{number - 1}")
        if not pending:
            break
    _refuse_faults_left(path, check)
    return MendedAdapter(path, place, mended, check)


def _resolve_base_name(spec: str) -> str:
    return str(Path(spec).expanduser().resolve()) if Path(spec).expanduser().exists() else spec


def _copy_tokenizer_files(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if re.fullmatch(TOKENIZER_FILES, file.name) and file.is_file():
            shutil.copyfile(file, folder / file.name)


def _refuse_faults_left(path: Path, check: FileCheck) -> None:
    """Raise AdapterError if a fault is left that the writing for the engine does not mend."""
    faults = [f for f in check.result.findings if f.severity == "fault"]
    left = [f for f in faults if FINDING_KINDS[f.code].mend not in _BY_EXPORT]
    if left:
        what = "; ".join(f"{f.code}: {f.found}" for f in left)
        raise AdapterError(f"{path} cannot be mended: {what}", left[0].expected, left[0].fix)
    if check.placement is None:
        reasons = "; ".join(check.result.not_proven) or "its keys could not be compared with the base"
        raise AdapterError(f"{path} cannot be mended: {reasons}", "an adapter whose keys can be compared with its base")


# --- for the engine --------------------------------------------------------------------------------------------------


def _list_reasons_to_merge(mended: MendedAdapter, engine: str) -> list[str]:
    """Return why an engine cannot add the adapter to its base, one clause each; it then gets one model of both."""
    model = _attach_on_meta_device(mended)
    reasons = []
    if mended.has("tied-weights-differ"):
        reasons.append("head and embedding have two values, which the base ties")
    if engine == "vllm":
        fixed, form = list_unfixable_and_convertible_vllm_refusals(model, "default")
        reasons += [*fixed, *form]
    elif engine == "llama.cpp":
        _, other = split_low_rank_and_other_changes(model)
        if other:
            reasons.append(
                f"llama.cpp adds nothing but scale · B A to linear layers and experts: {format_names(other)}"
            )
        if mended.has("tied-head"):
            reasons.append("a GGUF has one weight for head and embedding, and the adapter changes one of them")
    elif engine == "mlx":
        reasons += collect_mlx_lora_pairs(model)[1]
    elif engine == "ollama":
        reasons.append("Ollama from 0.34.1 on creates no model from an adapter")
    if reasons and not get_export_support_flags(model).merged:
        raise AdapterError(
            f"{engine} cannot add this adapter, and it cannot be merged: {'; '.join(reasons)}",
            "an adapter that changes weights of the base",
            "--for peft, and use it from Python",
        )
    return reasons


def _attach_on_meta_device(mended: MendedAdapter) -> Any:
    """Return the base with the mended adapter, without values; copies of the base's own matrices are left out."""
    placement, adapter = mended.check.placement, mended.check.adapter
    assert placement is not None
    biases = (key for key in placement.weights if key.endswith(".bias"))
    tensors = {key: adapter.load_tensor(key) for key in (*placement.placed, *biases)}
    with tempfile.TemporaryDirectory(prefix="slimtune-repair-") as folder:
        AdapterContents(tensors, adapter.config, adapter.metadata).write(Path(folder))
        return PeftModel.from_pretrained(mended.check.model, folder)


def _untie_base(mended: MendedAdapter, folder: Path) -> None:
    """Write the base with a head of its own, and let the mended adapter name it."""
    spec = str(mended.check.result.base)
    stored = load_base_config(spec).config.dtype or torch.float32
    base = load_base(spec, dtype=stored, device="cpu")
    model: Any = base.model
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    file = mended.folder / CONFIG_FILE
    write_adapter_config(mended.folder, {**read_json_object(file), "base_model_name_or_path": str(folder)})


def _write_for_engine(
    mended: MendedAdapter, engine: str, out: Path, merged: bool, threads: int | None, log: Callable[[str], None]
) -> WrittenRepair:
    """Write what an engine reads, and the mended adapter beside it."""
    run = mended.folder
    if merged and engine in ("vllm", "peft"):
        proof = _describe_merge(merge(run, out))
        commands, notes = [shlex.join(["vllm", "serve", str(out)])] if engine == "vllm" else [], list[str]()
    else:
        options = {"merged": True} if merged and engine != "ollama" else {}
        result = export(
            run, EXPORT_TARGETS[engine], out, options, threads=threads,
            log=lambda text: log(text.replace(str(run), str(mended.source))),
        )  # fmt: skip
        proof, commands, notes = result.check, result.commands, result.notes
    kept = out / MENDED_FOLDER
    shutil.copytree(run, kept)
    _name_base(kept, str(mended.check.result.base))
    manifest = out / EXPORT_MANIFEST
    if manifest.is_file():
        content = manifest.read_text(encoding="utf-8")
        manifest.write_text(content.replace(str(run), str(kept.resolve())), encoding="utf-8")
    moved = [[text.replace(str(run), str(kept)) for text in texts] for texts in (commands, notes)]
    return WrittenRepair(proof, *moved)


def _describe_merge(result: MergeResult) -> EngineVerdict:
    merged = result.comparison
    return EngineVerdict(
        "merged folder", llama_cpp_dtype_name(merged.dtype), positions=merged.positions,
        max_difference=merged.max_difference, mean_difference=merged.mean_difference, effect=merged.effect,
        strength=merged.strength, passed=True, cause="applied",
    )  # fmt: skip


def _name_base(folder: Path, spec: str) -> None:
    values = read_json_object(folder / CONFIG_FILE)
    write_adapter_config(folder, {**values, "base_model_name_or_path": _resolve_base_name(spec)})


def _write_for_peft(mended: MendedAdapter, out: Path, log: Callable[[str], None]) -> WrittenRepair:
    """Write the mended adapter, without a start that is a part of the base; compare it in PEFT, where it is here."""
    spec = str(mended.check.result.base)
    unproven = ""
    loaded = None
    if _is_on_disk(spec):
        try:
            log(f"loading the base {spec}")
            loaded = load_run_for_export(mended.folder)
        except (ModelError, UsageError) as error:
            unproven = error.message
    else:
        unproven = f"the weights of {spec} are not on this disk"
    with atomic_folder(out) as folder:
        shutil.copytree(mended.folder, folder, dirs_exist_ok=True)
        if mended.has("start-in-base"):
            if loaded is None:
                raise AdapterError(f"the start of this adapter is a part of its base, and {unproven}", "the base")
            model: Any = loaded.model
            factors, other = split_low_rank_and_other_changes(model)
            if not other:
                write_plain_lora_files(model, "default", factors, folder, folded=True)
        if loaded is None:
            proof = EngineVerdict("PEFT", "f32", cause="not-proven", reason=unproven)
        else:
            proof = _compare_in_peft(loaded, folder)
        if proof.passed is False:
            raise AdapterError(f"the mended file is not the adapter in {proof.engine}: {proof.reason}", proof.limit)
    return WrittenRepair(proof, [], [])


def _is_on_disk(spec: str) -> bool:
    """Return whether a base's weights can be loaded without a download."""
    source = resolve_model_source(spec)
    if source.kind != "hub":
        return True
    try:
        snapshot_download(source.path, allow_patterns=["*.safetensors*", "*.json"], local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _compare_in_peft(loaded: TrainedModel, folder: Path) -> EngineVerdict:
    """Compare a written adapter, as PEFT loads it, with the mended one; without PEFT, as slimtune loads it."""
    if loaded.base.quantization is not None:
        reason = f"the base is quantized ({loaded.base.quantization}), and was compared with nothing"
        return EngineVerdict("PEFT", "f32", cause="not-proven", reason=reason)
    verifier = ExportVerifier(loaded, folder, folder, reference=compute_loudest_reference(loaded))
    return verifier.verify_engine("PEFT", "f32", lambda: verifier.open_in_peft(folder))
