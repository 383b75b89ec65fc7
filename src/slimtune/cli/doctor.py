"""`slimtune doctor`: what this machine offers, and what slimtune would choose on it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from ..utils.formatting import format_bytes
from .common import Json, console, print_fields

LIBRARIES = (
    "slimtune", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "peft", "trl",
)  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
"""CPU flags that decide how fast matrices are multiplied."""


def doctor(as_json: Json = False) -> dict[str, Any]:
    """Report what this machine offers.

    Versions, CPU, devices, free memory and disk, installed extras, and the device and dtype that auto chooses.
    """
    import psutil
    import torch

    from ..models.dtype import pick_device, pick_dtype

    device = pick_device("auto")
    result = {
        "python": platform.python_version(),
        "libraries": {name: _find_version(name) for name in LIBRARIES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "flags": _find_cpu_flags()},
        "devices": ["cpu", *_find_accelerators(torch)],
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "extras": _find_missing_packages(),
        "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }
    if not as_json:
        cpu = result["cpu"]
        extras = {f"extra {name}": missing for name, missing in result["extras"].items()}
        print_fields(
            console(),
            [
                ("python", result["python"]),
                *((name, version or "not installed") for name, version in result["libraries"].items()),
                ("CPU", f"{cpu['cores']} cores, torch uses {cpu['threads']} threads"),
                ("CPU flags", ", ".join(cpu["flags"]) or "none for fast matrix products"),
                ("devices", ", ".join(result["devices"])),
                ("free memory", format_bytes(result["memory_free_bytes"])),
                ("free disk here", format_bytes(result["disk_free_bytes"])),
                *((name, f"missing: {', '.join(m)}" if m else "installed") for name, m in extras.items()),
                ("auto chooses", f"{result['device']}, frozen weights in {result['dtype']}"),
            ],
        )
    return result


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    present = set(line.partition(":")[2].split())
    return [flag for flag in CPU_FLAGS if flag in present]


def _find_accelerators(torch: Any) -> list[str]:
    devices = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices += [f"xpu:{i} ({torch.xpu.get_device_name(i)})" for i in range(torch.xpu.device_count())]
    return devices


def _find_missing_packages() -> dict[str, list[str]]:
    """Return the packages of each extra of slimtune that are not installed."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in importlib.metadata.requires("slimtune") or []]
    return {
        extra: [
            r.name
            for r in requirements
            if r.marker is not None
            and r.marker.evaluate({"extra": extra})
            and not r.marker.evaluate({"extra": ""})
            and _find_version(r.name) is None
        ]
        for extra in importlib.metadata.metadata("slimtune").get_all("Provides-Extra") or []
    }
