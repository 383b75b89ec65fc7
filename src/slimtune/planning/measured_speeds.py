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

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.files import read_json, write_json
from ..errors import RunError
from .plan_result import Range, Workload

FORMAT = 6
LEAST_SPREAD = 0.1
"""A prediction is not called more certain than this, however well the measured steps agree."""
NEAREST = {
    "F32": "F16", "BF16": "F16", "Q5_1": "Q4_1", "Q5_0": "Q4_0", "Q6_K": "Q4_K_M", "Q5_K_M": "Q4_K_M",
    "Q5_K_S": "Q4_K_M", "Q4_K_S": "Q4_K_M", "IQ4_NL": "Q4_0", "IQ4_XS": "Q4_K_M", "Q3_K_L": "Q4_K_M",
    "Q3_K_M": "Q4_K_M", "Q3_K_S": "Q4_K_M", "IQ3_M": "Q4_K_M", "IQ3_S": "Q4_K_M", "Q2_K": "Q4_K_M",
}  # fmt: skip
"""The measured precision whose kernels are most like those of one that is not measured."""


@dataclass(frozen=True)
class TrainingFit:
    """How long the parts of a training step take here, beside what the measured rates say."""

    arithmetic: float  # factor on the time of operators that multiply
    traffic: float  # factor on the time of operators that only move
    attention: float  # factor on the time of fused attention
    overhead: float  # seconds of each operator that multiplies
    spread: Range  # of measured speed divided by that of the formula; 1 / x to x


@dataclass(frozen=True)
class ServingFit:
    """How fast an engine decodes and reads prompts here; by precision of the weights."""

    bytes_per_second: dict[str, float]  # decoding, of the weights
    cached_byte_s: float  # seconds of each byte of cached keys and values, which attention reads more slowly
    layer_s: dict[str, float]  # seconds that each layer takes beside its bytes, by precision
    logit_s: float  # seconds of each entry of the vocabulary, as the next token is chosen
    token_s: float  # seconds of each token beside that: the engine's own work
    prompt_flops: dict[str, float]  # operations a second as a prompt is read
    spread: Range


@dataclass(frozen=True)
class Measured:
    """One measurement of a machine."""

    name: str  # of the device, as `detect_gpu` names it
    processor: str  # of the machine
    threads: int  # of the CPU that computed; 0 on a GPU
    date: str  # as 2026-11-26
    versions: dict[str, str]
    memory: int  # bytes of the device
    bf16: bool  # whether dtype "auto" is bfloat16 on it
    device: str  # cpu, cuda or mps
    rates: dict[str, float]  # operations a second of a large product, by dtype
    vector_rates: dict[str, float]  # bytes a second as a matrix is multiplied with one vector, by dtype
    bandwidth: float  # bytes a second of a copy, read and written
    training: TrainingFit
    serving: dict[str, ServingFit]  # by engine: transformers, llama.cpp
    steps: list[dict[str, Any]]  # the measured training steps, with what the fit says of each
    skipped: dict[str, str]  # what was not measured, and why

    @property
    def evidence(self) -> str:
        """The kind of evidence of a prediction."""
        return f"measured here, {self.date}"

    def estimate_step_seconds(self, work: Workload) -> float:
        """Return the seconds of a micro-batch, with its share of the optimizer's step."""
        step_bytes = work.optimizer_step_bytes / work.micro_batches
        features = step_features(
            work.operator_counts, work.attention_operations, step_bytes, self.rates, self.bandwidth
        )
        fit = self.training
        factors = (fit.arithmetic, fit.traffic, fit.attention, fit.overhead)
        return sum(factor * feature for factor, feature in zip(factors, features, strict=True))

    def find_serving(self, engine: str, precision: str) -> tuple[ServingFit, str, str] | None:
        """Return an engine's speed, the measured precision nearest to a wanted one, and the kind of evidence."""
        fit = self.serving.get("llama.cpp" if engine == "ollama" else engine)
        if fit is None:
            return None
        nearest = precision if precision in fit.bytes_per_second else NEAREST.get(precision, "")
        if nearest not in fit.bytes_per_second:
            return None
        return fit, nearest, self.evidence + (f", in {nearest}" if nearest != precision else "")


def step_features(
    operator_counts: Mapping[Any, float],
    attention: Mapping[Any, float],
    optimizer_step_bytes: float,
    rates: Mapping[str, float],
    bandwidth: float,
) -> tuple[float, float, float, float]:
    """Return the three sums of the formula in seconds, and the number of operators that multiply.

    Args:
        operator_counts: how often an operator of (FLOPs, bytes moved, dtype) runs.
        attention: FLOPs of fused attention, by dtype.
        optimizer_step_bytes: bytes that the optimizer moves.
        rates, bandwidth: as for `Measured`.
    """

    def rate(dtype: Any) -> float:
        return rates.get(dtype_name(dtype)) or rates["float32"]

    products, moved, count = 0.0, optimizer_step_bytes / bandwidth, 0.0
    for (operations, size, dtype), n in operator_counts.items():
        if operations:
            count += n
            products += n * max(operations / rate(dtype), size / bandwidth)
        else:
            moved += n * size / bandwidth
    return products, moved, sum(n / rate(dtype) for dtype, n in attention.items()), count


def measured_file() -> Path:
    """Return where the measurement is stored: `$SLIMTUNE_BENCH`, else `slimtune/bench.json` in the user's data."""
    if own := os.environ.get("SLIMTUNE_BENCH"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "slimtune" / "bench.json"


def save_measured(measured: Measured) -> Path:
    """Write a measurement where plans find it; return the file."""
    file = measured_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"format": FORMAT, **asdict(measured)})
    return file


def read_processor() -> str:
    """Return the name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_machine_measurement() -> Measured | None:
    """Return the stored measurement; None if there is none of this processor in today's format.

    Raises:
        RunError: the file is damaged.
    """
    file = measured_file()
    if not file.is_file():
        return None
    try:
        values = dict(read_json(file))
        if values.pop("format", None) != FORMAT:
            return None
        serving = {
            engine: ServingFit(**{**fit, "spread": _read_range(fit["spread"])})
            for engine, fit in values.pop("serving").items()
        }
        training = values.pop("training")
        found = Measured(
            **values, serving=serving, training=TrainingFit(**{**training, "spread": _read_range(training["spread"])})
        )
        figures = [found.bandwidth, *found.rates.values(), *found.training.spread]
        if not all(isinstance(n, (int, float)) and n > 0 for n in figures):
            raise ValueError("a figure is not above 0")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{file} is damaged: {error}", "what slimtune bench writes", "run it again") from error
    return found if found.processor == read_processor() else None


def _read_range(values: Sequence[float]) -> Range:
    low, high = values
    return Range(low, high)
