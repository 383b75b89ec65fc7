"""`slimtune export`: a run as Ollama, llama.cpp or vLLM reads it."""

from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from ..utils.formatting import format_bytes
from .common import WARNING, Json, Run, console, error_console, print_progress
from .inputs import require_run
from .progress import show_progress
from .verify import print_verdicts


def export_run(
    run: Run,
    to: Annotated[str, Option(help="Target: gguf, ollama or vllm.", show_default=False)],
    out: Annotated[Path, Option(help="Folder to write; it must not contain files.", show_default=False)],
    merged: Annotated[
        bool | None,
        Option("--merged/--no-merged", help="Base and adapter as one model; for Ollama by default."),
    ] = None,
    precision: Annotated[
        str | None,
        Option(
            "--precision", "--quantize", help="f32, f16; merged also bf16, q8_0, and what llama-quantize makes: Q4_K_M."
        ),
    ] = None,
    convert_to_lora: Annotated[
        str | None,
        Option(help="Convert it to a LoRA first: of this rank (16), or keeping this share of the change (0.99)."),
    ] = None,
    ollama_base: Annotated[
        str | None, Option(help="Ollama's FROM: a name from its library (llama3.1:8b), or a GGUF.")
    ] = None,
    name: Annotated[str | None, Option(help="Name of the model in the engine; by default the folder's.")] = None,
    system: Annotated[str | None, Option(help="System prompt of every conversation in Ollama.")] = None,
    num_ctx: Annotated[int | None, Option(help="Tokens of Ollama's window.")] = None,
    dtype: Annotated[str | None, Option(help="What vLLM computes in: float32, bfloat16, float16.")] = None,
    no_verify: Annotated[bool, Option("--no-verify", help="Do not check the export by the engine.")] = False,
    require_proof: Annotated[
        bool, Option("--require-proof", help="Fail, and write nothing, unless the check proves the export.")
    ] = False,
    threads: Annotated[int | None, Option(help="Threads of llama.cpp during the check.")] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a run as Ollama, llama.cpp or vLLM reads it, checked by the engine."""
    from ..export.manifest import require_target

    require_target(to)
    require_run(run)
    from ..export.exporter import ExportOptions, export

    rank: int | float | None = None
    try:
        if convert_to_lora is not None:
            rank = int(convert_to_lora) if convert_to_lora.lstrip("-").isdigit() else float(convert_to_lora)
    except ValueError:
        raise BadParameter(f"--convert-to-lora {convert_to_lora!r} is neither a rank nor a share") from None
    options = ExportOptions(merged, precision, rank, ollama_base, name, system, num_ctx, dtype)
    target: Any = to  # an unknown one is refused with the nearest name
    checks: dict[str, Any] = {"verify": not no_verify, "require_proof": require_proof, "threads": threads}
    with show_progress():
        result = export(run, target, out, options, **checks, log=print_progress)
    if not as_json:
        screen = console()
        for file, size in result["files"].items():
            screen.print(f"{result['out']}/{file}  {format_bytes(size)}")
        if conversion := result.get("conversion"):
            screen.print(f"as a LoRA: {conversion['error']:.2%} of the change is lost")
        for note in result["notes"]:
            screen.print(f"note: {note}")
        if result["check"]["positions"]:
            print_verdicts([result["check"]])
        if result["check"]["passed"] is None:
            text = f"NOT PROVEN: {result['check']['reason']}"
            error_console().print(text, style="dim" if no_verify else f"bold {WARNING}")
        screen.print("\nnext:", *result["commands"], sep="\n  ", soft_wrap=True)
    return result
