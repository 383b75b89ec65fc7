"""`slimtune check` and `verify`: whether an adapter's file is what was trained, and whether engines apply it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from ..errors import UsageError
from .common import (
    ERROR,
    GOOD,
    WARNING,
    Json,
    NegativeVerdictResult,
    make_console,
    make_error_console,
    make_table,
    print_progress,
    showing_progress,
)
from .input_checks import require_base_exists, require_row_files_exist, require_run_and_base_exist

if TYPE_CHECKING:
    from ..export.export_results import AdapterReport, EngineVerdict

COLORS = {"fault": ERROR, "warning": WARNING}
VERDICTS = {True: "passed", False: "FAILED", None: ""}
LEGEND = """prompts: how many become the same tokens; d: difference of log p from that of
{}, in nats; strength: share of the adapter's effect that arrives"""
Timeout = Annotated[float, Option(min=0.1, help="Seconds that an answer of the server may take.")]


def check_adapter(
    adapter: Annotated[
        Path, Argument(metavar="ADAPTER", help="An adapter folder of any trainer, or a run.", show_default=False)
    ],
    base: Annotated[
        str | None, Option(help="The base to compare it with; by default the one that the adapter names.")
    ] = None,
    at: Annotated[str | None, Option("--at", metavar="URL", help="Address of a server that serves it.")] = None,
    name: Annotated[str | None, Option(help="Its name at the server.")] = None,
    gguf: Annotated[Path | None, Option(help="A GGUF of base and adapter as one model.")] = None,
    merged: Annotated[Path | None, Option(help="A folder with base and adapter as one checkpoint.")] = None,
    mlx: Annotated[
        Path | None, Option(help="A folder of MLX: base and adapter as one, or an adapter of mlx-lm.")
    ] = None,
    precision: Annotated[str, Option(help="Of the weights that the server has: f32, f16, bf16, q8_0, Q4_K_M.")] = "f16",
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> Any:
    """Check an adapter of any trainer: whether its tensors reach their modules, and whether an engine applies it.

    Without --at, --gguf, --merged or --mlx the file is checked, and no weights of the base are loaded. Exit code 1: a
    fault.
    """
    given = [each for each in (at, gguf, merged, mlx) if each is not None]
    if len(given) > 1:
        message = "more than one of --at, --gguf, --merged and --mlx is given"
        raise UsageError(message, "one place that serves the adapter")
    for path in (gguf, merged, mlx):
        if path is not None and not path.exists():
            raise UsageError(f"there is no {path}", "what serves the adapter")
    if base is not None:
        require_base_exists(base, need_weights=bool(given))
    from ..export import verify as checks

    place = checks.ServedPlace(at, gguf, merged, name, timeout, precision, mlx) if given else None
    with showing_progress():
        result = checks.check_adapter(adapter, base, place, print_progress)
    return print_report(result, as_json=as_json)


def verify_run(
    path: Annotated[
        Path, Argument(metavar="RUN", help="A run, an adapter, or what export or merge wrote.", show_default=False)
    ],
    data: Annotated[Path | None, Option(help="Rows to compare on; by default the run's held-out rows.")] = None,
    at: Annotated[
        str | None, Option("--at", "--vllm", metavar="URL", help="Address of a server that serves it, too.")
    ] = None,
    name: Annotated[
        str | None, Option("--name", "--vllm-model", help="Its name at the server; by default the export's.")
    ] = None,
    timeout: Timeout = 60.0,
    stages: Annotated[
        bool, Option("--stages", help="Compare each stage, from the trainer to the engine, with the one before.")
    ] = False,
    merged: Annotated[Path | None, Option(help="With --stages: your own merged checkpoint.")] = None,
    gguf: Annotated[Path | None, Option(help="With --stages: your own GGUF of base and adapter.")] = None,
    precision: Annotated[
        str | None, Option(help="With --stages: of the GGUF, by default q8_0; of a server's weights, f16.")
    ] = None,
    threads: Annotated[int | None, Option(help="Threads of llama.cpp; by default half of the cores.")] = None,
    as_json: Json = False,
) -> Any:
    """Compare exported models with the trained adapter, engine by engine; exit code 1 if one differs."""
    from ..export.manifest import read_export_manifest

    if not stages and (merged, gguf, precision) != (None, None, None):
        raise UsageError("--merged, --gguf and --precision need --stages", "slimtune check, for one file alone")
    for file in (merged, gguf):
        if file is not None and not file.exists():
            raise UsageError(f"there is no {file}", "what a stage wrote")
    manifest = read_export_manifest(path)
    run = path if manifest is None else manifest.run
    if stages and run != path:
        raise UsageError(f"{path} is an export: its stages are those of its run", f"slimtune verify {run} --stages")
    if run == path:
        require_run_and_base_exist(path)
    require_row_files_exist(data, run_giving_format=run)
    from ..export import verify as checks
    from ..export.stages import StageFiles

    if run == path and not stages:
        print_progress(
            f"exporting {path} three ways into a temporary folder, and comparing each with the trained adapter: this "
            "takes minutes even for a small base. `slimtune verify FOLDER` checks only the export in FOLDER."
        )
    place = checks.ServedPlace(at, name=name, timeout=timeout, precision=precision or "f16") if at else None
    files = StageFiles(merged, gguf, precision or "q8_0", place) if stages else None
    with showing_progress():
        result = checks.verify(path, rows_file=data, place=place, stages=files, threads=threads, log=print_progress)
    return print_report(result, "the stage before" if stages else "the trained adapter", as_json=as_json)


def print_report(report: "AdapterReport", expected: str = "the trained adapter", *, as_json: bool) -> Any:
    """Print what was found in an adapter's file and what engines compute with it; return what the command returns."""
    if not as_json:
        screen = make_console()
        for line in report.file.lines():
            screen.print(line, style=COLORS.get(line.partition(":")[0]))
        screen.print()
        if report.checks:
            print_engine_agreement(report.checks, expected)
        for line in report.explain():
            screen.print(line, soft_wrap=line.startswith("to mend it"))
        if report.passed and not report.checks:
            screen.print("right: no fault was found in the file", style=GOOD)
    if report.passed:
        return report
    make_error_console().print(f"error: {report.explain_failure()}", style=ERROR)
    return NegativeVerdictResult(report)


def make_engine_agreement_table(verdicts: "Sequence[EngineVerdict]") -> Table:
    """Return the verdicts as a table of at most 80 columns; `LEGEND` says what the numbers are."""
    rows = make_table("engine", "weights", "prompts", "d mean", "d max", "strength", "verdict", text_column_indices=[0])
    rows.padding = (0, 1, 0, 0)
    for c in verdicts:
        numbers, verdict = ["-"] * 4, VERDICTS[c.passed] or "NOT PROVEN" * c.failed
        if c.positions:
            numbers = [f"{c.prompts_equal} of {c.prompts}", f"{c.mean_difference:.2g}", f"{c.max_difference:.2g}"]
            numbers.append(f"{c.strength:.0%}" if c.strength is not None else "-")
            verdict = verdict or "NOT PROVEN"
        rows.add_row(c.engine, c.precision, *numbers, verdict or "not checked")
    return rows


def print_engine_agreement(checks: "Sequence[EngineVerdict]", expected: str = "the trained adapter") -> None:
    """Print the verdicts and what their numbers are; `expected` is what the engines are compared with."""
    make_console().print(make_engine_agreement_table(checks))
    if any(c.positions for c in checks):
        make_console().print(LEGEND.format(expected), style="dim")
