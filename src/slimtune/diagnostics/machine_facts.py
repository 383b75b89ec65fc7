"""The facts of a machine: hardware, drivers, torch's build, limits, disks, engines. Nothing here judges them.

`gather_machine_facts` reads files below a root and runs programs; both can be replaced, so that any machine can be
simulated. Nothing is asked of the network, and no secret is kept: of a token only whether it is there and well formed.
"""

import csv
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from ..core.foundation.installed_versions import find_package_version
from ..extras.installed_programs import NO_ANSWER, find_ollama_version, run_and_get_stdout_stderr_or_hang_note

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

APPLE_GPU = "Apple GPU"
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
PACKAGES = ("torch", "transformers", "bitsandbytes", "flash-attn", "triton")
"""Packages whose versions are facts."""
COMPANIONS = ("torchvision", "torchaudio", "vllm", "xformers")
"""Packages that are compiled for one version of torch, and require it."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CC", "TMPDIR",
)  # fmt: skip
"""Environment variables that are facts: none holds a secret."""
LIMITS = {"AS": "-v", "DATA": "-d", "FSIZE": "-f", "NOFILE": "-n", "NPROC": "-u"}
"""Limits of a process, and the flag that `ulimit` has for each."""


@dataclass(frozen=True)
class PciGpu:
    """A GPU on the PCI bus."""

    vendor: str
    """NVIDIA, AMD or Intel."""
    name: str
    """As `lspci` calls it."""
    driver: str = ""
    """The kernel driver that holds it; "": none."""
    memory_bytes: int | None = None
    """Its memory; null: not known."""


@dataclass(frozen=True)
class MigSlice:
    """A slice of an NVIDIA GPU, as MIG makes them."""

    profile: str
    """Its size, such as 3g.20gb."""
    uuid: str
    """The name that CUDA knows it by."""


@dataclass(frozen=True)
class NvidiaSmiGpu:
    """An NVIDIA GPU as `nvidia-smi` sees it."""

    name: str
    """Its name."""
    driver: str
    """Version of NVIDIA's driver."""
    capability: tuple[int, int] | None
    """Compute capability, major and minor; null: not known."""
    memory_bytes: int
    """Its memory; 0: shared with the CPU."""
    used_bytes: int
    """Of that in use."""
    is_mig: bool = False
    """Whether only its slices can be used."""
    slices: tuple[MigSlice, ...] = ()
    """The slices that MIG made."""


@dataclass(frozen=True)
class TorchGpu:
    """A GPU that torch can use."""

    name: str
    """Its name."""
    device: str
    """The device that torch calls it, such as cuda:0."""
    memory_bytes: int
    """Its memory; of an Apple GPU the machine's."""
    free_bytes: int | None
    """Of that free; null: not known."""
    driver: str | None
    """Version of NVIDIA's driver; null: another vendor's."""


@dataclass(frozen=True)
class TorchFacts:
    """torch's build, and the GPUs that it finds."""

    version: str = ""
    """Version of torch; "": not installed."""
    cuda: str | None = None
    """Version of CUDA that it is built for; null: none."""
    hip: str | None = None
    """Version of ROCm's HIP that it is built for; null: none."""
    xpu: str | None = None
    """Version of Intel's GPU runtime that it is built for; null: none."""
    has_mps: bool = False
    """Whether it is built for Apple GPUs."""
    architectures: tuple[str, ...] = ()
    """GPU architectures that it has kernels for."""
    gpus: tuple[str, ...] = ()
    """Names of the GPUs that can train."""
    threads: int | None = None
    """Threads of CPU operations; null: it cannot be imported."""
    warning: str = ""
    """What it warns of when it starts CUDA or HIP."""
    error: str = ""
    """What importing it raised; "": nothing."""


@dataclass(frozen=True)
class DiskFacts:
    """A folder that is written to, and its disk."""

    path: str
    """The folder, or the nearest one above it that exists."""
    free_bytes: int
    """Free on its disk."""
    free_inodes: int | None = None
    """Files that can be created; null: not limited or not known."""
    is_writable: bool = True
    """Whether this user may write there."""


@dataclass(frozen=True)
class MachineFacts:
    """What is known of a machine. Sizes are bytes; None means that a fact is not known, 0 or "" that there is none."""

    system: str = "Linux"
    """Linux, Darwin or Windows."""
    processor: str = "x86_64"
    """Architecture of the CPU."""
    release: str = ""
    """Of the kernel; of macOS its version."""
    is_wsl: bool = False
    """Whether this is Linux inside of Windows."""
    is_container: bool = False
    """Whether this is a container."""
    is_translated: bool = False
    """Whether Rosetta translates this Python from x86."""
    pci_gpus: tuple[PciGpu, ...] = ()
    """GPUs on the PCI bus."""
    nvidia_devices: tuple[str, ...] = ()
    """Device files of NVIDIA GPUs in /dev."""
    unreadable_devices: tuple[str, ...] = ()
    """Device files of GPUs that this user may not open."""
    has_kfd: bool = False
    """Whether /dev/kfd is there, AMD's device for computing."""
    render_nodes: tuple[str, ...] = ()
    """Render nodes in /dev/dri."""
    nvidia_smi: str = ""
    """What `nvidia-smi` says is wrong."""
    smi_gpus: tuple[NvidiaSmiGpu, ...] = ()
    """GPUs that `nvidia-smi` sees."""
    gfx: tuple[str, ...] = ()
    """Architectures of the AMD GPUs that `rocminfo` sees."""
    rocminfo: str = ""
    """What `rocminfo` says is wrong."""
    groups: tuple[str, ...] = ()
    """Groups of this user."""
    torch: TorchFacts = field(default_factory=TorchFacts)
    """torch's build and GPUs."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Version by package, of those that training may use."""
    conflicts: tuple[str, ...] = ()
    """Packages that require another torch, with what they require."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that decide which devices and folders are used."""
    cores: int = 1
    """CPU cores."""
    cpu_quota: float | None = None
    """CPUs that this container may use; null: all."""
    load: float | None = None
    """Processes that wanted to run in the last minute, on average."""
    memory_bytes: int = 0
    """CPU memory."""
    memory_free_bytes: int = 0
    """Of that free."""
    memory_limit_bytes: int | None = None
    """Memory that this container or service may use; null: all."""
    memory_limit_used_bytes: int | None = None
    """Of that in use."""
    oom_kills: int = 0
    """Processes that were killed because of the limit."""
    overcommit: str = ""
    """Linux's vm.overcommit_memory."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Limits of this process, by resource's name; absent: not limited."""
    shared_memory_bytes: int | None = None
    """Size of /dev/shm."""
    disks: Mapping[str, DiskFacts] = field(default_factory=dict)
    """Folders that are written to, by their use."""
    noexec_tmp: bool = False
    """Whether programs in /tmp cannot be run."""
    has_compiler: bool = True
    """Whether there is a C compiler."""
    ollama: str = ""
    """Version of Ollama."""
    ollama_models: tuple[tuple[str, str], ...] = ()
    """Loaded models of Ollama, and the processor of each."""
    token: str = ""
    """Where the Hub's token is from; it begins with "malformed: " if it cannot be one."""


def gather_machine_facts(
    system_root: Path = Path("/"),
    program_runner: Callable[..., str] = run_and_get_stdout_stderr_or_hang_note,
    environment: Mapping[str, str] | None = None,
    **known: object,
) -> MachineFacts:
    """Return the facts of this machine.

    Args:
        system_root: the folder under which /sys, /proc, /dev and /etc are read.
        program_runner: runs a program and returns what it prints; "" if there is none.
        environment: the environment variables; None: those of this process.
        known: facts that are not to be asked, such as `torch`.
    """
    environment = os.environ if environment is None else environment
    system = str(known.get("system", platform.system()))
    smi, smi_gpus = _ask_nvidia_smi(program_runner)
    rocm = program_runner("rocminfo")
    ollama, models = _ask_ollama(program_runner)
    facts: dict[str, object] = {
        "system": system,
        "processor": platform.machine(),
        "release": platform.mac_ver()[0] if system == "Darwin" else platform.release(),
        "is_wsl": "microsoft" in _read(system_root / "proc/version").lower(),
        "is_container": any((system_root / name).exists() for name in (".dockerenv", "run/.containerenv"))
        or "KUBERNETES_SERVICE_HOST" in environment,
        "is_translated": system == "Darwin" and program_runner("sysctl", "-n", "sysctl.proc_translated") == "1",
        "pci_gpus": _list_pci_gpus(system_root, program_runner),
        "nvidia_devices": _list_names(system_root / "dev", "nvidia*"),
        "has_kfd": (system_root / "dev/kfd").exists(),
        "render_nodes": _list_names(system_root / "dev/dri", "renderD*"),
        "unreadable_devices": _list_unreadable(system_root),
        "nvidia_smi": smi,
        "smi_gpus": smi_gpus,
        "rocminfo": rocm if any(w in rocm.lower() for w in ("error", "not loaded", "unable", NO_ANSWER)) else "",
        "gfx": tuple(dict.fromkeys(re.findall(r"^\s*Name:\s+(gfx[0-9a-f]+)\s*$", rocm, re.MULTILINE))),
        "groups": tuple(program_runner("id", "-Gn").split()),
        "packages": {name: version for name in (*PACKAGES, *COMPANIONS) if (version := find_package_version(name))},
        "conflicts": _find_conflicts(),
        "environment": {name: environment[name] for name in VARIABLES if name in environment},
        "cores": os.cpu_count() or 1,
        "load": float(load[1]) if (load := re.match(r"(\d+\.\d+) ", _read(system_root / "proc/loadavg"))) else None,
        "overcommit": _read(system_root / "proc/sys/vm/overcommit_memory"),
        "limits": _read_limits(),
        "shared_memory_bytes": _get_disk_size(system_root / "dev/shm"),
        "disks": _look_at_disks(environment),
        "noexec_tmp": bool(re.search(r"^\S+ /tmp \S+ \S*\bnoexec\b", _read(system_root / "proc/mounts"), re.MULTILINE)),
        "has_compiler": "CC" in environment or any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")),
        "ollama": ollama,
        "ollama_models": models,
        "token": _describe_token(environment),
        **_read_memory(system_root),
        **_read_cgroup(system_root),
    }
    if "torch" not in known:
        facts["torch"] = _ask_torch()
    return MachineFacts(**(facts | known))  # type: ignore[arg-type]


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _list_names(folder: Path, pattern: str) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.glob(pattern)))


# --- GPUs and their drivers ------------------------------------------------------------------------------------------


def _list_pci_gpus(root: Path, run: Callable[..., str]) -> tuple[PciGpu, ...]:
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = VENDORS.get(_read(folder / "vendor"))
        if vendor is None or not _read(folder / "class").startswith("0x03"):  # a display controller
            continue
        driver, memory = folder / "driver", _read(folder / "mem_info_vram_total")
        name = run("lspci", "-s", folder.name).partition(": ")[2].strip() or f"a GPU of {vendor}"
        found.append(
            PciGpu(
                vendor,
                re.sub(r" \(rev \w+\)$", "", name),
                os.path.basename(os.path.realpath(driver)) if driver.exists() else "",
                int(memory) if memory.isdecimal() else None,
            )
        )
    return tuple(found)


def _list_unreadable(root: Path) -> tuple[str, ...]:
    """Return the GPUs' device files that this user may not open."""
    names = [*root.glob("dev/nvidia[0-9]*"), root / "dev/kfd", *root.glob("dev/dri/renderD*")]
    closed = [path for path in names if path.exists() and not os.access(path, os.R_OK | os.W_OK)]
    return tuple(f"/{path.relative_to(root)}" for path in sorted(closed))


def _ask_nvidia_smi(run: Callable[..., str]) -> tuple[str, tuple[NvidiaSmiGpu, ...]]:
    """Return what is wrong in the words of `nvidia-smi`, and the GPUs that it sees."""
    fields = "name,driver_version,compute_cap,memory.total,memory.used"
    text = run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != 5 or not re.match(r"\d+\.", row[1]):
            continue
        major, _, minor = row[2].partition(".")
        total, used = (int(cell) << 20 if cell.isdecimal() else 0 for cell in row[3:])  # [N/A] where memory is shared
        capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
        gpus.append(NvidiaSmiGpu(row[0], row[1], capability, total, used))
    return ("" if gpus else text), _add_slices(gpus, run)


def _add_slices(gpus: list[NvidiaSmiGpu], run: Callable[..., str]) -> tuple[NvidiaSmiGpu, ...]:
    """Return GPUs with the slices that MIG has made of them."""
    # A question of its own: `nvidia-smi` before version 450 has no such field, and then answers none of the others.
    modes = run("nvidia-smi", "--query-gpu=mig.mode.current", "--format=csv,noheader").splitlines() if gpus else []
    if "Enabled" not in modes or len(modes) != len(gpus):
        return tuple(gpus)
    slices: list[list[MigSlice]] = []
    for line in run("nvidia-smi", "-L").splitlines():
        if line.startswith("GPU "):
            slices.append([])
        elif slices and (found := re.match(r" *MIG (\S+) +Device +\d+: \(UUID: (MIG-[\w/-]+)\)", line)):
            slices[-1].append(MigSlice(found[1], found[2]))
    if len(slices) != len(gpus):
        return tuple(gpus)
    return tuple(
        replace(gpu, is_mig=mode == "Enabled", slices=tuple(own))
        for gpu, mode, own in zip(gpus, modes, slices, strict=True)
    )


def _ask_torch() -> TorchFacts:
    """Import torch, which may fail, and return its build and the GPUs it finds that can train."""
    try:
        import torch
    except Exception as error:
        return TorchFacts(version=find_package_version("torch") or "", error=f"{type(error).__name__}: {error}")
    with warnings.catch_warnings(record=True) as caught:  # torch says in a warning why CUDA does not start
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [torch.cuda.get_device_name(i) for i in range(count)]
        architectures = torch.cuda.get_arch_list()
    if torch.backends.mps.is_available():
        names.append(APPLE_GPU)
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        xpu=getattr(torch.version, "xpu", None),
        has_mps=torch.backends.mps.is_built(),
        architectures=tuple(architectures),
        gpus=tuple(names),
        threads=torch.get_num_threads(),
        warning=" ".join(str(w.message) for w in caught if "CUDA" in str(w.message) or "HIP" in str(w.message)),
    )


def list_torch_gpus(nvidia_driver_version: str | None) -> list[TorchGpu]:
    """Return the GPUs that torch can use, with their memory; `nvidia_driver_version` is NVIDIA's. It starts CUDA."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append(TorchGpu(torch.cuda.get_device_name(i), f"cuda:{i}", total, free, nvidia_driver_version))
    if torch.backends.mps.is_available():
        memory = psutil.virtual_memory()
        found.append(TorchGpu(APPLE_GPU, "mps", memory.total, memory.available, None))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            total = torch.xpu.get_device_properties(i).total_memory
            found.append(TorchGpu(torch.xpu.get_device_name(i), f"xpu:{i}", total, None, None))
    return found


def _find_conflicts() -> tuple[str, ...]:
    """Return the packages that require another version of torch than the installed one."""
    torch, found = (find_package_version("torch") or "").partition("+")[0], []
    for package in COMPANIONS:
        try:
            lines = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            try:
                need = Requirement(line)
            except InvalidRequirement:
                continue
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if need.name == "torch" and torch and applies and not need.specifier.contains(torch, prereleases=True):
                found.append(f"{package} {find_package_version(package)} requires torch{need.specifier}")
    return tuple(found)


# --- memory, CPUs, limits and disks ----------------------------------------------------------------------------------


def _read_memory(root: Path) -> dict[str, int]:
    meminfo: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" in meminfo:
        free = meminfo.get("MemAvailable") or meminfo.get("MemFree") or "0"
        return {"memory_bytes": int(meminfo["MemTotal"]) << 10, "memory_free_bytes": int(free) << 10}
    memory = psutil.virtual_memory()  # where there is no /proc
    return {"memory_bytes": memory.total, "memory_free_bytes": memory.available}


def _read_cgroup(root: Path) -> dict[str, object]:
    """Return the limits of this container or service, of control groups version 2 or 1."""
    group = root / "sys/fs/cgroup"
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if not limit:
        limit, used = (_read(group / f"memory/memory.{name}_in_bytes") for name in ("limit", "usage"))
    quota = _read(group / "cpu.max").split()
    if not quota:
        quota = [_read(group / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    numbers = [int(part) for part in quota if part.isdecimal()]
    share = numbers[0] / numbers[1] if len(numbers) == 2 and all(numbers) else None
    kills = re.search(r"^oom_kill (\d+)", _read(group / "memory.events"), re.MULTILINE)
    has_limit = limit.isdecimal() and int(limit) < 1 << 60  # version 1 writes a huge number for none
    return {
        "cpu_quota": share,
        "memory_limit_bytes": int(limit) if has_limit else None,
        "memory_limit_used_bytes": int(used) if has_limit and used.isdecimal() else None,
        "oom_kills": int(kills[1]) if kills else 0,
    }


def _read_limits() -> dict[str, int]:
    if resource is None:
        return {}
    values = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in LIMITS}
    return {name: value for name, value in values.items() if value != resource.RLIM_INFINITY and value >= 0}


def _get_disk_size(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _find_hub_home(environment: Mapping[str, str]) -> str:
    return environment.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")


def _look_at_disks(environment: Mapping[str, str]) -> dict[str, DiskFacts]:
    home = _find_hub_home(environment)
    cache = environment.get("HF_HUB_CACHE") or home
    temporary = environment.get("TMPDIR", tempfile.gettempdir())
    folders = {"this folder": os.getcwd(), "the Hub's cache": cache, "temporary files": temporary}
    found = {}
    for name, folder in folders.items():
        place = Path(folder).absolute()
        place = next(path for path in (place, *place.parents) if path.exists())
        inodes = None
        if hasattr(os, "statvfs"):
            status = os.statvfs(place)
            inodes = status.f_favail if status.f_files else None  # some file systems make inodes as they need them
        found[name] = DiskFacts(str(place), shutil.disk_usage(place).free, inodes, os.access(place, os.W_OK))
    return found


# --- engines and the Hub ---------------------------------------------------------------------------------------------


def _ask_ollama(run: Callable[..., str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return Ollama's version, and each loaded model with its column PROCESSOR."""
    version = find_ollama_version(run)
    if not version:
        return "", ()
    models = []
    for line in run("ollama", "ps").splitlines():
        if processor := re.search(r"\d+%(?:/\d+%)? (?:CPU/GPU|CPU|GPU)", line):
            models.append((line.split()[0], processor[0]))
    return version, tuple(models)


def _describe_token(environment: Mapping[str, str]) -> str:
    """Return where the Hub's token comes from and whether it can be one; "" without a token. Never the token."""
    home = _find_hub_home(environment)
    token, source = environment.get("HF_TOKEN"), "HF_TOKEN"
    if token is None:
        source = environment.get("HF_TOKEN_PATH") or os.path.join(home, "token")
        token = _read(Path(source))
    if not token:
        return ""
    return source if re.fullmatch(r"[!-~]+", token) else f"malformed: {source}"
