"""`slimtune bench`: measure this machine, so that plans know its speed; or how fast a run answers on it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import UsageError
from .common import Json, make_console, make_table, print_fields, print_progress, showing_progress

if TYPE_CHECKING:
    from ..export.run_speed import RunSpeedResult


def bench_machine_or_run(
    run: Annotated[
        Path | None,
        Argument(metavar="RUN", help="Instead of the machine: how fast this run answers, in each engine."),
    ] = None,
    device: Annotated[str | None, Option(help="Device to measure: auto, cpu, cuda, cuda:N or mps.")] = None,
    show: Annotated[bool, Option("--show", help="Show the stored measurement; measure nothing.")] = False,
    export: Annotated[
        bool, Option("--export", help="Print the stored measurement as a row of the table of GPUs (CSV).")
    ] = False,
    precision: Annotated[
        str | None, Option(help="With a run: precision of the weights in llama.cpp, such as q8_0.")
    ] = None,
    as_json: Json = False,
) -> Any:
    """Measure this machine, so that plan, choose and gpus know its speed.

    Matrix products, memory, short training steps, decoding in transformers and, if xllamacpp and gguf are installed, in
    llama.cpp: two to three minutes. Let nothing else run meanwhile. The result is a JSON file in the user's data
    folder. With a run: how fast it answers as base, with the adapter beside it, and merged.
    """
    if run is not None:
        for flag in ("show" * show, "export" * export):
            if flag:
                raise UsageError(f"--{flag} is of the machine's measurement", hint="leave the run out")
        return _bench_run(run, device, precision, as_json=as_json)
    if precision is not None:
        raise UsageError("--precision is of a run in llama.cpp", "slimtune bench RUN --precision q8_0")
    from ..hardware.hardware_results import BenchResult
    from ..planning.gpu_specs import make_gpus_csv_row_dict
    from ..planning.measured_speeds import get_measurement_path, load_machine_measurement, overwrite_machine_measurement

    if show or export:
        if device is not None:
            raise UsageError(f"--device and --{'show' if show else 'export'} are both given", "one of them")
        found = load_machine_measurement()
        if found is None:
            raise UsageError(
                "this machine is not measured", f"a measurement in {get_measurement_path()}", "slimtune bench"
            )
    else:
        from ..hardware.speed_benchmark import measure_machine

        with showing_progress():
            found = measure_machine(device or "auto")
        overwrite_machine_measurement(found)
    file, row = get_measurement_path(), make_gpus_csv_row_dict(found)
    if not as_json:
        if export:
            make_console().print(_format_csv(row), soft_wrap=True)
        else:
            print_fields(found.lines())
            make_console().print(f"\nstored in {file}; plan, choose and gpus use it", soft_wrap=True)
    return BenchResult(found, file, row)


def _bench_run(run: Path, device: str | None, precision: str | None, *, as_json: bool) -> RunSpeedResult:
    """Measure how fast a run answers, and show it."""
    from ..export.run_speed import measure_run_speed

    with showing_progress():
        found = measure_run_speed(run, device=device, precision=precision, progress=print_progress)
    if not as_json:
        bases = {s.engine: s.decode_tokens_per_second for s in found.speeds if s.way == "base"}
        rows = [
            (
                s.engine,
                s.precision,
                s.way,
                f"{s.prefill_tokens_per_second:.0f}",
                f"{s.decode_tokens_per_second:.1f}",
                f"{100 * s.decode_tokens_per_second / bases[s.engine]:.0f} %",
            )
            for s in found.speeds
        ]
        screen = make_console()
        request = f"one request of {found.prompt_tokens} tokens, {found.new_tokens} written"
        screen.print(f"{found.run} on {found.model}: {request}\n")
        headings = ("engine", "weights", "way", "reads, t/s", "writes, t/s", "of the base's")
        screen.print(make_table(*headings, text_column_indices=[0, 1, 2], rows=rows))
        for missing in found.not_measured:
            screen.print(f"{missing.engine}, {missing.way}: not measured: {missing.reason}")
    return found


def _format_csv(row: dict[str, str]) -> str:
    """Return a row with its heading as CSV, without a line break at the end."""
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue().rstrip("\n")
