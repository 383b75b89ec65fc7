"""`slimtune export`: a run as Ollama, llama.cpp or vLLM reads it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.formatting import format_bytes
from .common import Json, Run, console, error_console
from .verify import format_verdicts


def export_run(
    run: Run,
    to: Annotated[str, typer.Option(help="Target: gguf, ollama or vllm.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not contain files.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Base and adapter as one model.")] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", "--quantize", help="f32, f16; merged also bf16, q8_0, and what llama-quantize makes: Q4_K_M."
        ),
    ] = None,
    convert_to_lora: Annotated[
        str | None,
        typer.Option(help="Convert it to a LoRA first: of this rank (16), or keeping this share of the change (0.99)."),
    ] = None,
    ollama_base: Annotated[
        str | None, typer.Option(help="Ollama's FROM: a name from its library (llama3.1:8b), or a GGUF.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the engine; by default the folder's.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of every conversation in Ollama.")] = None,
    num_ctx: Annotated[int | None, typer.Option(help="Tokens of Ollama's window.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What vLLM computes in: float32, bfloat16, float16.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check the export by the engine.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of llama.cpp during the check.")] = None,
    as_lora: Annotated[str | None, typer.Option("--as-lora", hidden=True)] = None,
    from_base: Annotated[str | None, typer.Option("--from", hidden=True)] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a run as Ollama, llama.cpp or vLLM reads it, checked by the engine."""
    from ..export.exporter import ExportOptions, export

    screen = error_console()
    for old, new, value in (("--as-lora", "--convert-to-lora", as_lora), ("--from", "--ollama-base", from_base)):
        if value is not None:
            screen.print(f"warning: {old} is now called {new}", style="yellow", markup=False)
    lora = convert_to_lora or as_lora
    rank = None if lora is None else _parse_rank(lora)
    options = ExportOptions(merged, precision, rank, ollama_base or from_base, name, system, num_ctx, dtype)
    target: Any = to  # an unknown one is refused with the nearest name
    result = export(
        run,
        target,
        out,
        options,
        verify=not no_verify,
        threads=threads,
        log=lambda text: screen.print(text, style="dim", markup=False),
    )
    if not as_json:
        _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    screen = console()
    for file, size in result["files"].items():
        screen.print(f"{result['out']}/{file}  {format_bytes(size)}", markup=False)
    if conversion := result.get("conversion"):
        screen.print(f"as a LoRA: {conversion['error']:.2%} of the change is lost", markup=False)
    for note in result["notes"]:
        screen.print(f"note: {note}", markup=False)
    screen.print(format_verdicts([result["check"]]))
    if result["check"]["passed"] is None:
        error_console().print(f"NOT VERIFIED: {result['check']['reason']}", style="bold yellow", markup=False)
    screen.print("\nnext:")
    for command in result["commands"]:
        screen.print(f"  {command}", markup=False)


def _parse_rank(text: str) -> Any:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"--convert-to-lora {text!r} is neither a rank nor a share") from None
