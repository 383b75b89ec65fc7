"""`slimtune report`: write the page of a run again."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .common import WARNING, Json, console, error_console


def report_run(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", show_default=False)],
    out: Annotated[Path | None, Option(help="File to write. Default: report.html in the run folder.")] = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write report.html of a run from the files in its folder.

    `slimtune train` and `slimtune eval` write it when they finish.
    """
    from ..reporting import write_report
    from ..run_dir import RunDir

    file, damage = write_report(RunDir.open(run, require_adapter=False), out)
    for sentence in damage:
        error_console().print(f"warning: {sentence}", style=WARNING)
    if not as_json:
        console().print(str(file))
    return {"run": str(run), "report": str(file), "damage": damage}
