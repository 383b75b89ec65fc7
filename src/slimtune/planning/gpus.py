"""The cards people own or rent (`gpus.csv`, each row with its source), and what a job can have of one."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import psutil
import torch

from ..errors import UsageError, format_names, nearest
from ..models.dtype import pick_device
from ..utils.distributed import local_world_size
from ..utils.formatting import format_bytes
from ..utils.memory import free_memory

GIB = 1 << 30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30,
         "ti": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU, a Mac, or the memory of a machine.

    Args:
        name: as `slimtune gpus` lists it.
        kind: desktop, laptop, workstation, datacentre, mac or mini; "memory" where only its size is known; "cpu".
        vendor: nvidia, amd, intel or apple; "" where it is not known.
        architecture: the vendor's name.
        memory: bytes as sold.
        visible: bytes that the driver shows: less where error correction takes its part.
        bandwidth: bytes a second, None where it is not known.
        rates: dense floating point operations a second by dtype, those it has.
        flash: flash attention runs on it.
        watts: power of the board (of a Mac: of the machine), None where it is not known.
        unified: the memory is the system's, too.
        source: where these numbers are from.
    """

    name: str
    kind: str
    vendor: str
    architecture: str
    memory: int
    visible: int
    bandwidth: float | None = None
    rates: dict[str, float] | None = None
    flash: bool = True
    watts: float | None = None
    unified: bool = False
    source: str = ""

    @property
    def device(self) -> Literal["cpu", "cuda", "mps"]:
        """The kind of device torch calls it."""
        # What torch calls xpu takes the same kernels as far as memory goes.
        return "cpu" if self.kind == "cpu" else "mps" if self.vendor == "apple" else "cuda"

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16 by itself."""
        return self.rates is None or "bfloat16" in self.rates

    @property
    def usable(self) -> tuple[int, int]:
        """Bytes a job can have, (surely, at most).

        A card that drives a display gives it up to a twentieth; macOS gives the GPU two thirds of a small memory and
        three quarters of a large one (`recommendedMaxWorkingSetSize`); a CPU's is what is free.
        """
        if self.kind == "cpu":
            return self.visible, self.visible
        if self.vendor == "apple":
            share = 0.66 if self.memory <= 36 * GIB else 0.75
            return int(share * self.memory), int(0.75 * self.memory)
        surely = 0.98 if self.kind == "datacentre" else 0.955
        return int(surely * self.visible), int(0.99 * self.visible)


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Return every card of the table."""
    return tuple(_names().values())


@cache
def _names() -> dict[str, Gpu]:
    """Return the cards by their plain names, each once."""
    return {_plain(row["name"]): _card(row) for row in _rows()}


@cache
def _aliases() -> dict[str, list[Gpu]]:
    """Return the cards that a name can mean, in plain spelling; the first is the usual one."""
    found: dict[str, list[Gpu]] = {}
    for row in _rows():
        for name in {row["name"], *filter(None, row["aliases"].split(";"))}:
            found.setdefault(_plain(name), []).append(_names()[_plain(row["name"])])
    return found


def _rows() -> list[dict[str, str]]:
    text = (files(__package__) / "gpus.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def find_gpu(name: str) -> Gpu:
    """Return the card with this name, however it is spelled ("RTX 3090", "rtx-3090").

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    found = _aliases().get(_plain(name))
    if found is None:
        known = [c.name for c in all_gpus()]
        close = nearest(name.lower().replace(" ", "-"), known)
        raise UsageError(
            f"there is no card {name!r} in the table{close}",
            "a name that `slimtune gpus` lists",
            "or give its memory alone: --vram 24GiB",
        )
    return found[0]


def gpu_with_memory(text: str) -> Gpu:
    """Return a card of which only the memory is known, given as `24GiB`, `24GB` or `24` (GiB).

    Raises:
        UsageError: that is no number of bytes above 0.
    """
    size = parse_bytes(text)
    return Gpu(f"{format_bytes(size)} of GPU memory", "memory", "", "", size, size, source="given")


def parse_bytes(text: str) -> int:
    """Return the bytes that a text names: `24GiB`, `24 GB`, `512MiB`; a number alone means GiB.

    Raises:
        UsageError: it is none, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b|)\s*", str(text), re.IGNORECASE)
    size = float(match[1]) * UNITS[match[2].lower().removesuffix("b") if match[2] else "gi"] if match else 0
    if size < 1:
        raise UsageError(f"{text!r} is no size of memory", "a number above 0 with a unit, as 24GiB or 24GB")
    return int(size)


def detect_gpu(device: str = "auto") -> Gpu:
    """Return the machine's own GPU, or its memory where it has none or the CPU is asked for.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
    """
    kind = pick_device(device).type
    if kind == "cuda":
        name = torch.cuda.get_device_name()
        total = torch.cuda.mem_get_info()[1]
        known = (c for c in _aliases().get(_plain(name), []) if abs(c.visible - total) < 0.05 * total)
        return next(known, Gpu(name, "memory", "", "", total, visible=total, source="this machine"))
    if kind == "mps":
        total = psutil.virtual_memory().total
        return Gpu("this Mac", "mac", "apple", "", total, total, unified=True, source="this machine")
    free = free_memory(torch.device("cpu"))
    others = f", one of {local_world_size()} processes on it" if local_world_size() > 1 else ""
    return Gpu(f"this machine{others}", "cpu", "", "", free, free, source="this machine")


def _card(row: dict[str, str]) -> Gpu:
    fields = {"bfloat16": "bf16_tflops", "float16": "fp16_tflops", "float32": "fp32_tflops"}
    return Gpu(
        name=row["name"],
        kind=row["kind"],
        vendor=row["vendor"],
        architecture=row["architecture"],
        memory=int(float(row["memory_gib"]) * GIB),
        visible=int(float(row["visible_gib"] or row["memory_gib"]) * GIB),
        bandwidth=float(row["bandwidth_gbs"]) * 1e9,
        rates={dtype: float(row[field]) * 1e12 for dtype, field in fields.items() if row[field]},
        flash=row["flash"] == "yes",
        watts=float(row["watts"]) if row["watts"] else None,
        unified=row["unified"] == "yes",
        source=row["source"],
    )


def names() -> str:
    """Return the names of the table, as messages list them."""
    return format_names(c.name for c in all_gpus())
