"""`slimtune verify`: does what ships say what was trained?"""

from __future__ import annotations

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
    """Compare what ships with the trained adapter, engine by engine; exit code 1 where it is another model."""
    from ..export.verify_formats import verify

    say = error_console().print
    found = verify(
        path,
        rows=data,
        vllm=vllm,
        vllm_model=vllm_model,
        threads=threads,
        say=lambda text: say(text, style="dim", markup=False),
    )
    if not as_json:
        console().print(told(found["checks"]))
        for check in found["checks"]:
            if check["reason"]:
                console().print(f"{check['engine']}: {check['reason']}", markup=False)
    if found["passed"]:
        return found
    failed = [c["engine"] for c in found["checks"] if c["passed"] is False]
    unasked = [c["engine"] for c in found["checks"] if c["passed"] is None]
    why = f"not what was trained: {', '.join(failed)}" if failed else f"not checked: {', '.join(unasked)}"
    error_console().print(f"error: {why}", style="bold red", markup=False)
    return NegativeResult(found)


def told(checks: Sequence[Mapping[str, Any]]) -> Any:
    """Return the verdicts as a table."""
    rows = table("engine", "weights", "prompts", "positions", "d max", "d mean", "KL", "greedy", "gate")
    rows.columns[0].no_wrap = True
    for c in checks:
        if c["positions"]:
            figures = [f"{c['prompts_equal']}/{c['prompts']}", str(c["positions"])]
            figures += [f"{c[k]:.2g}" for k in ("max_difference", "mean_difference", "kl")]
            figures += [f"{c['answers_equal']}/{c['answers']}"]
        else:
            figures = ["-"] * 6
        gate = {True: "passed", False: "FAILED", None: "not checked"}[c["passed"]]
        rows.add_row(c["engine"], c["precision"], *figures, gate)
    return rows
