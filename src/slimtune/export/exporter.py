"""`slimtune export`: a run in the form something serves it in, proven by that engine before the folder appears.

    gguf      adapter.gguf, for llama.cpp beside a GGUF of the base; merged: model.gguf, which needs nothing beside it
    ollama    the same, and a Modelfile
    vllm      the adapter's two files as vLLM takes them, and serve.sh

`slimtune merge` writes the fourth form, a plain Hugging Face folder.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import RunError, UsageError, format_names, nearest
from ..run_dir import ADAPTER_FILE
from ..setup import TrainedModel
from ..utils.files import atomic_folder
from . import gguf, in_few_bits, verify_formats
from .folder import read_note, require_free, write_note
from .gguf_model import PRECISIONS, quantized, quantizer
from .ollama import write_ollama
from .verify import Trained, Verdict
from .vllm import vllm_adapter

Destination = Literal["gguf", "ollama", "vllm"]


_FLAGS = {
    "precision": "precision", "from": "base_from", "name": "name", "system": "system", "num-ctx": "num_ctx",
    "dtype": "dtype",
}  # fmt: skip
_READ_BY = {
    "precision": ("gguf", "ollama"), "base_from": ("ollama",), "name": ("ollama", "vllm"), "system": ("ollama",),
    "num_ctx": ("ollama",), "dtype": ("vllm",),
}  # fmt: skip


@dataclass(frozen=True)
class ExportOptions:
    """How a run is to ship.

    Args:
        merged: base and adapter as one model; else the adapter beside its base.
        precision: of the tensors written: "f32" or "f16" for an adapter; for a merged model also "bf16", "q8_0", or
            what llama.cpp's `llama-quantize` makes, such as "Q4_K_M". None: "f32", merged "f16".
        as_lora: make a LoRA of the adapter first: of this rank (int), or keeping this share of each layer's change.
        base_from: what Ollama's FROM names; None: the base's own GGUF.
        name: of the model there; None: the folder's.
        system: system prompt of every conversation in Ollama that brings none.
        num_ctx: tokens of Ollama's window.
        dtype: what vLLM computes in.
    """

    merged: bool = False
    precision: str | None = None
    as_lora: float | None = None
    base_from: str | None = None
    name: str | None = None
    system: str | None = None
    num_ctx: int | None = None
    dtype: str | None = None


def export(
    run: Path,
    to: Destination,
    out: Path,
    wish: ExportOptions = ExportOptions(),
    *,
    prove: bool = True,
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a run as something serves it.

    Args:
        run: a run folder, or an adapter folder.
        to: where it goes.
        out: folder to write: not there yet, or empty.
        wish: how.
        prove: ask the engine, and write nothing where it says something else than the trained adapter.
        threads: of llama.cpp while proving; None: half of the cores.
        say: told what is being done.

    Returns:
        `run`, `out`, `to`, `files` (bytes by name), `commands` (shell lines), `notes` (what to know, each a sentence),
        `check` (the fields of a `Verdict`; `passed` is None where it could not be checked), and what the form has of
        its own.

    Raises:
        UsageError: a destination, precision or name that cannot be; the method is no LoRA; `out` holds files.
        AdapterError: the adapter does not fit, or cannot go there; the way out is said.
        ModelError: a program of llama.cpp's, or a package, is not there.
        RunError: the disk is full, or the engine says something else than the trained adapter.
    """
    run, out = Path(run), Path(out).expanduser()
    if to not in get_args(Destination):
        raise UsageError(
            f"unknown destination {to!r}{nearest(to, get_args(Destination))}", format_names(get_args(Destination))
        )
    require_free(out)
    if wish.precision and wish.precision.lower() in PRECISIONS:
        wish = replace(wish, precision=wish.precision.lower())
    _require_sense(to, wish)
    loaded = verify_formats.load_trained(run)
    if not wish.merged:
        in_few_bits.require_own_base(loaded, run)
    need = _need(loaded, wish)
    with atomic_folder(out, need) as folder:
        say(f"writing {out}")
        facts = _vllm(run, folder, out, wish) if to == "vllm" else _gguf(loaded, run, folder, out, wish)
        if to == "ollama":
            facts |= _ollama(loaded, folder, out, wish, facts)
        write_note(folder, to, run, {k: v for k, v in facts.items() if k not in ("commands", "notes")})
        verdict, trained = _proof(loaded, run, folder, threads, say) if prove else (_unasked(to), None)
        if not wish.merged:
            facts["notes"] += in_few_bits.note(loaded, run, trained)
        if verdict.passed is False:
            raise RunError(
                f"{verdict.engine} does not say what the trained adapter says: {verdict.reason}",
                verdict.limit,
                "please report it; --no-verify writes the folder all the same",
            )
        files = {f.relative_to(folder).as_posix(): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    return {"run": str(run), "out": str(out), "to": to, "files": files, **facts, "check": verdict.facts()}


def _require_sense(to: str, wish: ExportOptions) -> None:
    idle = [
        f"--{flag}" for flag, field in _FLAGS.items() if getattr(wish, field) is not None and to not in _READ_BY[field]
    ]
    if idle:
        raise UsageError(f"{', '.join(idle)}: nothing reads that in an export to {to}", hint="leave it out")
    if wish.base_from is not None and wish.merged:
        raise UsageError("--merged and --from at once", "one of them: a merged model stands on nothing")
    if to == "vllm" and wish.merged:
        raise UsageError("vLLM reads a merged model as a plain folder", hint="slimtune merge RUN --out FOLDER")
    if wish.merged and wish.as_lora is not None:
        raise UsageError("--merged and --as-lora at once", "one of them: a merged model has no adapter left")
    kinds = PRECISIONS if wish.merged else gguf.DTYPES
    if to != "vllm" and wish.precision and not wish.merged and wish.precision not in kinds:
        raise UsageError(
            f"an adapter in {wish.precision!r}{nearest(wish.precision, kinds)}",
            format_names(kinds),
            "--merged takes every precision",
        )

    if wish.merged and wish.precision and wish.precision not in PRECISIONS:
        quantizer(wish.precision)


def _need(loaded: TrainedModel, wish: ExportOptions) -> int:
    """Return the bytes that will be written, about."""
    if not wish.merged:
        return (loaded.adapter / ADAPTER_FILE).stat().st_size
    model: Any = loaded.model
    return 2 * sum(p.numel() for p in model.parameters())


def _gguf(loaded: TrainedModel, run: Path, folder: Path, out: Path, wish: ExportOptions) -> dict[str, Any]:
    model: Any = loaded.model
    if wish.merged:
        return _merged_gguf(loaded, run, folder, out, wish.precision or "f16")
    adapter, made = model.active_adapter, {}
    if wish.as_lora is not None:
        report = model.to_lora(adapter, wish.as_lora)
        made = {"conversion": {"method": model.peft_config[adapter].name, "error": report.error}}
        adapter = report.adapter
    precision = wish.precision or "f32"
    facts = gguf.write_adapter(folder / verify_formats.ADAPTER, model, adapter=adapter, precision=precision)  # type: ignore[arg-type]
    ranks = sorted(set(facts.pop("ranks").values()))
    base = loaded.base.source
    beside = base.path if base.kind == "gguf" else "BASE.gguf"
    command = shlex.join(["llama-cli", "-m", beside, "--lora", str(out / verify_formats.ADAPTER)])
    return {**facts, **made, "precision": precision, "ranks": ranks, "commands": [command], "notes": []}


def _merged_gguf(loaded: TrainedModel, run: Path, folder: Path, out: Path, precision: str) -> dict[str, Any]:
    file = folder / verify_formats.MODEL
    if precision in PRECISIONS:
        verify_formats.merged_gguf(loaded, run, file, precision)
    else:
        with tempfile.TemporaryDirectory(prefix=".slimtune-", dir=folder.parent) as beside:
            verify_formats.merged_gguf(loaded, run, Path(beside, file.name), "f16")
            quantized(Path(beside, file.name), file, precision)
    return {"precision": precision, "commands": [shlex.join(["llama-cli", "-m", str(out / file.name)])], "notes": []}


def _ollama(
    loaded: TrainedModel, folder: Path, out: Path, wish: ExportOptions, facts: dict[str, Any]
) -> dict[str, Any]:
    source = loaded.base.source
    adapter = None if wish.merged else folder / verify_formats.ADAPTER
    if wish.merged:
        base = str(folder / verify_formats.MODEL)
    elif wish.base_from or source.kind == "gguf":
        base = wish.base_from or source.path
    else:
        raise UsageError(
            f"the base {source.spec} is no GGUF, and Ollama needs one for an adapter to stand on",
            "a name from Ollama's library, or a GGUF of the same base",
            "--from NAME (such as llama3.1:8b), or --merged",
        )
    rows = loaded.recipe.data.max_seq_len if loaded.recipe is not None else None
    written = write_ollama(
        folder,
        base_from=base,
        adapter=adapter,
        tokenizer=loaded.base.tokenizer,
        config=loaded.model.config,  # type: ignore[attr-defined]
        name=wish.name or out.resolve().name.lower(),
        system=wish.system,
        max_seq_len=rows,
        num_ctx=wish.num_ctx,
        out=out,
    )
    notes = [*facts["notes"], *written.notes]
    if wish.base_from:
        notes.append(f"asked beside the base the run was trained on; {wish.base_from} itself was not asked")
    elif adapter is not None and loaded.base.quantization is None:
        notes.append(
            "the adapter was trained on this base in 16 or 32 bits, Ollama adds it to the base as the file has it"
        )
    return {
        "commands": [written.create, written.run],
        "notes": notes,
        "template": written.template is not None,
        "stops": list(written.stops),
        "num_ctx": written.num_ctx,
    }


def _vllm(run: Path, folder: Path, out: Path, wish: ExportOptions) -> dict[str, Any]:
    facts = vllm_adapter(run, folder, out=out, name=wish.name, as_lora=wish.as_lora, dtype=wish.dtype)
    command, notes = facts.pop("command"), facts.pop("warnings")
    again = shlex.join(["slimtune", "verify", str(out), "--vllm", "http://127.0.0.1:8000"])
    notes = [*notes, f"read back here; vLLM itself was not asked: start it, then {again}"]
    return {**facts, "precision": "f32", "commands": [command], "notes": notes}


def _unasked(to: str) -> Verdict:
    return Verdict(to, "", reason="not asked for")


def _proof(
    loaded: TrainedModel, run: Path, folder: Path, threads: int | None, say: Callable[[str], None]
) -> tuple[Verdict, Trained]:
    """Ask what was written; return the verdict, and what it was compared with."""
    with tempfile.TemporaryDirectory(prefix=".slimtune-verify-", dir=folder.parent) as made:
        bench = verify_formats.Bench(loaded, run, Path(made), threads=threads, say=say)
        note = read_note(folder)
        assert note is not None
        return next(bench.export(folder, note)), bench.trained
