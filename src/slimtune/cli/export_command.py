"""What happens to a run after its training: `slimtune export`, `verify`, `merge` and `push`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Argument, BadParameter, Option

from ..core.foundation.formatting import format_bytes, format_duration
from .common import (
    ERROR,
    WARNING,
    Json,
    NegativeResult,
    Run,
    console,
    error_console,
    print_progress,
    show_progress,
    table,
)
from .input_checks import require_rows, require_run

VERDICTS = {True: "passed", False: "FAILED", None: ""}
LEGEND = """prompts: how many become the same tokens; d: difference of log p from that of
the trained adapter, in nats; strength: share of the adapter's effect that arrives"""
HELP = "A run, an adapter, or what export or merge wrote."
MIN_SHARE = 0.9
"""Share of the adapter's effect in the merged model below which there is a warning."""


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


def verify_run(
    path: Annotated[Path, Argument(metavar="RUN", help=HELP, show_default=False)],
    data: Annotated[Path | None, Option(help="Rows to compare on; by default the run's held-out rows.")] = None,
    vllm: Annotated[str | None, Option(help="Address of a vLLM server that serves it.")] = None,
    vllm_model: Annotated[str | None, Option(help="Its name there; by default the folder's.")] = None,
    threads: Annotated[int | None, Option(help="Threads of llama.cpp; by default half of the cores.")] = None,
    as_json: Json = False,
) -> Any:
    """Compare exported models with the trained adapter, engine by engine; exit code 1 if one differs."""
    from ..export.manifest import read_manifest

    manifest = read_manifest(path)
    if manifest is None:
        require_run(path)
    require_rows(data, run=path if manifest is None else manifest["run"])
    from ..export.verify import verify

    if manifest is None:
        print_progress(
            f"exporting {path} three ways into a temporary folder, and comparing each with the trained adapter: this "
            "takes minutes even for a small base. `slimtune verify FOLDER` checks only the export in FOLDER."
        )
    with show_progress():
        result = verify(path, rows=data, vllm=vllm, vllm_model=vllm_model, threads=threads, log=print_progress)
    checks = result["checks"]
    if not as_json:
        print_verdicts(checks)
        for check in checks:
            if check["reason"]:
                console().print(f"{check['engine']}: {check['reason']}")
    if result["passed"]:
        return result
    failed = [c["engine"] for c in checks if c["passed"] is False]
    unchecked = [c["engine"] for c in checks if c["passed"] is None]
    reason = f"not the trained model: {', '.join(failed)}" if failed else f"not proven: {', '.join(unchecked)}"
    error_console().print(f"error: {reason}", style=ERROR)
    return NegativeResult(result)


def format_verdicts(checks: Sequence[Mapping[str, Any]]) -> Table:
    """Return the verdicts as a table of at most 80 columns; `LEGEND` says what the numbers are."""
    rows = table("engine", "weights", "prompts", "d mean", "d max", "strength", "verdict", left=[0])
    rows.padding = (0, 1, 0, 0)
    for c in checks:
        numbers, verdict = ["-"] * 4, VERDICTS[c["passed"]] or "NOT PROVEN" * c["failed"]
        if c["positions"]:
            numbers = [f"{c['prompts_equal']} of {c['prompts']}"]
            numbers += [f"{c[k]:.2g}" for k in ("mean_difference", "max_difference")]
            numbers += [f"{c['strength']:.0%}" if math.isfinite(c["strength"]) else "-"]
            verdict = verdict or "NOT PROVEN"
        rows.add_row(c["engine"], c["precision"], *numbers, verdict or "not checked")
    return rows


def print_verdicts(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print the verdicts and what their numbers are."""
    console().print(format_verdicts(checks))
    if any(c["positions"] for c in checks):
        console().print(LEGEND, style="dim")


def merge_run(
    run: Run,
    out: Annotated[Path, Option(help="Folder for the checkpoint; it must not contain files.", show_default=False)],
    dtype: Annotated[str, Option(help="Dtype of the checkpoint: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> dict[str, Any]:
    """Write base and adapter as one checkpoint."""
    require_run(run)
    from ..export.merge import merge

    with show_progress():
        result = merge(run, out, dtype=dtype)
    if not as_json:
        console().print(
            f"{result['out']}: {format_bytes(result['bytes'])} in {result['dtype']}, "
            f"{format_duration(result['seconds'])}; merged and adapted model differ by {result['mean_difference']:.2g} "
            f"nats on average ({result['max_difference']:.2g} at most), where the adapter changes the base by "
            f"{result['effect']:.2g}"
        )
        share = result["strength"]
        if math.isfinite(share):
            console().print(f"{share:.1%} of the adapter's effect survives in {result['dtype']}")
        if share < MIN_SHARE:
            text = f"warning: {result['dtype']} cannot hold so small a change: {1 - share:.0%} of it is lost"
            error_console().print(f"{text}; --dtype float32 keeps it", style=WARNING)
    return result


def push_run(
    run: Run,
    repo_id: Annotated[
        str, Argument(metavar="REPO_ID", help="OWNER/NAME; created if it does not exist.", show_default=False)
    ],
    private: Annotated[
        bool, Option("--private", help="Only you see it. An existing public repository is an error.")
    ] = False,
    revision: Annotated[
        str | None, Option("--revision", "--branch", help="Branch to commit to; created if it does not exist.")
    ] = None,
    message: Annotated[str | None, Option(help="First line of the commit.")] = None,
    base: Annotated[
        str | None, Option(metavar="ORG/NAME", help="Hub id of the base, if the run names it by a path.")
    ] = None,
    keep_card: Annotated[bool, Option("--keep-card", help="Do not replace a README.md in the repository.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Send nothing; show the files and the model card.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Upload the adapter and a model card to the Hub, never checkpoints, logs or rows.

    Merged models and GGUF files are uploaded as they are. Log in with `hf auth login`, or set HF_TOKEN.
    """
    if not run.is_dir():
        require_run(run)
    from ..export.push_to_hub import push

    how: dict[str, Any] = {"revision": revision, "message": message, "base": base, "private": private or None}
    result = push(run, repo_id, keep_card=keep_card, dry_run=dry_run, **how)
    if not as_json:
        lines = [f"{name}  {format_bytes(size)}" for name, size in result["files"].items()]
        if result["skipped"]:
            lines.append(f"not uploaded: {', '.join(result['skipped'])}")
        if "card" in result:
            lines.append(f"\nnothing was sent; the model card would be:\n\n{result['card']}")
        else:
            place = f"{result['url']} ({'private' if result['private'] else 'public'}), {result['revision']}"
            size = format_bytes(result["bytes"])
            lines.append(f"{place} at {result['commit'][:8]}: {len(result['files'])} files, {size}")
        console().print("\n".join(lines))
    return result
