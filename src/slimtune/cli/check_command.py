"""`slimtune check`: whether an adapter of any trainer is what was trained."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .common import ERROR, GOOD, WARNING, Json, NegativeVerdictResult, make_console, showing_progress
from .input_checks import require_base_exists

COLORS = {"fault": ERROR, "warning": WARNING}


def check_adapter(
    adapter: Annotated[
        Path, Argument(metavar="ADAPTER", help="An adapter folder of any trainer, or a run.", show_default=False)
    ],
    base: Annotated[
        str | None, Option(help="The base to compare it with; by default the one that the adapter names.")
    ] = None,
    as_json: Json = False,
) -> Any:
    """Check an adapter of any trainer: whether each tensor reaches its module, and the training changed it.

    No weights of the base are loaded. Exit code 1: a fault was found.
    """
    if base is not None:
        require_base_exists(base, need_weights=False)
    from ..export.adapter_check.check_adapter import check_adapter_file

    with showing_progress():
        result = check_adapter_file(adapter, base)
    if not as_json:
        screen = make_console()
        for line in result.lines():
            color = COLORS.get(line.partition(":")[0])
            screen.print(line, style=color)
        screen.print()
        if result.right:
            screen.print("right: no fault was found in the file", style=GOOD)
    if result.right:
        return result
    faults = [f.code for f in result.findings if f.severity == "fault"]
    make_console(stderr=True).print(f"error: the adapter is not right: {', '.join(faults)}", style=ERROR)
    return NegativeVerdictResult(result)
