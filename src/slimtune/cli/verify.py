"""`slimtune verify`: check that exported and merged models are the trained one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, NegativeResult, console, error_console, table


def verify_run(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, an adapter, or what export or merge wrote.", show_default=False),
    ],
    data: Annotated[Path | None, typer.Option(help="Rows to compare on; by default the run's held-out rows.")] = None,
    vllm: Annotated[str | None, typer.Option(help="Address of a vLLM server that serves it.")] = None,
    vllm_model: Annotated[str | None, typer.Option(help="Its name there; by default the folder's.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of llama.cpp; by default half of the cores.")] = None,
    as_json: Json = False,
) -> Any:
    """Compare exported models with the trained adapter, engine by engine; exit code 1 if one differs."""
    from ..export.verify import verify

    screen = error_console()
    result = verify(
        path,
        rows=data,
        vllm=vllm,
        vllm_model=vllm_model,
        threads=threads,
        log=lambda text: screen.print(text, style="dim", markup=False),
    )
    if not as_json:
        console().print(format_verdicts(result["checks"]))
        for check in result["checks"]:
            if check["reason"]:
                console().print(f"{check['engine']}: {check['reason']}", markup=False)
    if result["passed"]:
        return result
    failed = [c["engine"] for c in result["checks"] if c["passed"] is False]
    unchecked = [c["engine"] for c in result["checks"] if c["passed"] is None]
    reason = f"not the trained model: {', '.join(failed)}" if failed else f"not checked: {', '.join(unchecked)}"
    screen.print(f"error: {reason}", style="bold red", markup=False)
    return NegativeResult(result)


def format_verdicts(checks: Sequence[Mapping[str, Any]]) -> Any:
    """Return the verdicts as a table."""
    rows = table("engine", "weights", "prompts", "positions", "d max", "d mean", "KL", "greedy", "verdict")
    rows.columns[0].no_wrap = True
    for c in checks:
        numbers = ["-"] * 6
        if c["positions"]:
            numbers = [f"{c['prompts_equal']}/{c['prompts']}", str(c["positions"])]
            numbers += [f"{c[k]:.2g}" for k in ("max_difference", "mean_difference", "kl")]
            numbers += [f"{c['answers_equal']}/{c['answers']}"]
        verdict = {True: "passed", False: "FAILED", None: "not checked"}[c["passed"]]
        rows.add_row(c["engine"], c["precision"], *numbers, verdict)
    return rows
