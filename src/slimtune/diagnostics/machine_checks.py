"""What is wrong with a machine: each check looks at its facts and yields what it finds, at most one of a kind.

A finding says what is wrong, what that follows from, and the commands that mend it; its page of `slimtune explain` says
more. There is no finding without evidence: a fact that is not known proves nothing.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..core.foundation.formatting import GIB, format_bytes
from ..extras.installed_programs import NO_ANSWER
from .machine_facts import LIMITS, MachineFacts, PciGpu

REINSTALL, WHEELS = "pip install --force-reinstall torch", "https://download.pytorch.org/whl"
SMALL_GPU = 4 * GIB
"""AMD GPUs with less memory are the graphics inside a CPU, which torch's wheels do not support."""
GFX_SIBLINGS = {
    **dict.fromkeys(("gfx1031", "gfx1032", "gfx1034", "gfx1035", "gfx1036"), ("gfx1030", "10.3.0")),
    **dict.fromkeys(("gfx1101", "gfx1102", "gfx1103"), ("gfx1100", "11.0.0")),
}
"""AMD architectures that run the kernels of a sibling, and the HSA_OVERRIDE_GFX_VERSION that says so."""
UNBIND = ["grep -rn vfio /etc/modprobe.d /etc/default/grub", "sudo update-grub && sudo reboot"]
"""After the lines that the first command shows are removed, the GPU is the machine's own again."""
LEAST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""NVIDIA's driver that a major version of CUDA needs at least (on Linux)."""
_APU = re.compile(
    r"Picasso|Renoir|Lucienne|Cezanne|Barcelo|Rembrandt|Raphael|Phoenix|Mendocino|Granite Ridge|Krackan|Hawk Point",
    re.I,
)


@dataclass(frozen=True)
class MachineFinding:
    """What is wrong with a machine."""

    problem: str
    """In one line."""
    evidence: str
    """The fact that it follows from."""
    commands: Sequence[str]
    """That mend it."""
    page: str
    """Of `slimtune explain`."""
    is_fault: bool = True
    """Whether something does not work; else it is only slower, or nearer to a limit, than it could be."""


MachineCheck = Callable[[MachineFacts], Iterator[MachineFinding]]


def find_machine_problems(facts: MachineFacts) -> list[MachineFinding]:
    """Return what is wrong with a machine, faults before warnings."""
    findings = [finding for check in CHECKS for finding in check(facts)]
    return sorted(findings, key=lambda finding: not finding.is_fault)


def _pick_wheel(facts: MachineFacts) -> str:
    """Return the command that installs torch for this machine's NVIDIA GPU, after its driver and architecture."""
    driver = max((int(gpu.driver.partition(".")[0]) for gpu in facts.smi_gpus), default=0)
    capability = max((gpu.capability for gpu in facts.smi_gpus if gpu.capability), default=None)
    if capability is not None and capability < (7, 5):
        index = "cu126"  # the last wheels with kernels for Maxwell, Pascal and Volta
    elif driver >= LEAST_DRIVERS[13]:
        index = "cu130"
    else:
        index = "cu128" if driver >= 570 or (capability is not None and capability >= (10, 0)) else "cu126"
    return _install(index)


def _install(index: str) -> str:
    return f"{REINSTALL} --index-url {WHEELS}/{index}"


def _find_gpu(facts: MachineFacts, vendor: str) -> PciGpu | None:
    """Return a GPU of a vendor that can train: not the graphics inside an AMD CPU."""
    for gpu in facts.pci_gpus:
        is_small = _APU.search(gpu.name) or (gpu.memory_bytes is not None and gpu.memory_bytes < SMALL_GPU)
        if gpu.vendor == vendor and not (vendor == "AMD" and is_small):
            return gpu
    return None


def _has_nvidia(facts: MachineFacts) -> bool:
    return bool(facts.smi_gpus) or _find_gpu(facts, "NVIDIA") is not None


# --- torch and what is built for it ----------------------------------------------------------------------------------


def _check_torch_import(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Torch is installed, but importing it fails."""
    if facts.torch.error:
        command = _install("cu128" if _has_nvidia(facts) else "cpu") + " --no-cache-dir"
        evidence = facts.torch.error.splitlines()[0]
        yield MachineFinding("torch cannot be imported", evidence, [command], "torch-import-fails")


def _check_packages(facts: MachineFacts) -> Iterator[MachineFinding]:
    """A package was built for another version of torch, or bitsandbytes is older than slimtune needs."""
    if facts.conflicts:
        packages = " ".join(dict.fromkeys(conflict.split()[0] for conflict in facts.conflicts))
        commands = [f"pip install --upgrade torch {packages}", "pip check"]
        evidence = f"{'; '.join(facts.conflicts)}; torch is {facts.torch.version}"
        problem = f"{packages}: built for another version of torch"
        yield MachineFinding(problem, evidence, commands, "torch-companion-mismatch")
    found = re.match(r"(\d+)\.(\d+)", facts.packages.get("bitsandbytes", ""))
    if found is not None and (int(found[1]), int(found[2])) < (0, 48):
        evidence = f"bitsandbytes {facts.packages['bitsandbytes']}; 0.48 or newer is needed"
        commands = ['pip install --upgrade "bitsandbytes>=0.48"']
        yield MachineFinding(
            "bitsandbytes is too old for 4-bit and 8-bit bases", evidence, commands, "bitsandbytes-missing"
        )


def _check_mac(facts: MachineFacts) -> Iterator[MachineFinding]:
    """An Intel Python runs on an Apple chip; or torch there has no MPS, or macOS is too old for it."""
    torch = facts.torch
    if facts.is_translated:
        commands = ["arch -arm64 brew install python@3.12", "/opt/homebrew/bin/python3.12 -m venv arm-env"]
        problem, evidence = "Python runs under Rosetta, without the Apple GPU", "sysctl.proc_translated is 1"
        yield MachineFinding(problem, evidence, commands, "mac-rosetta")
    if facts.system != "Darwin" or facts.processor != "arm64" or torch.gpus or torch.error or not torch.version:
        return
    if torch.has_mps:
        evidence = f"torch {torch.version} has MPS, and finds no Apple GPU; macOS is {facts.release or 'not known'}"
        commands = ["softwareupdate --install --all"]
        yield MachineFinding("torch does not find the Apple GPU", evidence, commands, "mps-fallback")
    else:
        problem, commands = "torch is built without MPS: the Apple GPU is not used", [REINSTALL]
        yield MachineFinding(problem, f"torch {torch.version}", commands, "mps-fallback")


def _check_build(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Torch is built for CPUs, or for another vendor than that of the GPU."""
    torch, amd = facts.torch, _find_gpu(facts, "AMD")
    if torch.error or not torch.version or torch.gpus:
        return
    if facts.smi_gpus and not torch.cuda:
        gpu = facts.smi_gpus[0]
        problem = f"torch is built for {'ROCm' if torch.hip else 'CPUs only'}, and the GPU is NVIDIA's"
        evidence = f"torch {torch.version}; nvidia-smi sees {gpu.name} with driver {gpu.driver}"
        page = "wheel-for-other-vendor" if torch.hip else "torch-cpu-build"
        yield MachineFinding(problem, evidence, [_pick_wheel(facts)], page)
    # Systems other than Linux have wheels of AMD's own.
    if amd is not None and not torch.hip and not _has_nvidia(facts) and facts.system == "Linux":
        problem = f"torch is built for {f'CUDA {torch.cuda}' if torch.cuda else 'CPUs only'}, and the GPU is AMD's"
        page = "wheel-for-other-vendor" if torch.cuda else "torch-cpu-build"
        yield MachineFinding(problem, f"torch {torch.version}; {amd.name}", [_install("rocm7.2")], page)


# --- NVIDIA ----------------------------------------------------------------------------------------------------------


def _check_nvidia_smi(facts: MachineFacts) -> Iterator[MachineFinding]:
    """`nvidia-smi` says itself what is wrong."""
    text = facts.nvidia_smi
    said = " ".join(text.split())[:200]
    if "version mismatch" in text:
        problem = "NVIDIA's kernel module and its libraries have different versions"
        yield MachineFinding(problem, said, ["sudo reboot"], "nvidia-driver-mismatch")
    elif any(words in text for words in ("GPU is lost", "fallen off the bus", "device handle", NO_ANSWER)):
        problem = "the NVIDIA GPU does not answer any more"
        yield MachineFinding(problem, said, ['sudo dmesg | grep -iE "xid|nvrm"', "sudo reboot"], "cuda-unknown-error")
    elif "communicate with the NVIDIA driver" in text or "Driver Not Loaded" in text:
        commands = ["sudo modprobe nvidia", "sudo dkms autoinstall && sudo reboot", "mokutil --sb-state"]
        yield MachineFinding("NVIDIA's driver is installed and not loaded", said, commands, "nvidia-driver-missing")
    elif "Unknown Error" in text and facts.is_container:
        problem = "the container has lost its NVIDIA GPU"
        yield MachineFinding(problem, said, ["docker restart CONTAINER"], "container-without-gpu")
    elif "Insufficient Permissions" in text:
        problem = "this user may not use the NVIDIA GPU"
        yield MachineFinding(problem, said, ["sudo usermod -aG video,render $USER"], "device-permission")


def _check_nvidia_driver(facts: MachineFacts) -> Iterator[MachineFinding]:
    """There is an NVIDIA GPU on the bus, and no driver; or a container was started without the GPU."""
    gpu = _find_gpu(facts, "NVIDIA")
    if gpu is None or facts.smi_gpus or facts.nvidia_smi:
        return
    if facts.is_container:
        if not any(re.fullmatch(r"nvidia\d+", name) for name in facts.nvidia_devices):
            problem, evidence = "the container does not get the NVIDIA GPU", f"{gpu.name} is on the PCI bus"
            commands = ["docker run --gpus all IMAGE"]
            yield MachineFinding(problem, f"{evidence}, and /dev has no nvidia0", commands, "container-without-gpu")
    elif gpu.driver != "nvidia":
        commands = ["sudo ubuntu-drivers install && sudo reboot"]
        if gpu.driver == "vfio-pci":
            problem, commands = "the NVIDIA GPU is reserved for a virtual machine", UNBIND
        elif gpu.driver == "nouveau":
            problem = "nouveau holds the NVIDIA GPU, which torch cannot use through it"
        else:
            problem = "there is an NVIDIA GPU, and no driver for it"
        evidence = f"{gpu.name}: kernel driver {gpu.driver or 'none'}"
        yield MachineFinding(problem, evidence, commands, "nvidia-driver-missing")


def _check_driver_age(facts: MachineFacts) -> Iterator[MachineFinding]:
    """NVIDIA's driver is too old for the CUDA that torch is built with, or for the GPU."""
    torch = facts.torch
    if not torch.cuda or not facts.smi_gpus or torch.gpus or facts.system != "Linux":
        return
    driver, needed = facts.smi_gpus[0].driver, LEAST_DRIVERS.get(int(torch.cuda.partition(".")[0]), 0)
    if (major := int(driver.partition(".")[0])) < needed:
        newer_driver = "sudo ubuntu-drivers install && sudo reboot"
        commands = [newer_driver, _pick_wheel(facts)] if major >= LEAST_DRIVERS[12] else [newer_driver]
        problem = f"NVIDIA's driver is too old for this torch ({torch.version})"
        evidence = f"driver {driver}; CUDA {torch.cuda} needs {needed} or newer"
        yield MachineFinding(problem, evidence, commands, "driver-wheel-mismatch")


def _check_architecture(facts: MachineFacts) -> Iterator[MachineFinding]:
    """The wheel has no kernels for the NVIDIA GPU's compute capability."""
    built = {int(found[1]) for name in facts.torch.architectures if (found := re.match(r"(?:sm|compute)_(\d+)", name))}
    ptx = [int(found[1]) for name in facts.torch.architectures if (found := re.match(r"compute_(\d+)", name))]
    for gpu in facts.smi_gpus if facts.torch.cuda and built else ():
        if gpu.capability is None:
            continue
        number = gpu.capability[0] * 10 + gpu.capability[1]
        # A kernel runs on later GPUs of its generation (sm_80 on 8.6), PTX on all later ones.
        fits = any(each // 10 == gpu.capability[0] and each <= number for each in built)
        if not fits and not any(each <= number for each in ptx):
            evidence = f"{gpu.name} is sm_{number}; torch {facts.torch.version}: {' '.join(facts.torch.architectures)}"
            yield MachineFinding(
                f"torch has no kernels for {gpu.name}", evidence, [_pick_wheel(facts)], "no-kernel-image"
            )
            return


def _check_hidden_gpus(facts: MachineFacts) -> Iterator[MachineFinding]:
    """A variable hides the GPUs from torch."""
    names = ("CUDA_VISIBLE_DEVICES",) if facts.torch.cuda else ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    count = len(facts.smi_gpus) if facts.torch.cuda else len(facts.gfx)
    if facts.torch.gpus or not count or not (facts.torch.cuda or facts.torch.hip):
        return
    for name in names:
        value = facts.environment.get(name)
        first = (value or "").partition(",")[0].strip()
        if value is not None and (not first or first == "-1" or (first.isdecimal() and int(first) >= count)):
            problem = f"{name} hides the {'GPU' if count == 1 else 'GPUs'}"
            evidence = f"{name}={value!r}, and there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}"
            yield MachineFinding(problem, evidence, [f"unset {name}"], "cuda-visible-devices")
            return


def _check_mig(facts: MachineFacts) -> Iterator[MachineFinding]:
    """MIG splits a GPU into slices, of which a process gets one, or has made none."""
    for number, gpu in enumerate(facts.smi_gpus):
        if gpu.is_mig and not gpu.slices:
            problem = f"{gpu.name} is in MIG mode and has no slices, so CUDA does not find it"
            commands = [f"sudo nvidia-smi -i {number} -mig 0", f"sudo nvidia-smi mig -i {number} -lgip"]
            evidence = "nvidia-smi: mig.mode.current is Enabled; nvidia-smi -L lists no MIG device"
            yield MachineFinding(problem, evidence, commands, "nvidia-mig")
            return
        if gpu.is_mig and not facts.environment.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
            largest = max(gpu.slices, key=lambda s: int((re.findall(r"(\d+)gb", s.profile) or [0])[0]))
            problem = f"{gpu.name} is split into slices (MIG), and a process gets one of them"
            profiles = ", ".join(s.profile for s in gpu.slices)
            evidence = f"nvidia-smi -L: {profiles}; without CUDA_VISIBLE_DEVICES it is the first"
            # Without --gpu a plan reads the memory of the slice; the table of GPUs has only whole ones.
            plan = "slimtune plan MODEL   # without --gpu: its memory"
            commands = [f"export CUDA_VISIBLE_DEVICES={largest.uuid}", plan]
            yield MachineFinding(problem, evidence, commands, "nvidia-mig", is_fault=False)
            return


def _check_cuda_start(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Driver, wheel and GPU fit, and CUDA does not start all the same."""
    torch = facts.torch
    if not torch.cuda or not facts.smi_gpus or torch.gpus or any(_check_driver_age(facts)):
        return
    if any(_check_hidden_gpus(facts)):
        return
    if facts.system == "Linux" and not facts.is_wsl and "nvidia-uvm" not in facts.nvidia_devices:
        problem, evidence = "CUDA cannot start: /dev/nvidia-uvm is missing", "nvidia-smi sees the GPU"
        commands = ["sudo nvidia-modprobe -u -c=0"]
        yield MachineFinding(problem, f"{evidence}, and there is no /dev/nvidia-uvm", commands, "cuda-unknown-error")
    elif torch.warning:
        commands = ["sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm", "sudo reboot"]
        yield MachineFinding(
            "CUDA does not start", " ".join(torch.warning.split())[:200], commands, "cuda-unknown-error"
        )


def _check_busy_gpu(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Other programs hold more than half of a GPU's memory."""
    for gpu in facts.smi_gpus:
        if not gpu.is_mig and gpu.memory_bytes and gpu.used_bytes > gpu.memory_bytes / 2:
            evidence = f"{format_bytes(gpu.used_bytes)} of {format_bytes(gpu.memory_bytes)} are in use"
            commands = ["nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv", "kill PID"]
            yield MachineFinding(f"other programs hold the memory of {gpu.name}", evidence, commands, "gpu-busy", False)
            return


# --- AMD -------------------------------------------------------------------------------------------------------------


def _check_amd_driver(facts: MachineFacts) -> Iterator[MachineFinding]:
    """There is an AMD GPU, and /dev/kfd is missing: no driver, or a container without it."""
    gpu = _find_gpu(facts, "AMD")
    if gpu is None or facts.has_kfd or facts.system != "Linux" or facts.is_wsl or _has_nvidia(facts):
        return
    evidence = f"{gpu.name}: kernel driver {gpu.driver or 'none'}, no /dev/kfd"
    if facts.is_container:
        commands = ["docker run --device /dev/kfd --device /dev/dri --group-add video IMAGE"]
        yield MachineFinding("the container does not get the AMD GPU", evidence, commands, "container-without-gpu")
    elif gpu.driver == "vfio-pci":
        yield MachineFinding("the AMD GPU is reserved for a virtual machine", evidence, UNBIND, "rocm-not-detected")
    else:
        commands = ["sudo modprobe amdgpu", "sudo amdgpu-install --usecase=rocm && sudo reboot"]
        yield MachineFinding(
            "the driver amdgpu is not loaded, or without compute", evidence, commands, "rocm-not-detected"
        )


def _check_device_permission(facts: MachineFacts) -> Iterator[MachineFinding]:
    """The GPU's device files are there, and this user may not open them."""
    uses_amd = _find_gpu(facts, "AMD") is not None and not _has_nvidia(facts)
    closed = [name for name in facts.unreadable_devices if name.startswith("/dev/nvidia") or uses_amd]
    if closed and not facts.torch.gpus:
        missing = [name for name in ("render", "video") if name not in facts.groups]
        evidence = f"no permission for {', '.join(closed)}; groups: {' '.join(facts.groups) or 'not known'}"
        commands = [f"sudo usermod -aG {','.join(missing or ['render', 'video'])} $USER", "newgrp render"]
        yield MachineFinding("this user may not open the GPU's device files", evidence, commands, "device-permission")


def _check_gfx(facts: MachineFacts) -> Iterator[MachineFinding]:
    """HSA_OVERRIDE_GFX_VERSION is missing, or set where it does harm."""
    if not facts.torch.hip or not facts.gfx:
        return
    gfx, override = facts.gfx[0], facts.environment.get("HSA_OVERRIDE_GFX_VERSION")
    sibling, wanted = GFX_SIBLINGS.get(gfx, ("", ""))
    built = {name.partition(":")[0] for name in facts.torch.architectures}
    export, page = f"export HSA_OVERRIDE_GFX_VERSION={wanted}", "rocm-gfx-override"
    if override and (gfx in built or (wanted and override != wanted)):
        evidence = f"HSA_OVERRIDE_GFX_VERSION={override}, and the GPU is {gfx}"
        command = export if gfx not in built else "unset HSA_OVERRIDE_GFX_VERSION"
        yield MachineFinding("HSA_OVERRIDE_GFX_VERSION names another architecture", evidence, [command], page)
    elif not override and built and gfx not in built:
        evidence = f"the GPU is {gfx}; torch {facts.torch.version}: {' '.join(sorted(built))}"
        command = export if sibling in built else _install("rocm7.2")
        yield MachineFinding(f"torch has no kernels for {gfx}", evidence, [command], page)


def _check_rocminfo(facts: MachineFacts) -> Iterator[MachineFinding]:
    """ROCm's runtime says that it does not start."""
    if facts.rocminfo and facts.has_kfd and not facts.torch.gpus and not facts.unreadable_devices:
        evidence = " ".join(facts.rocminfo.split())[:200]
        yield MachineFinding(
            "ROCm does not start", evidence, ["sudo dmesg | grep -iE 'kfd|amdgpu'"], "rocm-not-detected"
        )


# --- memory, CPUs, limits, disks -------------------------------------------------------------------------------------


def _check_memory(facts: MachineFacts) -> Iterator[MachineFinding]:
    """The container's memory is nearly used up, or that of the machine; or Linux promises no more than it has."""
    limit, used = facts.memory_limit_bytes, facts.memory_limit_used_bytes or 0
    free, total, page = facts.memory_free_bytes, facts.memory_bytes, "system-memory"
    commands = ["docker update --memory 32g --memory-swap 32g CONTAINER"]
    if facts.oom_kills:
        evidence = f"memory.events counts {facts.oom_kills} killed; the limit is {format_bytes(limit or 0)}"
        yield MachineFinding("processes were killed for want of memory", evidence, commands, page)
    elif limit is not None and limit < total and (limit < 4 * GIB or used >= 0.9 * limit):
        evidence = f"limit {format_bytes(limit)}, {format_bytes(used)} used; the machine has {format_bytes(total)}"
        yield MachineFinding("the container has little memory", evidence, commands, page, False)
    if total and free < min(2 * GIB, total / 8):
        evidence = f"{format_bytes(free)} free of {format_bytes(total)}"
        yield MachineFinding("hardly any memory is free", evidence, ["ps aux --sort=-rss | head"], page, False)
    if facts.overcommit == "2":  # CUDA and fork count on promises
        problem, commands = "Linux refuses to overcommit memory", ["sudo sysctl vm.overcommit_memory=0"]
        yield MachineFinding(problem, "vm.overcommit_memory is 2", commands, page, False)


def _check_cpus(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Torch starts more threads than the container has CPUs; or other programs use the CPU that trains."""
    quota, threads = facts.cpu_quota, facts.torch.threads
    if quota is not None and threads is not None and threads > max(quota, 1) * 1.5:
        problem = "torch starts more threads than the container has CPUs"
        evidence = f"a quota of {quota:g} CPUs, {threads} threads"
        commands = [f"export OMP_NUM_THREADS={max(round(quota), 1)}"]
        yield MachineFinding(problem, evidence, commands, "cpu-limit", False)
    # Torch's threads then wait for each other, and spin as they do.
    is_busy = facts.load is not None and facts.load > 1.5 * facts.cores
    if is_busy and not facts.torch.gpus and facts.environment.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        evidence = f"load {facts.load:g} on {facts.cores} cores"
        commands = ["ps aux --sort=-%cpu | head", "export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE"]
        yield MachineFinding(
            "other programs use the processor: training is slow", evidence, commands, "cpu-limit", False
        )


def _check_limits(facts: MachineFacts) -> Iterator[MachineFinding]:
    """A limit of the shell (ulimit) is too low for training."""
    least = {
        "AS": max(facts.memory_bytes, 64 * GIB) if facts.torch.gpus else facts.memory_bytes,  # CUDA reserves addresses
        "DATA": facts.memory_bytes,
        "FSIZE": 100 * GIB,
        "NOFILE": 256,
        "NPROC": 256,
    }
    low = {name: limit for name, limit in facts.limits.items() if limit < least[name]}
    if low:
        in_bytes = {"AS", "DATA", "FSIZE"}
        texts = [f"ulimit {LIMITS[n]} is {format_bytes(v) if n in in_bytes else v}" for n, v in low.items()]
        commands = [f"ulimit {LIMITS[n]} {'unlimited' if n in in_bytes else 4096}" for n in low]
        page = "system-memory" if low.keys() & {"AS", "DATA"} else "open-files"
        yield MachineFinding("a limit of this shell is too low for training", "; ".join(texts), commands, page)


def _check_shared_memory(facts: MachineFacts) -> Iterator[MachineFinding]:
    """/dev/shm is as small as Docker makes it."""
    size = facts.shared_memory_bytes
    if facts.system == "Linux" and size is not None and size <= 64 << 20:
        command = "docker run --shm-size=8g IMAGE" if facts.is_container else "sudo mount -o remount,size=8G /dev/shm"
        problem = "shared memory is too small for data workers, several GPUs and vLLM"
        yield MachineFinding(problem, f"/dev/shm has {format_bytes(size)}", [command], "shared-memory", False)


def _check_disk_space(facts: MachineFacts) -> Iterator[MachineFinding]:
    """A disk that training writes to is nearly full, or has no inodes left."""
    for name, disk in facts.disks.items():
        least = GIB if name == "temporary files" else 5 * GIB
        is_full = disk.free_inodes is not None and disk.free_inodes < 1000
        if disk.free_bytes >= least and not is_full:
            continue
        commands = [f"du -xh --max-depth=2 {disk.path} | sort -h | tail"]
        if name == "the Hub's cache":
            commands = ["hf cache ls", "export HF_HOME=/data/huggingface"]
        elif name == "temporary files":
            commands = ["export TMPDIR=/data/tmp"]
        problem = f"the disk of {name} is {'out of inodes' if is_full else 'nearly full'}"
        evidence = f"{disk.path}: {f'{disk.free_inodes} inodes' if is_full else format_bytes(disk.free_bytes)} free"
        yield MachineFinding(problem, evidence, commands, "disk-full", is_fault=is_full or disk.free_bytes < GIB)
        return


def _check_disk_permission(facts: MachineFacts) -> Iterator[MachineFinding]:
    """The Hub's cache or the folder for temporary files cannot be written."""
    for name, disk in facts.disks.items():
        if not disk.is_writable and name != "this folder":
            variable = "HF_HOME=$HOME/hf" if name == "the Hub's cache" else "TMPDIR=$HOME/tmp"
            commands = [f"sudo chown -R $USER {disk.path}", f"export {variable}"]
            yield MachineFinding(
                f"{name} cannot be written", f"no permission for {disk.path}", commands, "disk-permission"
            )
            return


def _check_triton(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Kernels that Triton compiles cannot be loaded from /tmp, which forbids it; or there is no C compiler for them."""
    if facts.noexec_tmp and facts.torch.gpus and "TMPDIR" not in facts.environment:
        tmp = "$HOME/tmp"
        problem, commands = "compiled kernels cannot be loaded from /tmp", [f"mkdir -p {tmp} && export TMPDIR={tmp}"]
        yield MachineFinding(problem, "/tmp is mounted noexec", commands, "triton-compile")
    if not facts.has_compiler and facts.torch.gpus and facts.system == "Linux":
        problem, evidence = "there is no C compiler: flex attention and --compile cannot be used", "no cc, gcc or clang"
        commands = ["sudo apt install build-essential python3-dev"]
        yield MachineFinding(problem, evidence, commands, "triton-compile", False)


# --- engines and the Hub ---------------------------------------------------------------------------------------------


def _check_ollama(facts: MachineFacts) -> Iterator[MachineFinding]:
    """Ollama runs a model on the CPU, although there is a GPU."""
    has_gpu = _has_nvidia(facts) or _find_gpu(facts, "AMD") is not None or facts.torch.gpus
    for model, processor in facts.ollama_models:
        if "CPU" not in processor or not has_gpu:
            continue
        is_fault = processor == "100% CPU"
        if is_fault:
            problem = f"Ollama runs {model} on the CPU"
            commands = ['journalctl -u ollama | grep -i "inference compute"', "sudo systemctl restart ollama"]
        else:
            problem = f"Ollama runs {model} partly on the CPU: it does not fit"
            commands = [f"ollama stop {model}", "export OLLAMA_CONTEXT_LENGTH=4096"]
        yield MachineFinding(problem, f"ollama ps: {model} {processor}", commands, "ollama-slow", is_fault)
        return


def _check_token(facts: MachineFacts) -> Iterator[MachineFinding]:
    """The Hub's token has spaces or line ends in it, which no token has."""
    if facts.token.startswith("malformed: "):
        source = facts.token.removeprefix("malformed: ")
        commands = ["unset HF_TOKEN", "hf auth login"] if source == "HF_TOKEN" else ["hf auth login"]
        yield MachineFinding("the Hub's token is malformed", f"{source} has spaces or line ends", commands, "hub-token")


CHECKS: tuple[MachineCheck, ...] = (
    _check_torch_import, _check_mac, _check_nvidia_smi, _check_nvidia_driver, _check_build, _check_driver_age,
    _check_architecture, _check_hidden_gpus, _check_mig, _check_cuda_start, _check_amd_driver, _check_device_permission,
    _check_gfx, _check_rocminfo, _check_packages, _check_memory, _check_limits, _check_cpus, _check_shared_memory,
    _check_disk_space, _check_disk_permission, _check_triton, _check_ollama, _check_token, _check_busy_gpu,
)  # fmt: skip
"""All checks, in the order of their findings."""
