"""`slimtune eval`: held-out loss and perplexity, base against tuned, paired."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, Run, console, table


class Split(StrEnum):
    """The rows of the recipe to measure on."""

    test = "test"
    validation = "validation"


def eval_run(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="Rows to measure on, in place of the recipe's split.")] = None,
    split: Annotated[Split, typer.Option(help="The recipe's rows to measure on.")] = Split.test,
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure held-out loss, base against tuned.

    Row by row, in pairs, with the perplexities and a bootstrap 95 % interval of the gain.
    """
    from ..evaluate.held_out import evaluate

    result = evaluate(run, split=split.value, data=data)
    if not as_json:
        _show(result)
    return dict(result)


def _show(result: Mapping[str, Any]) -> None:
    low, high = result["gain_ci95"]
    rows = table("", "loss (nats/token)", "perplexity")
    rows.add_row("base", f"{result['base_loss']:.4f}", f"{result['base_perplexity']:.2f}")
    rows.add_row("tuned", f"{result['tuned_loss']:.4f}", f"{result['tuned_perplexity']:.2f}")
    rows.add_row("gain", f"{result['gain']:.4f}", "")
    screen = console()
    screen.print(rows)
    screen.print(
        f"gain in 95 % of bootstrap draws: {low:.4f} to {high:.4f}, over {result['rows']} rows, "
        f"{result['tokens']} supervised tokens"
    )
