"""`slimtune repair`: write an adapter of any trainer so that an engine reads it rightly."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .check_command import print_engine_agreement
from .common import WARNING, Json, make_console, make_error_console, print_progress, showing_progress
from .input_checks import require_base_exists


def repair_adapter(
    adapter: Annotated[
        Path, Argument(metavar="ADAPTER", help="An adapter folder of any trainer, or a run.", show_default=False)
    ],
    engine: Annotated[
        str, Option("--for", metavar="ENGINE", help="vllm, ollama, llama.cpp, mlx or peft.", show_default=False)
    ],
    out: Annotated[Path, Option(help="Folder to write; it must not contain files.", show_default=False)],
    base: Annotated[str | None, Option(help="The base; by default the one that the adapter names.")] = None,
    adapter_name: Annotated[
        str | None, Option("--adapter", metavar="NAME", help="Which adapter, if the file has several.")
    ] = None,
    alpha: Annotated[
        float | None, Option(min=0.001, help="lora_alpha of the training, if the file does not say it.")
    ] = None,
    no_merge: Annotated[
        bool, Option("--no-merge", help="Fail where the engine cannot add the adapter to its base.")
    ] = False,
    threads: Annotated[int | None, Option(help="Threads of llama.cpp during the comparison.")] = None,
    as_json: Json = False,
) -> Any:
    """Write an adapter of any trainer so that an engine reads it rightly.

    The adapter itself is only read. What an engine cannot add to a base is merged into it.
    """
    if base is not None:
        require_base_exists(base, need_weights=False)
    from ..export.adapter_repair import repair_adapter as repairs
    from ..export.adapter_repair.adapter_mends import RepairAnswers

    answers = RepairAnswers(adapter_name, alpha)
    with showing_progress():
        result = repairs.repair_adapter(
            adapter, engine, out, base, answers, may_merge=not no_merge, threads=threads, log=print_progress
        )
    if not as_json:
        screen = make_console()
        for line in result.lines():
            screen.print(line)
        if result.proof.positions:
            print_engine_agreement([result.proof])
        if result.proof.passed is None:
            make_error_console().print(f"NOT PROVEN: {result.proof.reason}", style=f"bold {WARNING}")
        if result.commands:
            screen.print("\nnext:", *result.commands, sep="\n  ", soft_wrap=True)
    return result
