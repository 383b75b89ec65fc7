"""What `slimtune doctor` says: the facts of this machine, what is wrong with it, and what could be installed."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from ..core.foundation.cpu import read_linux_cpu_flags_or_none
from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.formatting import format_bytes
from ..core.foundation.installed_versions import find_package_version
from ..errors import format_install_command
from . import machine_facts
from .machine_checks import MachineFinding, find_machine_problems
from .machine_facts import MachineFacts, TorchFacts, TorchGpu, list_torch_gpus

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


@dataclass(frozen=True)
class CpuFacts:
    """The CPU, as far as it decides the speed of training."""

    cores: int
    """Of the machine."""
    threads: int | None
    """That torch uses; null if it cannot be imported."""
    flags: list[str]
    """Instruction sets for fast matrix products."""


@dataclass(frozen=True)
class UnusedGpu:
    """A GPU that is there, but that torch cannot use."""

    name: str
    """Its name."""
    vendor: str
    """NVIDIA, AMD or Intel."""
    hint: str
    """What to do about it."""


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor --json` prints."""

    os: str
    """System and release."""
    python: str
    """Version of Python."""
    libraries: dict[str, str | None]
    """Version by package; null: not installed."""
    torch_build: str
    """What torch is built for, such as "CUDA 12.8"."""
    cpu: CpuFacts
    """The CPU."""
    devices: list[str]
    """Devices that can train, with the names of the GPUs."""
    gpus: list[TorchGpu]
    """GPUs that torch can use."""
    unused_gpus: list[UnusedGpu]
    """GPUs that torch cannot use, if it can use none."""
    memory_bytes: int
    """CPU memory."""
    memory_free_bytes: int
    """CPU memory that is free."""
    disk_free_bytes: int
    """Free on the disk of this folder."""
    programs: dict[str, str | None]
    """Version or path of each optional package and program; null: not installed."""
    extras: dict[str, list[str]]
    """Packages that each extra lacks."""
    device: str | None
    """The device that auto chooses; null if torch cannot be imported."""
    dtype: str | None
    """The dtype of frozen weights that auto chooses."""
    findings: list[MachineFinding]
    """What is wrong, faults before warnings."""
    facts: MachineFacts
    """Everything that was looked at."""

    def headline(self) -> str:
        """Return the verdict in one line."""
        faults = sum(finding.is_fault for finding in self.findings)
        found = "ready" if not faults else f"{faults} fault{'s' if faults > 1 else ''} found"
        if self.device is None:
            return f"{found}: nothing can be trained"
        where = next((gpu.name for gpu in self.gpus), "the CPU")
        return f"{found}: trains on {where}, frozen weights in {self.dtype}"

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the facts as label and text."""
        facts, libraries = self.facts, self.libraries
        for unused in self.unused_gpus:
            yield "GPU not used", f"{unused.name}: {unused.hint}"
        for gpu in self.gpus:
            free = f" ({format_bytes(gpu.free_bytes)} free)" if gpu.free_bytes is not None else ""
            driver = f", driver {gpu.driver}" if gpu.driver else ""
            yield gpu.device, f"{gpu.name}, {format_bytes(gpu.memory_bytes)}{free}{driver}"
        yield "auto chooses", f"--device {self.device} --dtype {self.dtype}"
        yield "OS", self.os + (", in a container" if facts.is_container else "") + (", WSL" if facts.is_wsl else "")
        yield "Python", self.python
        yield "slimtune", libraries["slimtune"] or "not installed: run from its source"
        yield "torch", f"{libraries['torch']}, built for {self.torch_build}"
        quota = f", at most {facts.cpu_quota:g} CPUs" if facts.cpu_quota else ""
        yield "CPU", f"{self.cpu.cores} cores, torch uses {self.cpu.threads} threads{quota}"
        yield "CPU flags", ", ".join(self.cpu.flags) or "none for fast matrix products"
        limit = f", at most {format_bytes(facts.memory_limit_bytes)} here" if facts.memory_limit_bytes else ""
        yield "memory", f"{format_bytes(self.memory_free_bytes)} free of {format_bytes(self.memory_bytes)}{limit}"
        if shared := facts.shared_memory_bytes:
            yield "shared memory", format_bytes(shared)
        yield "disk", f"{format_bytes(self.disk_free_bytes)} free in this folder"
        for name, version in [*libraries.items(), *self.programs.items()]:
            if name not in LIBRARIES[:2]:
                yield name, version or "not installed"
        for model, processor in facts.ollama_models:
            yield f"  {model}", f"runs on {processor}"
        if facts.environment.get("HF_HUB_OFFLINE", "0") != "0":
            yield "Hub", "offline: HF_HUB_OFFLINE is set"
        yield "Hub token", f"from {facts.token}" if facts.token else "none: only public models can be read"

    def list_missing_extras(self) -> list[tuple[str, str]]:
        """Return what could be added, and the command that installs it."""
        return [(EXTRAS[e], format_install_command(e)) for e, missing in self.extras.items() if missing and e in EXTRAS]


def make_doctor_report() -> DoctorReport:
    """Look at this machine, and judge it."""
    facts = machine_facts.gather_machine_facts()
    findings = find_machine_problems(facts)
    gpus: list[TorchGpu] = []
    device = dtype = None
    if not facts.torch.error:
        from ..core.models.dtype import pick_device, pick_dtype

        gpus = list_torch_gpus(facts.smi_gpus[0].driver if facts.smi_gpus else None)
        picked = pick_device("auto")
        device, dtype = str(picked), dtype_name(pick_dtype("auto", picked))
    flags = read_linux_cpu_flags_or_none() or [] if device is not None else []
    return DoctorReport(
        os=platform.platform(),
        python=platform.python_version(),
        libraries={name: find_package_version(name) for name in LIBRARIES},
        torch_build=_describe_build(facts.torch),
        cpu=CpuFacts(facts.cores, facts.torch.threads, [flag for flag in CPU_FLAGS if flag in flags]),
        devices=["cpu", *(f"{gpu.device} ({gpu.name})" for gpu in gpus)],
        gpus=gpus,
        unused_gpus=[] if gpus else _list_unused_gpus(facts, findings),
        memory_bytes=facts.memory_bytes,
        memory_free_bytes=facts.memory_free_bytes,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        programs={name: find_package_version(package) or shutil.which(package) for name, package in PROGRAMS.items()},
        extras=_find_missing_packages(),
        device=device,
        dtype=dtype,
        findings=findings,
        facts=facts,
    )


def _describe_build(torch: TorchFacts) -> str:
    if torch.cuda is not None:
        return f"CUDA {torch.cuda}"
    if torch.hip is not None:
        return f"ROCm {torch.hip}"
    if torch.has_mps:
        return "Apple GPUs (MPS)"
    return "Intel GPUs (XPU)" if torch.xpu else "CPUs only"


def _list_unused_gpus(facts: MachineFacts, findings: Sequence[MachineFinding]) -> list[UnusedGpu]:
    """Return the GPUs that are there, but that torch cannot use, and what to do about each."""
    found = [("NVIDIA", gpu.name) for gpu in facts.smi_gpus]
    found += [(gpu.vendor, gpu.name) for gpu in facts.pci_gpus if gpu.vendor != "NVIDIA" or not facts.smi_gpus]
    mend = next((f.commands[0] for f in findings if f.page.startswith(GPU_PAGES)), "torch does not find it")
    hints = {"Intel": "slimtune does not train on Intel's GPUs yet"}
    return [UnusedGpu(name, vendor, hints.get(vendor, mend)) for vendor, name in found]


def _find_missing_packages() -> dict[str, list[str]]:
    """Return the packages that each extra lacks; nothing if slimtune runs from its source."""
    if find_package_version("slimtune") is None:
        return {}
    required = map(Requirement, importlib.metadata.requires("slimtune") or [])
    absent = [(r.name, r.marker) for r in required if r.marker is not None and find_package_version(r.name) is None]
    return {
        extra: [
            name for name, marker in absent if marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
        ]
        for extra in importlib.metadata.metadata("slimtune").get_all("Provides-Extra") or []
    }
