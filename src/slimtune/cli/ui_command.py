"""`slimtune ui`: the web page."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import UsageError
from .common import WARNING, Json, make_error_console, require_installed_packages


@dataclass(frozen=True)
class UiExitResult:
    """What `ui --json` prints when the page has ended."""

    url: str
    """The page's address with its token."""
    trainings: list[str]
    """Commands of trainings that still run."""


def ui_server(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="Working folder; the page reads and writes nothing outside it.")
    ] = Path(),
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0: any that is free.")] = 7860,
    host: Annotated[str, Option(help="Address to bind to; any other lets other machines in.")] = "127.0.0.1",
    max_upload: Annotated[int, Option(min=1, help="Largest file that is uploaded, in MiB.")] = 256,
    as_json: Json = False,
) -> UiExitResult:
    """Show a web page for the whole path: rows, plan, training, evaluation, chat, export.

    It prints an address with a token, which a browser needs. The page runs the commands of slimtune in FOLDER. A
    training goes on when the page is stopped by Ctrl-C.
    """
    require_installed_packages("ui", "ui", ("starlette", "uvicorn", "multipart"))
    if not folder.expanduser().is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}", "the folder with your rows and runs")
    from ..planning.gpu_specs import list_gpu_specs
    from ..ui.web_server import serve_web_page

    os.chdir(folder.expanduser())  # commands, and the paths on the page, are relative to it

    def announce(url: str, is_local: bool) -> None:
        screen = make_error_console()
        if not is_local:
            text = f"warning: {host} is reached from other machines, without encryption: anyone with the token"
            screen.print(f"{text} can run commands here", style=WARNING)
        screen.print(f"the page of {Path.cwd().name}: {url}\nCtrl-C stops it", soft_wrap=True)

    gpus = [(gpu.name, gpu.memory) for gpu in list_gpu_specs() if gpu.trains]
    url, trainings = serve_web_page(
        Path.cwd(), host=host, port=port, max_upload=max_upload << 20, announce=announce, plannable_gpus=gpus
    )
    for job in trainings:
        make_error_console().print(f"still running: {job.command} (process {job.process.pid})", soft_wrap=True)
    return UiExitResult(url, [job.command for job in trainings])
