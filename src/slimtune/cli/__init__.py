"""The command line: one thin module per verb (parse → library call → print).

The heavy rooms are imported inside the verbs, so `slimtune --help` imports no torch.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import UsageError
from .chat import chat
from .common import CommandGroup
from .compare import compare
from .data import data_report
from .doctor import doctor
from .eval import eval_run
from .export import export_run
from .generate import generate
from .gpus import gpus
from .merge import merge_run
from .methods import methods
from .plan import plan
from .push import push_run
from .report import report_run
from .train import train_run
from .verify import verify_run

app = typer.Typer(
    cls=CommandGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
)
app.command("plan")(plan)
app.command("gpus")(gpus)
app.command("data")(data_report)
app.command("train")(train_run)
app.command("eval")(eval_run)
app.command("report")(report_run)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("merge")(merge_run)
app.command("export")(export_run)
app.command("verify")(verify_run)
app.command("push")(push_run)
app.command("methods")(methods)
app.command("doctor")(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimtune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Adapt an LLM by training a small part of it: plan, train, prove, merge, use.

    Exit codes: 0 done; 1 the work failed; 2 wrong use (flags, recipe, missing files); 130 interrupted.
    """
    if ctx.invoked_subcommand not in (None, "train") and "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise UsageError(
            f"slimtune {ctx.invoked_subcommand} was started in {os.environ.get('WORLD_SIZE')} processes",
            "one process: only train takes several",
            "run it without torchrun or accelerate launch",
        )
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)


def main() -> None:
    """Run the command line on `sys.argv` and exit with its code."""
    # It warns whoever imports it, transformers included, that a kernel for inference could be downloaded.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    app(args=sys.argv[1:])
