"""`slimtune doctor`: what this machine offers, what slimtune chooses on it, and what is missing."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from rich.text import Text

from ..utils.formatting import format_bytes
from .common import Json, console, print_fields

LIBRARIES = (
    "slimtune", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "peft", "trl",
)  # fmt: skip
PROGRAMS = {"bitsandbytes": "bitsandbytes", "llama.cpp": "xllamacpp", "vLLM": "vllm", "Ollama": "ollama"}
"""Optional packages and programs, and the name of the package or command."""
EXTRAS = {
    "quant": "4-bit and 8-bit bases", "serve-test": "exports checked by llama.cpp", "eval": "checks of answers",
    "compare": "slimtune compare", "plot": "charts as files", "demo": "bases in GGUF files", "tasks": "lm-eval tasks",
}  # fmt: skip
"""What each extra is for. The others are for developers."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
"""CPU flags that decide how fast matrices are multiplied."""
PCI_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_INSTALL = "see https://pytorch.org/get-started/locally"


def doctor(as_json: Json = False) -> dict[str, Any]:
    """Report what this machine offers, and what is missing.

    The device and dtype that auto chooses, versions, GPUs, CPU, free memory and disk, and what can be installed.
    """
    import psutil
    import torch

    from ..models.dtype import pick_device, pick_dtype, read_cpu_flags
    from ..reporting.versions import find_version

    flags = read_cpu_flags() or []
    gpus = _list_gpus()
    device = pick_device("auto")
    result: dict[str, Any] = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: find_version(name) for name in LIBRARIES},
        "torch_build": _torch_build(),
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
        },
        "devices": ["cpu", *(f"{gpu['device']} ({gpu['name']})" for gpu in gpus)],
        "gpus": gpus,
        "unused_gpus": [] if gpus else _find_unused_gpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "programs": {name: find_version(p) or shutil.which(p) for name, p in PROGRAMS.items()},
        "extras": _find_missing_packages(),
        "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }
    if not as_json:
        _print_report(result)
    return result


def _print_report(result: dict[str, Any]) -> None:
    screen = console()
    where = next((gpu["name"] for gpu in result["gpus"]), "the CPU")
    screen.print(Text(f"ready: trains on {where}, frozen weights in {result['dtype']}", "bold"))
    cpu, libraries = result["cpu"], result["libraries"]
    print_fields([
        *(("GPU not used", f"{gpu['name']}: {gpu['hint']}") for gpu in result["unused_gpus"]),
        *(
            (gpu["device"], f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}"
             + (f" ({format_bytes(gpu['free_bytes'])} free)" if gpu["free_bytes"] is not None else "")
             + (f", driver {gpu['driver']}" if gpu["driver"] else ""))
            for gpu in result["gpus"]
        ),
        ("auto chooses", f"--device {result['device']} --dtype {result['dtype']}"),
        ("OS", result["os"]),
        ("Python", result["python"]),
        ("slimtune", libraries["slimtune"] or "not installed: run from its source"),
        ("torch", f"{libraries['torch']}, built for {result['torch_build']}"),
        ("CPU", f"{cpu['cores']} cores, torch uses {cpu['threads']} threads"),
        ("CPU flags", ", ".join(cpu["flags"]) or "none for fast matrix products"),
        ("memory", f"{format_bytes(result['memory_free_bytes'])} free of {format_bytes(result['memory_bytes'])}"),
        ("disk", f"{format_bytes(result['disk_free_bytes'])} free in this folder"),
        *((name, version or "not installed") for name, version in libraries.items() if name not in LIBRARIES[:2]),
        *((name, version or "not installed") for name, version in result["programs"].items()),
    ])  # fmt: skip
    missing = [(EXTRAS[e], f"pip install 'slimtune[{e}]'") for e, m in result["extras"].items() if m and e in EXTRAS]
    if missing:
        screen.print(Text("\nto add:", "bold"))
        print_fields(missing)


def _torch_build() -> str:
    import torch

    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    if torch.backends.mps.is_built():
        return "Apple GPUs (MPS)"
    return "Intel GPUs (XPU)" if getattr(torch.version, "xpu", None) else "CPUs only"


def _list_gpus() -> list[dict[str, Any]]:
    """Return the GPUs that torch can use."""
    import psutil
    import torch

    drivers = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    gpus: list[tuple[Any, ...]] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append((torch.cuda.get_device_name(i), f"cuda:{i}", total, free, drivers[0] if drivers else None))
    if torch.backends.mps.is_available():
        memory = psutil.virtual_memory()
        gpus.append(("Apple GPU", "mps", memory.total, memory.available, None))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            total = torch.xpu.get_device_properties(i).total_memory
            gpus.append((torch.xpu.get_device_name(i), f"xpu:{i}", total, None, None))
    return [dict(zip(("name", "device", "memory_bytes", "free_bytes", "driver"), gpu, strict=True)) for gpu in gpus]


def _find_unused_gpus() -> list[dict[str, str]]:
    """Return the GPUs that are there, but that torch cannot use, and what to do about each."""
    import torch

    names = [line.partition(": ")[2].partition(" (UUID")[0] for line in _run("nvidia-smi", "-L").splitlines()]
    for file in [] if names else sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += [line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("Model:")]
    marketing = [line.split(":", 1)[1].strip() for line in _run("rocminfo").splitlines() if "Marketing Name" in line]
    found = [("NVIDIA", name) for name in names]
    found += [("AMD", name) for name in marketing if "CPU" not in name and "Ryzen" not in name]
    seen = {vendor for vendor, _ in found}
    for folder in Path("/sys/bus/pci/devices").glob("*"):  # without a driver only the bus knows a GPU
        kind, vendor = (_read(folder / name) for name in ("class", "vendor"))
        if kind.startswith("0x03") and (name := PCI_VENDORS.get(vendor)) is not None and name not in seen:
            model = _run("lspci", "-s", folder.name).partition(": ")[2].strip()
            found.append((name, model or f"a GPU of {name}"))
    builds = {"NVIDIA": ("CUDA", torch.version.cuda), "AMD": ("ROCm", torch.version.hip)}
    hints = {"Intel": "slimtune does not train on Intel's GPUs yet"}
    for vendor, (build, version) in builds.items():
        install = f"install torch built for {build}: {_INSTALL}"
        hints[vendor] = f"torch finds no driver for it: install {vendor}'s driver" if version else install
    return [{"name": name, "vendor": vendor, "hint": hints[vendor]} for vendor, name in found]


def _run(*command: str) -> str:
    """Return what a program prints; "" if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _find_missing_packages() -> dict[str, list[str]]:
    """Return the packages that each extra lacks; nothing if slimtune runs from its source."""
    from packaging.requirements import Requirement

    from ..reporting.versions import find_version

    if find_version("slimtune") is None:
        return {}
    required = map(Requirement, importlib.metadata.requires("slimtune") or [])
    absent = [(r.name, r.marker) for r in required if r.marker is not None and find_version(r.name) is None]
    return {
        extra: [
            name for name, marker in absent if marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
        ]
        for extra in importlib.metadata.metadata("slimtune").get_all("Provides-Extra") or []
    }
