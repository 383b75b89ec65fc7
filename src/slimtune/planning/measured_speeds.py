"""What `slimtune bench` measured on this machine, and the predictions that follow from it.

A training step takes the sum of four parts, whose factors are fitted to real steps:

    seconds = arithmetic · Σ max(operations / rate, bytes / bandwidth) + traffic · Σ bytes / bandwidth
              + attention · Σ operations / rate + overhead · n

The first sum is over the operators that multiply, the second over the others, the third over the fused kernels of
attention, whose operations grow with the square of a row's length. `n` counts the operators that multiply: a layer
calls as many for any rows, and the others around them share their overhead (counting all of them made rows with a
shared prefix, which takes many small copies, 20 % too slow). A decoded token takes

    seconds = bytes / speed + layers · seconds of a layer            both of the precision
              + cached bytes · seconds of one + vocabulary · seconds of an entry + seconds of a token

It imports no torch.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.foundation.cpu import read_processor_name
from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.files import read_json_object, write_json
from ..core.foundation.json_results import from_json_dict, to_json_dict
from ..errors import RunError
from .interval import format_three_digits
from .plan_result import TrainingWorkload
from .weight_formats import ENGINES, find_precision_with_similar_kernels

FORMAT = 6
RATE_COLUMNS = {"bfloat16": "bf16_tflops", "float16": "fp16_tflops", "float32": "fp32_tflops"}
"""Columns of `gpus.csv` with the rate of a dtype."""
LEAST_SPREAD = 0.1
"""A prediction is not called more certain than this, however well the measured steps agree."""


@dataclass(frozen=True)
class TrainingSpeedFit:
    """How long the parts of a training step take here, beside what the measured rates say."""

    arithmetic: float
    """Factor on the time of operators that multiply."""
    traffic: float
    """Factor on the time of operators that only move."""
    attention: float
    """Factor on the time of fused attention."""
    overhead: float
    """Seconds of each operator that multiplies."""
    spread: tuple[float, float]
    """Of measured speed divided by that of the formula; 1 / x to x."""


@dataclass(frozen=True)
class ServingSpeedFit:
    """How fast an engine decodes and reads prompts here; by precision of the weights."""

    bytes_per_second: dict[str, float]
    """Decoding, of the weights."""
    cached_byte_s: float
    """Seconds of each byte of cached keys and values, which attention reads more slowly."""
    layer_s: dict[str, float]
    """Seconds that each layer takes beside its bytes, by precision."""
    logit_s: float
    """Seconds of each entry of the vocabulary, as the next token is chosen."""
    token_s: float
    """Seconds of each token beside that: the engine's own work."""
    prompt_flops: dict[str, float]
    """Operations a second as a prompt is read."""
    spread: tuple[float, float]
    """As for training."""


@dataclass(frozen=True)
class MeasuredTrainingStep:
    """A training step that was measured."""

    width: int
    """Of the small Llama that was trained."""
    layers: int
    """Of that Llama."""
    rows: list[int]
    """Tokens of each row."""
    seconds: float
    """Median of the measured times."""
    fitted_seconds: float
    """What the fit says."""


@dataclass(frozen=True)
class MachineMeasurement:
    """One measurement of a machine."""

    name: str
    """Of the device, as `detect_gpu_or_cpu_spec` names it."""
    processor: str
    """Of the machine."""
    threads: int
    """Of the CPU that computed; 0 on a GPU."""
    date: str
    """As 2026-11-26."""
    versions: dict[str, str]
    """Of slimtune, torch and transformers."""
    memory: int
    """Bytes of the device."""
    bf16: bool
    """Whether dtype "auto" is bfloat16 on it."""
    device: str
    """The kind of device: cpu, cuda or mps."""
    rates: dict[str, float]
    """Operations a second of a large product, by dtype."""
    vector_rates: dict[str, float]
    """Bytes a second as a matrix is multiplied with one vector, by dtype."""
    bandwidth: float
    """Bytes a second of a copy, read and written."""
    training: TrainingSpeedFit
    """How long the parts of a training step take."""
    serving: dict[str, ServingSpeedFit]
    """By engine: transformers, llama.cpp."""
    steps: list[MeasuredTrainingStep]
    """The measured training steps, with what the fit says of each."""
    skipped: dict[str, str]
    """What was not measured, and why."""

    @property
    def evidence(self) -> str:
        """The kind of evidence of a prediction."""
        return f"measured here, {self.date}"

    def estimate_step_seconds(self, work: TrainingWorkload) -> float:
        """Return the seconds of a micro-batch, with its share of the optimizer's step."""
        step_bytes = work.optimizer_step_bytes / work.micro_batches_per_step
        terms = compute_step_time_terms(
            work.counts_by_operator_cost, work.attention_flops_by_dtype, step_bytes, self.rates, self.bandwidth
        )
        fit = self.training
        factors = (fit.arithmetic, fit.traffic, fit.attention, fit.overhead)
        return sum(factor * term for factor, term in zip(factors, terms, strict=True))

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield its figures as label and text."""
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        yield "machine", f"{self.processor if self.device == 'cpu' else self.name}{threads}, {self.date}"
        yield "products", f"{_format_by_dtype(self.rates)} GFLOPS"
        yield "with one row", f"{_format_by_dtype(self.vector_rates)} GB/s of the matrix"
        yield "memory", f"{format_three_digits(self.bandwidth / 1e9)} GB/s copied"
        low, high = (100 * (end - 1) for end in self.training.spread)
        yield "training", f"{len(self.steps)} kinds of steps; the formula is within {low:+.0f} to {high:+.0f} % of them"
        for engine, fit in self.serving.items():
            for precision, speed in fit.bytes_per_second.items():
                prompt = fit.prompt_flops.get(precision, 0.0)
                decoding, reading = (format_three_digits(n / 1e9) for n in (speed, prompt))
                text = f"{decoding} GB/s decoding, {reading} GFLOPS reading a prompt"
                yield f"{engine} {precision}", text
        for what, why in self.skipped.items():
            yield what, f"not measured: {why}"

    def find_serving_fit(self, engine: str, precision: str) -> tuple[ServingSpeedFit, str, str] | None:
        """Return an engine's speed, the measured precision nearest to a wanted one, and the kind of evidence."""
        fit = self.serving.get(ENGINES[engine].fitted_speeds_engine if engine in ENGINES else engine)
        if fit is None:
            return None
        nearest = find_precision_with_similar_kernels(precision, fit.bytes_per_second)
        if nearest is None:
            return None
        return fit, nearest, self.evidence + (f", in {nearest}" if nearest != precision else "")


def _format_by_dtype(rates: Mapping[str, float]) -> str:
    names = {dtype: column.partition("_")[0] for dtype, column in RATE_COLUMNS.items()}
    return ", ".join(f"{names[dtype]} {format_three_digits(rate / 1e9)}" for dtype, rate in rates.items())


def compute_step_time_terms(
    counts_by_operator_cost: Mapping[Any, float],
    attention: Mapping[Any, float],
    optimizer_step_bytes: float,
    rates: Mapping[str, float],
    bandwidth: float,
) -> tuple[float, float, float, float]:
    """Return the three sums of the formula in seconds, and the number of operators that multiply.

    Args:
        counts_by_operator_cost: how often an operator of (FLOPs, bytes moved, dtype) runs.
        attention: FLOPs of fused attention, by dtype.
        optimizer_step_bytes: bytes that the optimizer moves.
        rates, bandwidth: as for `MachineMeasurement`.
    """

    def rate(dtype: Any) -> float:
        return rates.get(dtype_name(dtype)) or rates["float32"]

    products, moved, count = 0.0, optimizer_step_bytes / bandwidth, 0.0
    for (operations, size, dtype), n in counts_by_operator_cost.items():
        if operations:
            count += n
            products += n * max(operations / rate(dtype), size / bandwidth)
        else:
            moved += n * size / bandwidth
    return products, moved, sum(n / rate(dtype) for dtype, n in attention.items()), count


def get_measurement_path() -> Path:
    """Return where the measurement is stored: `$SLIMTUNE_BENCH`, else `slimtune/bench.json` in the user's data."""
    if own := os.environ.get("SLIMTUNE_BENCH"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "slimtune" / "bench.json"


def overwrite_machine_measurement(measured: MachineMeasurement) -> Path:
    """Write a measurement where plans find it; return the file."""
    file = get_measurement_path()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"format": FORMAT, **to_json_dict(measured)})
    return file


def load_machine_measurement() -> MachineMeasurement | None:
    """Return the stored measurement; None if there is none of this processor in today's format.

    Raises:
        RunError: the file is damaged.
    """
    file = get_measurement_path()
    if not file.is_file():
        return None
    try:
        values = dict(read_json_object(file))
        if values.pop("format", None) != FORMAT:
            return None
        found = from_json_dict(MachineMeasurement, values)
        figures = [found.bandwidth, *found.rates.values(), *found.training.spread]
        if not all(isinstance(n, (int, float)) and n > 0 for n in figures):
            raise ValueError("a figure is not above 0")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{file} is damaged: {error}", "what slimtune bench writes", "run it again") from error
    return found if found.processor == read_processor_name() else None
