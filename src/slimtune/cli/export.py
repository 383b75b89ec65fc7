"""`slimtune export`: a run as Ollama, llama.cpp or vLLM takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.formatting import format_bytes
from .common import Json, Run, console, error_console
from .verify import told


def export_run(
    run: Run,
    to: Annotated[str, typer.Option(help="Where it goes: gguf, ollama or vllm.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not hold files.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Base and adapter as one model.")] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", "--quantize", help="f32, f16; merged also bf16, q8_0, and what llama-quantize makes: Q4_K_M."
        ),
    ] = None,
    as_lora: Annotated[
        str | None,
        typer.Option(help="Make a LoRA of it first: a rank (16), or the share of the change to keep (0.99)."),
    ] = None,
    base_from: Annotated[
        str | None, typer.Option("--from", help="Ollama's FROM: a name from its library (llama3.1:8b), or a GGUF.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model there; by default the folder's.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of every conversation in Ollama.")] = None,
    num_ctx: Annotated[int | None, typer.Option(help="Tokens of Ollama's window.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What vLLM computes in: float32, bfloat16, float16.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not ask the engine.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of llama.cpp while it is asked.")] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a run as Ollama, llama.cpp or vLLM takes it, and prove it by the engine."""
    from ..export.exporter import ExportOptions, export

    wish = ExportOptions(merged, precision, _rank(as_lora), base_from, name, system, num_ctx, dtype)
    said = error_console().print
    where: Any = to  # an unknown one is named with the nearest

    def say(text: str) -> None:
        said(text, style="dim", markup=False)

    found = export(run, where, out, wish, prove=not no_verify, threads=threads, say=say)
    if not as_json:
        screen = console()
        for file, size in found["files"].items():
            screen.print(f"{found['out']}/{file}  {format_bytes(size)}", markup=False)
        if conversion := found.get("conversion"):
            screen.print(f"as a LoRA: {conversion['error']:.2%} of the change is lost", markup=False)
        for note in found["notes"]:
            screen.print(f"note: {note}", markup=False)
        screen.print(told([found["check"]]))
        if found["check"]["passed"] is None:
            error_console().print(f"NOT PROVEN: {found['check']['reason']}", style="bold yellow", markup=False)
        screen.print("\nnow:")
        for command in found["commands"]:
            screen.print(f"  {command}", markup=False)
    return found


def _rank(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"--as-lora {text!r} is neither a rank nor a share") from None
