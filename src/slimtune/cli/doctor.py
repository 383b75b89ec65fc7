"""`slimtune doctor`: what this machine offers, and what slimtune would choose on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from ..utils.formatting import format_bytes
from .common import Json, console, table

LIBRARIES = (
    "slimtune", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "peft", "trl",
)  # fmt: skip
# What decides how fast a CPU multiplies matrices.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def doctor(as_json: Json = False) -> dict[str, Any]:
    """Report what this machine offers.

    Versions, processor, devices, free memory and disk, installed extras, and the device and dtype chosen here.
    """
    import psutil
    import torch

    from ..models.dtype import pick_device, pick_dtype

    device = pick_device("auto")
    result = {
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "flags": _cpu_flags(),
        },
        "devices": ["cpu", *_accelerators(torch)],
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "extras": _extras(),
        "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }
    if not as_json:
        _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    rows = table("", "")
    rows.add_row("python", result["python"])
    for name, version in result["libraries"].items():
        rows.add_row(name, version or "not installed")
    cpu = result["cpu"]
    rows.add_row("cpu", f"{cpu['cores']} cores, torch uses {cpu['threads']}")
    rows.add_row("cpu flags", ", ".join(cpu["flags"]) or "none that matter")
    rows.add_row("devices", ", ".join(result["devices"]))
    rows.add_row("free memory", format_bytes(result["memory_free_bytes"]))
    rows.add_row("free disk here", format_bytes(result["disk_free_bytes"]))
    for name, lacking in result["extras"].items():
        rows.add_row(f"extra {name}", f"lacks {', '.join(lacking)}" if lacking else "installed")
    rows.add_row("chosen", f"{result['device']}, frozen weights in {result['dtype']}")
    console().print(rows)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    line = next((text for text in info.read_text().splitlines() if text.startswith(("flags", "Features"))), "")
    present = set(line.partition(":")[2].split())
    return [flag for flag in CPU_FLAGS if flag in present]


def _accelerators(torch: Any) -> list[str]:
    found = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [f"xpu:{i} ({torch.xpu.get_device_name(i)})" for i in range(torch.xpu.device_count())]
    return found


def _extras() -> dict[str, list[str]]:
    """Return, for each extra of the package, which of its requirements are not installed."""
    from packaging.requirements import Requirement

    about = importlib.metadata.metadata("slimtune")
    needed = [Requirement(text) for text in importlib.metadata.requires("slimtune") or []]
    return {
        extra: [
            r.name
            for r in needed
            if r.marker is not None
            and r.marker.evaluate({"extra": extra})
            and not r.marker.evaluate({"extra": ""})
            and _version(r.name) is None
        ]
        for extra in about.get_all("Provides-Extra") or []
    }
