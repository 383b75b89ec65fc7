"""Export a run in the format an engine serves, checked by that engine before the folder appears: `slimtune export`.

    gguf      adapter.gguf, for llama.cpp beside a GGUF of the base; merged: model.gguf, a whole model
    ollama    the same, and a Modelfile
    vllm      the adapter's two files as vLLM reads them, and serve.sh

`slimtune merge` writes the fourth format, a plain Hugging Face folder.
"""

import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.adapters.export_support import get_export_formats
from ..core.foundation.files import atomic_folder
from ..core.training.run_dir import ADAPTER_FILE, RunDir
from ..core.training.trained_model import TrainedModel, require_causal_lm_run, resolve_trained_base
from ..errors import AdapterError, RunError, UsageError, format_names, nearest
from .gguf import (
    ADAPTER_DTYPES,
    PRECISIONS,
    quantize_afterwards,
    require_converter,
    require_quantizer,
    write_adapter_gguf,
)
from .manifest import ADAPTER_GGUF, MODEL_GGUF, Target, require_target, write_manifest
from .merge import load_trained, write_merged_gguf
from .ollama import find_base, write_ollama
from .reference_logps import Verdict
from .served_base import check_served_base
from .verify import Verifier, describe_16_bit_base
from .vllm import write_vllm_adapter

NOT_ASKED = "the check was left out (--no-verify); `slimtune verify FOLDER` makes it later"
OPTION_TARGETS: dict[str, tuple[str, ...]] = {
    "precision": ("gguf", "ollama"),
    "ollama_base": ("ollama",),
    "name": ("ollama", "vllm"),
    "system": ("ollama",),
    "num_ctx": ("ollama",),
    "dtype": ("vllm",),
}
"""The targets that read an option; the others are read by all."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export a run.

    An adapter's precision is "f32" (the default) or "f16"; a merged model's also "bf16", "q8_0", or what llama.cpp's
    `llama-quantize` makes, such as "Q4_K_M" (by default "f16").
    """

    merged: bool | None = None  # base and adapter as one model; None: for Ollama, unless an option is of an adapter
    precision: str | None = None
    convert_to_lora: float | None = None  # first, to this rank (int) or to keep this share of each change (0 to 1)
    ollama_base: str | None = None  # Ollama's FROM; None: the base's own GGUF
    name: str | None = None  # of the model in the engine; None: the folder's
    system: str | None = None  # prompt of every conversation in Ollama that has none
    num_ctx: int | None = None  # tokens of Ollama's window
    dtype: str | None = None  # what vLLM computes in


def export(
    run: Path,
    target: Target,
    out: Path,
    options: ExportOptions = ExportOptions(),
    *,
    verify: bool = True,
    require_proof: bool = False,
    threads: int | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Export a run.

    Args:
        run: a run folder, or an adapter folder.
        target, options: what is written, and how.
        out: folder to write; it does not exist yet, or is empty.
        verify: compare the engine with the trained adapter, and write nothing if they differ.
        require_proof: write nothing either if they could not be compared, or the base that will be served is not known.
        threads: of llama.cpp while verifying; None: half of the cores.
        log: gets progress messages.

    Returns:
        `run`, `out`, `to` (the target), `files` (bytes by name), `commands` (shell lines), `notes` (one sentence each),
        `check` (the fields of a `Verdict`; `passed` is None if it could not be checked), and facts of the target.

    Raises:
        UsageError: an impossible target, option or name; the adapter is not a LoRA; `out` contains files; Ollama's base
            is not the base of the training.
        AdapterError: the adapter does not fit its base, or the target cannot take it; the alternatives are given.
        ModelError: a program of llama.cpp, or a package, is not installed.
        RunError: the disk is full, the engine differs from the trained adapter, or proof is required and there is none.
    """
    run, out = Path(run), Path(out).expanduser()
    if options.precision and options.precision.lower() in PRECISIONS:
        options = replace(options, precision=options.precision.lower())
    if options.merged is None:  # Ollama from 0.34.1 on creates no model from an adapter
        separate = options.ollama_base is not None or options.convert_to_lora is not None
        options = replace(options, merged=target == "ollama" and not separate)
    _check_options(target, options)
    if require_proof and not verify:
        raise UsageError("--require-proof and --no-verify together", "one of them: the check is the proof")
    RunDir.require_free(out)
    require_causal_lm_run(run)
    if (base := resolve_trained_base(run)).kind != "gguf":
        if options.merged:
            require_converter()
        elif target == "ollama" and options.ollama_base is None:
            raise UsageError(
                f"the base {base.spec} is not a GGUF, which Ollama needs to add an adapter to",
                "a name from Ollama's library, or a GGUF of the same base",
                "leave --no-merged out: llama.cpp's converter makes one GGUF of base and adapter; for an Ollama before "
                "0.34.1 also --ollama-base NAME (such as llama3.1:8b)",
            )
    log(f"loading {run} and its base {base.spec}")
    loaded = load_trained(run)
    model: Any = loaded.model
    needed = (loaded.adapter / ADAPTER_FILE).stat().st_size
    if options.merged:
        needed = 2 * sum(p.numel() for p in model.parameters())
    else:
        require_plain_base(loaded, run)
    with atomic_folder(out, needed) as folder:
        log(f"writing {out}")
        if target == "vllm":
            lora, name, dtype = options.convert_to_lora, options.name, options.dtype
            facts = write_vllm_adapter(loaded, run, folder, out=out, name=name, convert_to_lora=lora, dtype=dtype)
        else:
            facts = _write_gguf(loaded, run, folder, out, options)
        if target == "ollama":
            facts |= _write_ollama(loaded, folder, out, options, verify)
        commands, notes = facts.pop("commands"), facts.pop("notes", [])
        write_manifest(folder, target, run, facts)
        verdict = Verdict(target, "", reason=NOT_ASKED)
        if verify:
            with tempfile.TemporaryDirectory(prefix=".slimtune-verify-", dir=folder.parent) as temporary:
                verifier = Verifier(loaded, run, Path(temporary), threads=threads, log=log)
                verdict = next(verifier.verify_export(folder, {"kind": target, **facts}))
        elif not options.merged and loaded.base.quantization is not None:
            notes = [*notes, describe_16_bit_base(loaded, run)]
        if verdict.passed is False:
            hint = "please report it; --no-verify writes the folder without the check"
            if options.merged and options.precision != "f32":
                hint = f"--precision f32, which holds smaller changes; if it differs, too, {hint}"
            raise RunError(f"{verdict.engine} differs from the trained adapter: {verdict.reason}", verdict.limit, hint)
        if verdict.passed is None and require_proof:
            hint = "without --require-proof the folder is written, unproven"
            raise RunError(f"the export is not proven: {verdict.reason}", "an export that the engine was asked", hint)
        files = {f.relative_to(folder).as_posix(): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    result = {"run": str(run), "out": str(out), "to": target, "files": files, **facts}
    return {**result, "commands": commands, "notes": notes, "check": asdict(verdict)}


def require_plain_base(loaded: TrainedModel, run: Path) -> None:
    """Raise AdapterError if an adapter belongs to its quantized base alone, so that no engine can add it to another."""
    if loaded.recipe is not None and loaded.recipe.method_config().compensates_quantization:
        raise AdapterError(
            f"the adapter of {run} started with what quantization to {loaded.recipe.model.quantization} removed from "
            "the base (loftq); a base in 16 bits still has it, and would have it twice",
            "base and adapter as one model",
            f"slimtune merge {shlex.quote(str(run))} --out FOLDER, or --merged",
        )


def _check_options(target: str, options: ExportOptions) -> None:
    require_target(target)
    unread = [
        f"--{option.replace('_', '-')}"
        for option, readers in OPTION_TARGETS.items()
        if getattr(options, option) is not None and target not in readers
    ]
    if unread:
        raise UsageError(f"{', '.join(unread)} has no effect in an export to {target}", hint="leave it out")
    if options.merged and target == "vllm":
        raise UsageError("vLLM reads a merged model as a plain folder", hint="slimtune merge RUN --out FOLDER")
    if options.merged and options.ollama_base is not None:
        raise UsageError("--merged and --ollama-base together", "one of them: a merged model contains its base")
    if options.merged and options.convert_to_lora is not None:
        raise UsageError("--merged and --convert-to-lora together", "one of them: a merged model has no adapter")
    if options.precision is None:
        return
    if options.merged and options.precision not in PRECISIONS:
        require_quantizer(options.precision)
    elif not options.merged and options.precision not in ADAPTER_DTYPES:
        message = f"an adapter in {options.precision!r}{nearest(options.precision, ADAPTER_DTYPES)}"
        raise UsageError(message, format_names(ADAPTER_DTYPES), "--merged takes every precision")


def _write_gguf(loaded: TrainedModel, run: Path, folder: Path, out: Path, options: ExportOptions) -> dict[str, Any]:
    model: Any = loaded.model
    if options.merged:
        file, precision = folder / MODEL_GGUF, options.precision or "f16"
        with quantize_afterwards(file, precision) as (whole, written):
            write_merged_gguf(loaded, run, whole, written)
        chat = shlex.join(["llama-cli", "-m", str(out / MODEL_GGUF)])
        return {"precision": precision, "commands": [chat, *list_serve_commands(model, run)]}
    adapter, facts = model.active_adapters[0], {}
    if options.convert_to_lora is not None:
        report = model.to_lora(adapter, options.convert_to_lora)
        facts = {"conversion": {"method": model.peft_config[adapter].name, "error": report.error}}
        adapter = report.adapter
    precision = options.precision or "f32"
    facts = write_adapter_gguf(folder / ADAPTER_GGUF, model, adapter, precision) | facts
    base = loaded.base.source.path if loaded.base.source.kind == "gguf" else "BASE.gguf"
    command = shlex.join(["llama-cli", "-m", base, "--lora", str(out / ADAPTER_GGUF)])
    return {**facts, "precision": precision, "commands": [command, *list_serve_commands(model, run)]}


def list_serve_commands(model: Any, run: Path) -> list[str]:
    """Return the command that answers from llama.cpp without its programs, if it can serve the run: [] or one."""
    serve = shlex.join(["slimtune", "serve", str(run), "--engine", "llama.cpp"])
    return [f"{serve}  # in place of llama-cli, where it is not installed"] if get_export_formats(model).gguf else []


def _write_ollama(
    loaded: TrainedModel, folder: Path, out: Path, options: ExportOptions, verify: bool
) -> dict[str, Any]:
    source, model = loaded.base.source, loaded.model
    facts = write_ollama(
        folder,
        base=str(folder / MODEL_GGUF) if options.merged else options.ollama_base or source.path,
        adapter=None if options.merged else folder / ADAPTER_GGUF,
        tokenizer=loaded.base.tokenizer,
        config=model.config,
        name=options.name or out.resolve().name.lower(),
        system=options.system,
        max_seq_len=loaded.recipe.data.max_seq_len if loaded.recipe is not None else None,
        num_ctx=options.num_ctx,
        out=out,
    )
    if not options.ollama_base and not options.merged and loaded.base.quantization is None:
        note = "the adapter was trained on this base in 16 or 32 bits; Ollama adds it to the base as the file has it"
        facts["notes"].append(note)
    if (given := options.ollama_base) is not None:
        path = find_base(given)
        if not verify:  # the check compares them, too
            check_served_base(given, path, loaded)
        facts["ollama_base"] = given if path is None else str(path.resolve())
    return {**facts, "template": facts["template"] is not None}
