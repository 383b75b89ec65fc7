"""`slimtune bench`: measure this machine, so that plans know its speed."""

from __future__ import annotations

import csv
import io
from typing import Annotated, Any

from typer import Option

from ..errors import UsageError
from .common import Json, make_console, print_fields, showing_progress


def bench_machine(
    device: Annotated[str | None, Option(help="Device to measure: auto, cpu, cuda, cuda:N or mps.")] = None,
    show: Annotated[bool, Option("--show", help="Show the stored measurement; measure nothing.")] = False,
    export: Annotated[
        bool, Option("--export", help="Print the stored measurement as a row of the table of GPUs (CSV).")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Measure this machine, so that plan, choose and gpus know its speed.

    Matrix products, memory, short training steps, decoding in transformers and, if xllamacpp and gguf are installed, in
    llama.cpp: two to three minutes. Let nothing else run meanwhile. The result is a JSON file in the user's data
    folder.
    """
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


def _format_csv(row: dict[str, str]) -> str:
    """Return a row with its heading as CSV, without a line break at the end."""
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue().rstrip("\n")
