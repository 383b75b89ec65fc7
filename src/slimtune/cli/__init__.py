"""The command line: thin modules that parse, call the library and print.

Torch and the library's folders are imported inside the commands, so that `slimtune --help` is quick.
"""

import errno
import gc
import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer

from ..compat.peft_registration import skip_registering_classes_as_peft
from ..core.foundation.cpu import CPU_SETTINGS
from ..core.foundation.version import __version__
from ..errors import UsageError
from .bench_command import bench_machine_or_run
from .benchmarks_command import benchmarks_table
from .check_command import check_adapter, verify_run
from .choose_command import choose_machine, cost_of_training_run
from .command_examples import EXAMPLES
from .command_help import CommandWithOptionGroups, add_flags_of_loaded_runs
from .common import CommandGroup, ConsoleLogHandler
from .compare_command import compare_methods, tune_settings
from .data_command import data_report
from .doctor_command import doctor
from .eval_command import eval_run, report_run
from .explain_command import explain_error
from .export_command import export_run, merge_run, push_run
from .generate_command import chat_with_run, generate_answer, predict_rows
from .gpus_command import gpus_table
from .import_command import import_config
from .methods_command import methods_table
from .models_command import models_table
from .plan_command import plan_run
from .repair_command import repair_adapter
from .serve_command import serve_runs
from .streams import WriteErrorIgnoringStream
from .train_command import train_run
from .ui_command import ui_server

GROUPS = {
    "Choose and plan": (
        choose_machine,
        plan_run,
        cost_of_training_run,
        gpus_table,
        bench_machine_or_run,
        benchmarks_table,
        models_table,
        methods_table,
    ),
    "Train": (import_config, data_report, train_run, tune_settings),
    "Judge": (eval_run, compare_methods, report_run, generate_answer, chat_with_run, predict_rows),
    "Ship": (export_run, verify_run, check_adapter, repair_adapter, merge_run, push_run),
    "Serve": (serve_runs,),
    "In the browser": (ui_server,),
    "Help": (doctor, explain_error),
}
"""Commands by what a user wants, in the order of the help."""
LOAD_RUN = (
    bench_machine_or_run,
    check_adapter,
    repair_adapter,
    eval_run,
    generate_answer,
    chat_with_run,
    predict_rows,
    merge_run,
    export_run,
    verify_run,
    push_run,
    serve_runs,
)
"""The commands that load the base of a run, whose folder may come from somebody else."""
COMMANDS: dict[str, Any] = {
    function.__name__.partition("_")[0]: function for functions in GROUPS.values() for function in functions
}
"""Function of each command: `train_run` is `slimtune train`."""
app = typer.Typer(cls=CommandGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for name, command in COMMANDS.items():
    epilog = "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[name])])
    group = next(group for group, functions in GROUPS.items() if command in functions)
    function = add_flags_of_loaded_runs(command) if command in LOAD_RUN else command
    app.command(name, cls=CommandWithOptionGroups, epilog=epilog, rich_help_panel=group)(function)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimtune {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")]


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context, version: Version = False) -> None:
    """Adapt an LLM by training a small part of it: plan, train, evaluate, export.

    New here? In this order: data, plan, train, eval, chat, export. Each has --help, with examples.

    Exit codes: 0 done; 1 the work failed, or the verdict is negative; 2 wrong use (flags, recipe, missing files); 130
    interrupted.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(2)
    if ctx.invoked_subcommand != "train" and "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        message = f"slimtune {ctx.invoked_subcommand} was started in {os.environ.get('WORLD_SIZE')} processes"
        hint = "run it without torchrun or accelerate launch"
        raise UsageError(message, "one process: only train takes several", hint)


def main() -> None:
    """Run the command line on `sys.argv` and exit with its code."""
    for name, value in CPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    skip_registering_classes_as_peft()
    # A terminal that is closed takes both streams away; what a command writes to files must not end with it.
    streams: Any = sys
    streams.stderr, streams.stdout = (
        WriteErrorIgnoringStream(sys.stderr),
        WriteErrorIgnoringStream(sys.stdout, {errno.EIO}),
    )
    logging.lastResort = ConsoleLogHandler(logging.WARNING)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries fill a log; read when tqdm is imported
    try:
        app(args=sys.argv[1:], prog_name="slimtune")
    finally:  # what has ended must not end by one more Ctrl-C, with another exit code
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.freeze()  # as it exits Python looks for garbage in all that was imported, which takes a second
