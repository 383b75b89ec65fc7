"""`slimtune verify`: check that exported and merged models are the trained one."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Argument, Option

from .common import ERROR, Json, NegativeResult, console, error_console, print_progress, table
from .inputs import require_rows, require_run
from .progress import show_progress

VERDICTS = {True: "passed", False: "FAILED", None: ""}
LEGEND = """prompts: how many become the same tokens; d: difference of log p from that of
the trained adapter, in nats; strength: share of the adapter's effect that arrives"""
HELP = "A run, an adapter, or what export or merge wrote."


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
