"""`slimtune bench`: measure this machine, so that plans know its speed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import UsageError
from .common import Json, console, print_fields, show_progress
from .machine_commands import format_three_digits

if TYPE_CHECKING:
    from ..planning.measured_speeds import Measured

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def bench(
    device: Annotated[str | None, Option(help="Device to measure: auto, cpu, cuda, cuda:N or mps.")] = None,
    show: Annotated[bool, Option("--show", help="Show the stored measurement; measure nothing.")] = False,
    export: Annotated[
        bool, Option("--export", help="Print the stored measurement as a row of the table of GPUs (CSV).")
    ] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure this machine, so that plan, choose and gpus know its speed.

    Matrix products, memory, short training steps, decoding in transformers and, if xllamacpp and gguf are installed, in
    llama.cpp: two to three minutes. Let nothing else run meanwhile. The result is a JSON file in the user's data
    folder.
    """
    from ..planning.measured_speeds import load_machine_measurement, measured_file, save_measured

    if show or export:
        if device is not None:
            raise UsageError(f"--device and --{'show' if show else 'export'} are both given", "one of them")
        found = load_machine_measurement()
        if found is None:
            raise UsageError("this machine is not measured", f"a measurement in {measured_file()}", "slimtune bench")
    else:
        from ..hardware.speed_benchmark import measure_machine

        with show_progress():
            found = measure_machine(device or "auto")
        save_measured(found)
    file, row = measured_file(), make_row(found)
    if not as_json:
        if export:
            console().print(format_csv(row), soft_wrap=True)
        else:
            print_fields(_describe(found))
            console().print(f"\nstored in {file}; plan, choose and gpus use it", soft_wrap=True)
    return {**asdict(found), "file": file, "row": row}


def make_row(found: Measured) -> dict[str, str]:
    """Return a measurement by the columns of `gpus.csv`."""
    from ..planning.gpu_specs import measured_gpu, read_table

    gpu = measured_gpu()
    name = found.processor if found.device == "cpu" else found.name
    row = dict.fromkeys(read_table("gpus.csv")[0], "")
    row |= {
        "name": "-".join(name.lower().replace("(r)", "").replace("(tm)", "").split()),
        "kind": gpu.kind if gpu is not None else found.device,
        "vendor": gpu.vendor if gpu is not None else "",
        "architecture": gpu.architecture if gpu is not None else "",
        "memory_gib": f"{found.memory / 2**30:.4g}",
        "bandwidth_gbs": f"{found.bandwidth / 1e9:.4g}",
        "unified": "yes" if found.device != "cuda" else "no",
        "source": f"slimtune bench {found.versions['slimtune']}, torch {found.versions['torch']}",
        "checked": found.date,
    }
    return row | {f"{SHORT[dtype]}_tflops": f"{rate / 1e12:.4g}" for dtype, rate in found.rates.items()}


def format_csv(row: dict[str, str]) -> str:
    """Return a row with its heading as CSV, without a line break at the end."""
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue().rstrip("\n")


def _describe(found: Measured) -> Iterator[tuple[str, str]]:
    """Yield the figures of a measurement."""
    threads = f", {found.threads} thread{'s' if found.threads > 1 else ''}" if found.threads else ""
    yield "machine", f"{found.processor if found.device == 'cpu' else found.name}{threads}, {found.date}"
    rates = ", ".join(f"{SHORT[d]} {format_three_digits(rate / 1e9)}" for d, rate in found.rates.items())
    yield "products", f"{rates} GFLOPS"
    vectors = ", ".join(f"{SHORT[d]} {format_three_digits(rate / 1e9)}" for d, rate in found.vector_rates.items())
    yield "with one row", f"{vectors} GB/s of the matrix"
    yield "memory", f"{format_three_digits(found.bandwidth / 1e9)} GB/s copied"
    low, high = (100 * (end - 1) for end in found.training.spread)
    yield "training", f"{len(found.steps)} kinds of steps; the formula is within {low:+.0f} to {high:+.0f} % of them"
    for engine, fit in found.serving.items():
        for precision, speed in fit.bytes_per_second.items():
            prompt = fit.prompt_flops.get(precision, 0.0)
            decoding, reading = (format_three_digits(n / 1e9) for n in (speed, prompt))
            text = f"{decoding} GB/s decoding, {reading} GFLOPS reading a prompt"
            yield f"{engine} {precision}", text
    for what, why in found.skipped.items():
        yield what, f"not measured: {why}"
