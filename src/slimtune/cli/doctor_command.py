"""`slimtune doctor`: what is wrong with this machine, and what it offers."""

import dataclasses
import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..core.foundation.formatting import escape_controls, format_bytes
from ..errors import install_command
from .common import ERROR, WARNING, Json, console, print_fields

if TYPE_CHECKING:
    from ..diagnostics.machine_checks import Finding
    from ..diagnostics.machine_facts import MachineFacts, TorchFacts

LIBRARIES = (
    "slimtune", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "peft", "trl",
)  # fmt: skip
PROGRAMS = {"bitsandbytes": "bitsandbytes", "llama.cpp": "xllamacpp", "vLLM": "vllm", "Ollama": "ollama"}
"""Optional packages and programs, and the name of the package or command."""
EXTRAS = {
    "quant": "4-bit and 8-bit bases", "export-check": "exports checked by llama.cpp", "eval": "checks of answers",
    "ui": "slimtune ui", "serve": "slimtune serve",
    "compare": "slimtune compare", "plot": "charts as files", "demo": "bases in GGUF files", "tasks": "lm-eval tasks",
}  # fmt: skip
"""What each extra is for. The others are for developers."""
GPU_PAGES = (
    "nvidia-", "cuda-", "rocm-", "torch-", "mps-", "container-", "device-", "driver-", "wheel-", "no-kernel-image",
)  # fmt: skip
"""How the pages begin that say why torch does not use a GPU."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
"""CPU flags that decide how fast matrices are multiplied."""


def doctor(as_json: Json = False) -> dict[str, Any]:
    """Find what is wrong with this machine, and what mends it.

    Looks at GPUs, drivers, torch's build, limits of containers and shells, disks, Ollama and the Hub's token. Then: the
    device and dtype that auto chooses, versions, and what can be installed. Asks nothing of the internet.
    """
    from ..core.foundation.installed_versions import find_version
    from ..diagnostics.machine_checks import find_faults
    from ..diagnostics.machine_facts import gather_facts

    facts = gather_facts()
    findings = find_faults(facts)
    gpus, flags, device, dtype = ([], [], None, None) if facts.torch.error else _ask_torch(facts)
    result: dict[str, Any] = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: find_version(name) for name in LIBRARIES},
        "torch_build": _describe_build(facts.torch),
        "cpu": {
            "cores": facts.cores,
            "threads": facts.torch.threads,
            "flags": [flag for flag in CPU_FLAGS if flag in flags],
        },
        "devices": ["cpu", *(f"{gpu['device']} ({gpu['name']})" for gpu in gpus)],
        "gpus": gpus,
        "unused_gpus": [] if gpus else _list_unused_gpus(facts, findings),
        "memory_bytes": facts.memory_bytes,
        "memory_free_bytes": facts.memory_free_bytes,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "programs": {name: find_version(p) or shutil.which(p) for name, p in PROGRAMS.items()},
        "extras": _find_missing_packages(),
        "device": device,
        "dtype": dtype,
        "findings": [finding._asdict() for finding in findings],
        "facts": dataclasses.asdict(facts),
    }
    if not as_json:
        _print_verdict(result, findings)
        _print_facts(result, facts)
    return result


def _print_verdict(result: dict[str, Any], findings: "Sequence[Finding]") -> None:
    screen = console()
    faults = sum(finding.is_fault for finding in findings)
    found = "ready" if not faults else f"{faults} fault{'s' if faults > 1 else ''} found"
    if result["device"] is None:
        screen.print(Text(f"{found}: nothing can be trained", "bold"))
    else:
        where = next((gpu["name"] for gpu in result["gpus"]), "the CPU")
        screen.print(Text(f"{found}: trains on {where}, frozen weights in {result['dtype']}", "bold"))
    for problem, evidence, commands, page, is_fault in findings:
        kind = ("fault: ", ERROR) if is_fault else ("warning: ", WARNING)
        screen.print(Text.assemble("\n", kind, escape_controls(problem)))
        print_fields([("  seen:", evidence)], gap=1)
        for number, command in enumerate(commands):  # a command to copy stays in one line
            screen.print(f"{'        ' if number else '  mend: '}{command}", soft_wrap=True)
        screen.print(f"  more: slimtune explain {page}")
    if findings:
        screen.print()


def _print_facts(result: dict[str, Any], facts: "MachineFacts") -> None:
    cpu, libraries = result["cpu"], result["libraries"]
    shared, disk = facts.shared_memory_bytes, result["disk_free_bytes"]
    print_fields([
        *(("GPU not used", f"{gpu['name']}: {gpu['hint']}") for gpu in result["unused_gpus"]),
        *(
            (gpu["device"], f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}"
             + (f" ({format_bytes(gpu['free_bytes'])} free)" if gpu["free_bytes"] is not None else "")
             + (f", driver {gpu['driver']}" if gpu["driver"] else ""))
            for gpu in result["gpus"]
        ),
        ("auto chooses", f"--device {result['device']} --dtype {result['dtype']}"),
        ("OS", result["os"] + (", in a container" if facts.is_container else "") + (", WSL" if facts.is_wsl else "")),
        ("Python", result["python"]),
        ("slimtune", libraries["slimtune"] or "not installed: run from its source"),
        ("torch", f"{libraries['torch']}, built for {result['torch_build']}"),
        ("CPU", f"{cpu['cores']} cores, torch uses {cpu['threads']} threads"
         + (f", at most {facts.cpu_quota:g} CPUs" if facts.cpu_quota else "")),
        ("CPU flags", ", ".join(cpu["flags"]) or "none for fast matrix products"),
        ("memory", f"{format_bytes(result['memory_free_bytes'])} free of {format_bytes(result['memory_bytes'])}"
         + (f", at most {format_bytes(facts.memory_limit_bytes)} here" if facts.memory_limit_bytes else "")),
        *([("shared memory", format_bytes(shared))] if shared else []),
        ("disk", f"{format_bytes(disk)} free in this folder"),
        *((name, version or "not installed") for name, version in libraries.items() if name not in LIBRARIES[:2]),
        *((name, version or "not installed") for name, version in result["programs"].items()),
        *((f"  {model}", f"runs on {processor}") for model, processor in facts.ollama_models),
        *([("Hub", "offline: HF_HUB_OFFLINE is set")] if facts.environment.get("HF_HUB_OFFLINE", "0") != "0" else []),
        ("Hub token", f"from {facts.token}" if facts.token else "none: only public models can be read"),
    ])  # fmt: skip
    missing = [(EXTRAS[e], install_command(e)) for e, m in result["extras"].items() if m and e in EXTRAS]
    if missing:
        console().print(Text("\nto add:", "bold"))
        print_fields(missing)


def _describe_build(torch: "TorchFacts") -> str:
    if torch.cuda is not None:
        return f"CUDA {torch.cuda}"
    if torch.hip is not None:
        return f"ROCm {torch.hip}"
    if torch.has_mps:
        return "Apple GPUs (MPS)"
    return "Intel GPUs (XPU)" if torch.xpu else "CPUs only"


def _ask_torch(facts: "MachineFacts") -> tuple[list[dict[str, Any]], list[str], str, str]:
    """Return the GPUs that torch can use, the CPU's flags, and the device and dtype that auto chooses."""
    import torch

    from ..core.foundation.dtype_names import dtype_name
    from ..core.models.dtype import pick_device, pick_dtype, read_cpu_flags

    driver = facts.smi_gpus[0].driver if facts.smi_gpus else None
    gpus: list[tuple[Any, ...]] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append((torch.cuda.get_device_name(i), f"cuda:{i}", total, free, driver))
    if torch.backends.mps.is_available():
        gpus.append(("Apple GPU", "mps", facts.memory_bytes, facts.memory_free_bytes, None))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            total = torch.xpu.get_device_properties(i).total_memory
            gpus.append((torch.xpu.get_device_name(i), f"xpu:{i}", total, None, None))
    names = ("name", "device", "memory_bytes", "free_bytes", "driver")
    device = pick_device("auto")
    dtype = dtype_name(pick_dtype("auto", device))
    return [dict(zip(names, gpu, strict=True)) for gpu in gpus], read_cpu_flags() or [], str(device), dtype


def _list_unused_gpus(facts: "MachineFacts", findings: "Sequence[Finding]") -> list[dict[str, str]]:
    """Return the GPUs that are there, but that torch cannot use, and what to do about each."""
    found = [("NVIDIA", gpu.name) for gpu in facts.smi_gpus]
    found += [(gpu.vendor, gpu.name) for gpu in facts.pci_gpus if gpu.vendor != "NVIDIA" or not facts.smi_gpus]
    mend = next((f.commands[0] for f in findings if f.page.startswith(GPU_PAGES)), "torch does not find it")
    hints = {"Intel": "slimtune does not train on Intel's GPUs yet"}
    return [{"name": name, "vendor": vendor, "hint": hints.get(vendor, mend)} for vendor, name in found]


def _find_missing_packages() -> dict[str, list[str]]:
    """Return the packages that each extra lacks; nothing if slimtune runs from its source."""
    from packaging.requirements import Requirement

    from ..core.foundation.installed_versions import find_version

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
