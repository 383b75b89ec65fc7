"""`slimtune predict`: classes of new texts by a trained classifier, or rewards by a reward model."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..errors import DataError, UsageError
from .common import Device, Json, Run, console, table
from .inputs import require_rows, require_run
from .progress import show_progress


def predict(
    run: Run,
    text: Annotated[str | None, Argument(metavar="TEXT", help="A text.", show_default=False)] = None,
    data: Annotated[Path | None, Option(help="Rows with a text or messages, in place of TEXT.")] = None,
    out: Annotated[Path | None, Option(help="File for the rows of --data with their predictions, JSONL.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Predict the classes or rewards of new texts."""
    if (text is None) == (data is None) or (data is None) != (out is None):
        raise UsageError(
            "predict takes a text, or --data and --out",
            hint=f"slimtune predict {run} --data new.jsonl --out predicted.jsonl",
        )
    require_run(run)
    require_rows(data)
    from ..data.formats import InvalidRow
    from ..evaluation.predict import parse_input, predict, predict_file
    from ..setup import load_run

    if data is not None and out is not None:
        with show_progress():
            result = predict_file(run, data, out, device=device)
        if not as_json:
            counts = result["classes"]
            rows = (
                [("mean reward", f"{result['mean_reward']:.4f}")]
                if counts is None
                else [(k, str(n)) for k, n in counts.items()]
            )
            console().print(table(f"{result['rows']} rows in {out}", "", rows=rows))
        return result
    row = parse_input({"text": text})
    if isinstance(row, InvalidRow):
        raise DataError(f"the text {row.cause}", "a text")
    (result,) = predict(load_run(run, device=device), [row])
    if not as_json:
        shares = result.get("probabilities") or {"reward": result["reward"]}
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        console().print(table("", "", rows=[(name, f"{value:.4f}") for name, value in ordered]))
    return {"run": str(run), "text": text, **result}
