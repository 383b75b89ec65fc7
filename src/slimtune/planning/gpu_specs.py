"""The GPUs people own or rent (`gpus.csv`, each row with its source), and the memory that a run can have of one.

It imports no torch, so that a wrong name is answered at once.
"""

import csv
import datetime
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal

from ..core.foundation.formatting import GIB, format_bytes
from ..core.models.gpu_support import NO_XPU, VENDOR_DEVICES
from ..errors import UsageError, format_names
from ..extras.product_names import suggest_name_with_same_numbers
from .interval import Interval
from .measured_speeds import RATE_COLUMNS, MachineMeasurement, load_machine_measurement

THIS_MACHINE = "this machine"
MAX_AGE = 180
"""Days after which a price or a card's figures may be out of date."""
UNITS = {"": 1, **{u: 1000**n for n, u in enumerate("kmgt", 1)}, **{f"{u}i": 1024**n for n, u in enumerate("kmgt", 1)}}


@dataclass(frozen=True)
class GpuFacts:
    """What `slimtune gpus` shows of a GPU."""

    name: str
    """The name that plans take."""
    kind: str
    """What it is sold as: desktop, laptop, workstation, datacentre, mac or mini."""
    released: str
    """Month in which it came out, as 2023-06."""
    vendor: str
    """The maker: nvidia, amd, intel or apple."""
    architecture: str
    """The maker's name of the generation."""
    bf16: bool
    """Whether training holds the weights in bfloat16 on it, unless told otherwise."""
    flash: bool
    """Whether flash attention runs on it."""
    watts: float | None
    """Power of the board (of a Mac: of the machine); null: unknown."""
    unified: bool
    """Whether its memory is the system's, too."""
    source: str
    """Where the figures are from."""
    checked: str
    """When they were last checked, as 2026-11-25."""
    trains: bool
    """Whether slimtune trains on it."""
    memory_bytes: int
    """Bytes as sold."""
    visible_bytes: int
    """Bytes that the driver shows: fewer if error correction takes some."""
    usable_bytes: Interval
    """Bytes that a run can have: surely, at most."""
    bytes_per_second: float | None
    """Bandwidth of the memory."""
    flops: dict[str, float] | None
    """Dense floating point operations a second by dtype, in hardware."""


@dataclass(frozen=True)
class GpuSpec:
    """A GPU, a Mac, or a CPU's memory, as far as a plan needs to know it."""

    name: str  # as `slimtune gpus` lists it
    kind: str  # desktop, laptop, workstation, datacentre, mac or mini; "memory" if only its size is known; "cpu"
    vendor: str  # nvidia, amd, intel or apple; "" if unknown
    architecture: str  # the vendor's name
    memory: int  # bytes as sold
    visible: int  # bytes that the driver shows: fewer if error correction takes some
    bandwidth: float | None = None  # bytes a second
    rates: dict[str, float] | None = None  # dense floating point operations a second by dtype, in hardware
    flash: bool = True  # flash attention runs on it
    watts: float | None = None  # power of the board (of a Mac: of the machine)
    unified: bool = False  # the memory is the system's, too
    stacked_memory: bool = False  # HBM, which one request does not saturate
    source: str = ""  # where these numbers are from
    checked: str = ""  # when they were last checked, there or by their arithmetic, as 2026-11-25
    released: str = ""  # month in which it came out, as 2023-06
    measured: MachineMeasurement | None = None  # what `slimtune bench` measured, if it is this machine's
    auto_bf16: bool | None = None  # whether dtype "auto" is bfloat16 on it, if it was asked; None: by its rates

    @property
    def device(self) -> Literal["cpu", "cuda", "mps"]:
        """The kind of device that torch calls it."""
        return "cpu" if self.kind == "cpu" else VENDOR_DEVICES.get(self.vendor, "cuda")

    @property
    def bf16(self) -> bool:
        """Whether training holds the weights in bfloat16 on it, unless told otherwise."""
        if self.auto_bf16 is not None:
            return self.auto_bf16
        # torch says that every AMD GPU has it, also those that emulate it.
        return self.device == "mps" or self.rates is None or self.vendor == "amd" or "bfloat16" in self.rates

    @property
    def trains(self) -> bool:
        """Whether slimtune trains on it."""
        return not self.vendor or self.vendor in VENDOR_DEVICES

    @property
    def quantization_is_proven(self) -> bool:
        """Whether bitsandbytes is known to quantize on it."""
        return self.vendor not in ("amd", "apple")

    def facts(self) -> GpuFacts:
        """Return what `slimtune gpus` shows of it."""
        names = (
            "name", "kind", "released", "vendor", "architecture", "bf16", "flash", "watts", "unified", "source",
            "checked", "trains",
        )  # fmt: skip
        return GpuFacts(
            **{name: getattr(self, name) for name in names},
            memory_bytes=self.memory,
            visible_bytes=self.visible,
            usable_bytes=self.usable,
            bytes_per_second=self.bandwidth,
            flops=self.rates,
        )

    def format_source(self) -> str:
        """Return where its figures are from, and when they were read there."""
        return f"{self.source} (checked {format_date_with_age_note(self.checked)})" if self.checked else self.source

    @property
    def usable(self) -> Interval:
        """Bytes a run can have, (surely, at most).

        A GPU that drives a display gives it up to a twentieth; macOS gives the GPU two thirds of a small memory and
        three quarters of a large one (`recommendedMaxWorkingSetSize`); the BIOS gives three quarters to an AMD chip
        with unified memory, a raised GTT limit on Linux what is visible; of a CPU's memory it is what is free.
        """
        if self.kind == "cpu":
            return Interval(self.visible, self.visible)
        if self.vendor == "apple":
            share = 0.66 if self.memory <= 36 * GIB else 0.75
            return Interval(int(share * self.memory), int(0.75 * self.memory))
        if self.vendor == "amd" and self.unified:
            return Interval(int(0.75 * self.memory), self.visible)
        surely = 0.98 if self.kind == "datacentre" else 0.955
        return Interval(int(surely * self.visible), int(0.99 * self.visible))


@cache
def list_gpu_specs() -> tuple[GpuSpec, ...]:
    """Return every GPU of the table, each once."""
    return tuple({gpu.name: gpu for _, gpu in _rows()}.values())


@cache
def _read_table() -> tuple[dict[str, str], ...]:
    text = (files(__package__) / "gpus.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


@cache
def _rows() -> list[tuple[list[str], GpuSpec]]:
    """Return the names and the GPU of each row of `gpus.csv`; a row of several memories is a GPU for each of them."""
    rows = []
    for row in _read_table():
        memories = row["memory_gib"].split(";")
        visible = row["visible_gib"].split(";") if row["visible_gib"] else memories
        for memory, seen in zip(memories, visible, strict=True):
            gpu = GpuSpec(
                kind=row["kind"],
                vendor=row["vendor"],
                architecture=row["architecture"],
                source=row["source"],
                checked=row["checked"],
                released=row["released"],
                name=row["name"] if len(memories) == 1 else f"{row['name']}-{memory}gb",
                memory=int(float(memory) * GIB),
                visible=int(float(seen) * GIB),
                bandwidth=float(row["bandwidth_gbs"]) * 1e9,
                rates={dtype: float(row[column]) * 1e12 for dtype, column in RATE_COLUMNS.items() if row[column]},
                flash=row["flash"] == "yes",
                watts=float(row["watts"]) if row["watts"] else None,
                unified=row["unified"] == "yes",
                stacked_memory=row["vendor"] != "apple" and int(row["bus_bits"] or 0) > 1024,
            )
            rows.append(([gpu.name, row["name"], *filter(None, row["aliases"].split(";"))], gpu))
    return rows


def find_gpus_by_name(name: str) -> list[GpuSpec]:
    """Return the GPUs that a name can mean, the usual one first, of a chip with several memories the smallest first.

    Case, spaces, dashes and the vendor's words do not matter; a memory may follow: "M4 Max 64 GB", "MacBook Air M2".
    """
    wanted = _normalize(name)
    if wanted == _normalize(THIS_MACHINE):
        return [here] if (here := load_this_machine_measured_gpu()) is not None else []
    if found := [gpu for names, gpu in _rows() if wanted in map(_normalize, names)]:
        return found
    if (sized := _SIZED.fullmatch(name.strip())) is None:
        return []
    return [gpu for gpu in find_gpus_by_name(sized[1]) if round(gpu.memory / GIB) == int(sized[2])]


def describe_other_versions(name: str) -> str:
    """Return that a name is taken as one version of a GPU and which others there are; "" for a name that is one GPU's.

    Versions differ in memory, in its form (SXM, PCIe, NVL) or in the cores of the chip.
    """
    found = find_gpus_by_name(name)
    names = [gpu.name for gpu in list_gpu_specs()]
    if not found or _normalize(name) in map(_normalize, names):
        return ""
    taken = found[0].name
    others = [other for other in names if other != taken and _VERSION.sub("", other) == _VERSION.sub("", taken)]
    return f"{name} is taken as {taken}; there are also {format_names(others)}" if others else ""


def load_this_machine_measured_gpu() -> GpuSpec | None:
    """Return this machine as `slimtune bench` measured it; None if it did not."""
    found = load_machine_measurement()
    if found is None:
        return None
    named = find_gpus_by_name(found.name) if found.name != THIS_MACHINE else []
    known = next((gpu for gpu in named if abs(gpu.visible - found.memory) < 0.05 * gpu.visible), None)
    if known is None:
        kind, vendor = {"cpu": ("cpu", ""), "mps": ("mac", "apple")}.get(found.device, ("memory", ""))
        known = GpuSpec(found.name, kind, vendor, "", found.memory, found.memory, unified=kind == "mac")
    return add_gpu_measurement(known, found)


def make_gpus_csv_row_dict(measurement: MachineMeasurement) -> dict[str, str]:
    """Return a measurement by the columns of `gpus.csv`."""
    gpu = load_this_machine_measured_gpu()
    name = measurement.processor if measurement.device == "cpu" else measurement.name
    row = dict.fromkeys(_read_table()[0], "")
    row |= {
        "name": "-".join(name.lower().replace("(r)", "").replace("(tm)", "").split()),
        "kind": gpu.kind if gpu is not None else measurement.device,
        "vendor": gpu.vendor if gpu is not None else "",
        "architecture": gpu.architecture if gpu is not None else "",
        "memory_gib": f"{measurement.memory / GIB:.4g}",
        "bandwidth_gbs": f"{measurement.bandwidth / 1e9:.4g}",
        "unified": "yes" if measurement.device != "cuda" else "no",
        "source": f"slimtune bench {measurement.versions['slimtune']}, torch {measurement.versions['torch']}",
        "checked": measurement.date,
    }
    return row | {RATE_COLUMNS[dtype]: f"{rate / 1e12:.4g}" for dtype, rate in measurement.rates.items()}


def add_gpu_measurement(gpu: GpuSpec, measurement: MachineMeasurement) -> GpuSpec:
    """Return a GPU with what was measured on it."""
    return replace(
        gpu,
        measured=measurement,
        bandwidth=measurement.bandwidth,
        rates=measurement.rates,
        auto_bf16=measurement.bf16,
        source=f"slimtune bench, {measurement.evidence}",
        checked=measurement.date,
    )


_SIZED = re.compile(r"(.+?)[\s_-]+(\d+)\s*gi?b", re.IGNORECASE)
_VERSION = re.compile(r"(-(\d+gb|\d+core|sxm|pcie|nvl))+$")
_NOISE = re.compile(
    r"\b(nvidia|geforce|amd|radeon|instinct|intel|apple|tesla|macbook (air|pro)|mac (mini|studio|pro)|imac|macbook"
    r"|graphics|gpu|chip|unified memory|vram|ram)\b|\((r|tm)\)|[^a-z0-9+]+"
)


def _normalize(name: str) -> str:
    """Return a name without the words that do not tell products of one vendor apart."""
    return _NOISE.sub("", name.lower())


def require_gpu_by_name(name: str) -> GpuSpec:
    """Return the GPU with this name, however it is spelled ("RTX 3090", "rtx-3090").

    Raises:
        UsageError: the table has none; the nearest name is given.
    """
    if matches := find_gpus_by_name(name):
        return matches[0]
    if _normalize(name) == _normalize(THIS_MACHINE):
        raise UsageError("this machine is not measured", "a measurement of this processor", "run slimtune bench first")
    if (sized := _SIZED.fullmatch(name.strip())) is not None and (others := find_gpus_by_name(sized[1])):
        raise UsageError(f"there is no {name!r} in the table", f"one of {format_names([g.name for g in others])}")
    close = suggest_name_with_same_numbers(name, [gpu.name for gpu in list_gpu_specs()])
    hint = "or give its memory alone: --vram 24GiB"
    near = get_close_matches(name.lower().replace(" ", "-"), [gpu.name for gpu in list_gpu_specs()], 3, 0.5)
    such = f", such as {', '.join(near)}" if near and not close else ""
    raise UsageError(f"there is no card {name!r} in the table{close}", f"a name that `slimtune gpus` lists{such}", hint)


def is_date_outdated(date: str) -> bool:
    """Return whether a date, as 2026-11-25, is more than `MAX_AGE` days ago."""
    return (datetime.date.today() - datetime.date.fromisoformat(date)).days > MAX_AGE


def format_date_with_age_note(date: str) -> str:
    """Return a date, and whether a figure of that date is old."""
    return f"{date}, older than {MAX_AGE} days" if is_date_outdated(date) else date


def require_trainable_gpu(gpu: GpuSpec) -> None:
    """Raise UsageError if slimtune does not train on a GPU."""
    if not gpu.trains:
        hint = f"on a machine with {gpu.name} the CPU trains: run `slimtune plan` there"
        raise UsageError(f"{gpu.name}: {NO_XPU}", "an NVIDIA or AMD GPU, a Mac or a CPU", hint)


def make_gpu_with_memory(memory_size: str) -> GpuSpec:
    """Return a GPU of which only the memory is known: `24GiB`, `24 GB`, `512MiB`; a number alone means GiB.

    Raises:
        UsageError: the text is not a number of bytes above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b|)\s*", memory_size, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].lower().removesuffix("b") if match[2] else "gi"]) if match else 0
    if size < 1:
        raise UsageError(f"{memory_size!r} is no size of memory", "a number above 0 with a unit, as 24GiB or 24GB")
    return GpuSpec(f"{format_bytes(size)} of GPU memory", "memory", "", "", size, size, source="given")
