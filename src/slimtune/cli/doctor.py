"""`slimtune doctor`: what this machine offers, and what slimtune would choose on it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from ..utils.formatting import format_bytes
from .common import Json, print_fields

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
    from packaging.requirements import Requirement

    from ..models.dtype import pick_device, pick_dtype, read_cpu_flags
    from ..reporting.versions import find_version

    flags = read_cpu_flags() or []
    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices += [f"xpu:{i} ({torch.xpu.get_device_name(i)})" for i in range(torch.xpu.device_count())]
    missing: dict[str, list[str]] = {}
    needed = [
        r for r in map(Requirement, importlib.metadata.requires("slimtune") or []) if find_version(r.name) is None
    ]
    for extra in importlib.metadata.metadata("slimtune").get_all("Provides-Extra") or []:
        markers = [(r.name, r.marker) for r in needed if r.marker is not None and not r.marker.evaluate({"extra": ""})]
        missing[extra] = [name for name, marker in markers if marker.evaluate({"extra": extra})]
    device = pick_device("auto")
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "libraries": {name: find_version(name) for name in LIBRARIES},
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
        },
        "devices": devices,
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "extras": missing,
        "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }
    if not as_json:
        cpu = result["cpu"]
        print_fields([
            ("python", result["python"]),
            *((name, version or "not installed") for name, version in result["libraries"].items()),
            ("CPU", f"{cpu['cores']} cores, torch uses {cpu['threads']} threads"),
            ("CPU flags", ", ".join(cpu["flags"]) or "none for fast matrix products"),
            ("devices", ", ".join(devices)),
            ("free memory", format_bytes(result["memory_free_bytes"])),
            ("free disk here", format_bytes(result["disk_free_bytes"])),
            *((f"extra {e}", f"missing: {', '.join(m)}" if m else "installed") for e, m in missing.items()),
            ("auto chooses", f"{result['device']}, frozen weights in {result['dtype']}"),
        ])  # fmt: skip
    return result
