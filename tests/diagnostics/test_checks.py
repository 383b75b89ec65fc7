"""Simulated machines: a fake root (/sys, /proc, /dev) and fake outputs of programs become facts, which are checked.

Each fault is found, with the command that mends it and a page that exists; sound machines have no finding.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from slimtune.diagnostics import machine_facts as facts
from slimtune.diagnostics.knowledge import load_error_pages
from slimtune.diagnostics.machine_checks import find_machine_problems
from slimtune.diagnostics.machine_facts import DiskFacts, MachineFacts, TorchFacts, gather_machine_facts
from slimtune.extras import installed_programs

GIB = 1 << 30
NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
CPU = TorchFacts("2.9.1+cpu", threads=8)
CU128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
ROCM = ("gfx900", "gfx906", "gfx908", "gfx90a", "gfx1030", "gfx1100", "gfx1101", "gfx1201")
DISKS = {
    "this folder": DiskFacts("/home/me", 500 * GIB, 10**7),
    "the Hub's cache": DiskFacts("/home/me/.cache", 500 * GIB, 10**7),
    "temporary files": DiskFacts("/tmp", 50 * GIB, 10**6),
}
RTX_4090 = "NVIDIA GeForce RTX 4090, 580.95.05, 8.9, 24564, 310"
RTX_5090 = "NVIDIA GeForce RTX 5090, 580.95.05, 12.0, 32607, 2"
GTX_1080 = "NVIDIA GeForce GTX 1080 Ti, 580.95.05, 6.1, 11264, 4"
OLLAMA = {"ollama --version": "ollama version is 0.12.3"}
OLLAMA_PS = "NAME            ID    SIZE     PROCESSOR          CONTEXT  UNTIL\n"
XTX = ("AMD/ATI Navi 31 [Radeon RX 7900 XTX]", AMD, "amdgpu")


def cuda(version="2.9.1+cu128", *gpus, archs=CU128, warning="") -> TorchFacts:
    number = version.partition("cu")[2]
    return TorchFacts(version, f"{number[:2]}.{number[2:]}", architectures=archs, gpus=gpus, threads=8, warning=warning)


def rocm(*gpus, archs=ROCM) -> TorchFacts:
    return TorchFacts("2.9.1+rocm6.4", hip="6.4.4", architectures=archs, gpus=gpus, threads=8)


def rocminfo(gfx: str) -> str:
    return f"ROCk module is loaded\n  Name:                    {gfx}\n  Marketing Name:          AMD Radeon\n"


class Machine:
    """Builds the facts of a machine below `root`; `pci` has (name, vendor, kernel driver) of each GPU."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, pci=(), dev=(), smi="", programs=(), files=(), environment=(), **known) -> MachineFacts:
        lspci = {}
        for number, (name, vendor, driver, *memory) in enumerate(pci):
            address = f"0000:0{number}:00.0"
            folder = self.root / "sys/bus/pci/devices" / address
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "class").write_text("0x030000\n")
            if memory:
                (folder / "mem_info_vram_total").write_text(str(memory[0]))
            if driver:
                (self.root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
                (folder / "driver").symlink_to(self.root / "drivers" / driver)
            lspci[address] = f"{address[5:]} VGA compatible controller: {name} (rev a1)"
        contents = {
            "proc/version": "Linux version 6.8.0",
            "proc/meminfo": "MemTotal: 65000000 kB\nMemAvailable: 50000000 kB",
        }
        for name, text in {**dict.fromkeys((f"dev/{n}" for n in dev), ""), **contents, **dict(files)}.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        outputs = {"id": "me sudo render video", **dict(programs)}

        def run(*command: str) -> str:
            if command[0] == "lspci":
                return lspci.get(command[-1], "")
            outputs["nvidia-smi"] = smi
            return outputs.get(" ".join(command[:2])) or outputs.get(command[0], "")

        defaults = {
            "system": "Linux", "processor": "x86_64", "torch": CPU, "packages": {}, "conflicts": (), "cores": 16,
            "limits": {"NOFILE": 1024}, "disks": DISKS, "shared_memory_bytes": 16 * GIB, "noexec_tmp": False,
            "has_compiler": True, "token": "", "unreadable_devices": (),
        }  # fmt: skip
        return gather_machine_facts(self.root, run, dict(environment), **(defaults | known))


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


LINUX_NVIDIA = {
    "pci": [("NVIDIA Corporation AD102 [GeForce RTX 4090]", NVIDIA, "nvidia")],
    "dev": ("nvidia0", "nvidia-uvm"),
}
DOCKER = {".dockerenv": ""}
HEALTHY = {**LINUX_NVIDIA, "smi": RTX_4090, "torch": cuda("2.9.1+cu128", "RTX 4090")}
MIG = {
    **LINUX_NVIDIA,
    "smi": "NVIDIA A100-SXM4-40GB, 550.90.07, 8.0, 40960, 39000",
    "torch": cuda("2.9.1+cu126", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"),
    "programs": {
        "nvidia-smi --query-gpu=mig.mode.current": "Enabled",
        "nvidia-smi -L": "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0)\n"
        "  MIG 1g.5gb      Device  0: (UUID: MIG-a4d23e5c-1e2f-5c7a-9d0b-3f6a7b8c9d0e)\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)\n"
        "  MIG 1g.5gb+me   Device  2: (UUID: MIG-GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0/9/0)",
    },
}
RADEON = {"pci": [XTX], "dev": ("kfd", "dri/renderD128"), "programs": {"rocminfo": rocminfo("gfx1100")}}
FAULTS = {
    "no NVIDIA driver": ({"pci": [("NVIDIA AD102", NVIDIA, "")]}, "nvidia-driver-missing", "ubuntu-drivers install"),
    "nouveau": ({"pci": [("NVIDIA AD102", NVIDIA, "nouveau")]}, "nvidia-driver-missing", "ubuntu-drivers install"),
    "NVIDIA for a virtual machine": (
        {"pci": [("NVIDIA AD102", NVIDIA, "vfio-pci")]},
        "nvidia-driver-missing",
        "update-grub",
    ),
    "driver not loaded": (
        {**LINUX_NVIDIA, "smi": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."},
        "nvidia-driver-missing",
        "sudo modprobe nvidia",
    ),
    "driver and library differ": (
        {**LINUX_NVIDIA, "smi": "Failed to initialize NVML: Driver/library version mismatch"},
        "nvidia-driver-mismatch",
        "sudo reboot",
    ),
    "lost GPU": (
        {**LINUX_NVIDIA, "smi": "Unable to determine the device handle for GPU0000:01:00.0: Unknown Error"},
        "cuda-unknown-error",
        "sudo reboot",
    ),
    "hanging nvidia-smi": (
        {**LINUX_NVIDIA, "smi": "nvidia-smi gave no answer in 10 s"},
        "cuda-unknown-error",
        "sudo reboot",
    ),
    "CPU wheel, NVIDIA": ({**HEALTHY, "torch": CPU}, "torch-cpu-build", "whl/cu130"),
    "ROCm wheel, NVIDIA": ({**HEALTHY, "torch": rocm()}, "wheel-for-other-vendor", "whl/cu130"),
    "CPU wheel, old driver": (
        {**HEALTHY, "smi": "NVIDIA A10, 535.104.05, 8.6, 23028, 4", "torch": CPU},
        "torch-cpu-build",
        "whl/cu126",
    ),
    "CPU wheel, Pascal": ({**HEALTHY, "smi": GTX_1080, "torch": CPU}, "torch-cpu-build", "whl/cu126"),
    "CPU wheel, AMD": ({**RADEON, "torch": CPU}, "torch-cpu-build", "whl/rocm"),
    "CUDA wheel, AMD": ({**RADEON, "torch": cuda()}, "wheel-for-other-vendor", "whl/rocm"),
    "driver too old for CUDA 13": (
        {**HEALTHY, "smi": "NVIDIA L4, 550.90.07, 8.9, 23034, 4", "torch": cuda("2.9.1+cu130")},
        "driver-wheel-mismatch",
        "whl/cu126",
    ),
    "driver too old for CUDA 12": (
        {**HEALTHY, "smi": "Tesla T4, 470.82.01, 7.5, 15109, 4"} | {"torch": cuda()},
        "driver-wheel-mismatch",
        "ubuntu-drivers",
    ),
    "no kernels for Blackwell": (
        {**HEALTHY, "smi": RTX_5090, "torch": cuda("2.6.0+cu126", "RTX 5090", archs=CU126)},
        "no-kernel-image",
        "whl/cu130",
    ),
    "no kernels for Pascal": (
        {**HEALTHY, "smi": "Tesla P40, 580.95, 6.1, 24576, 4", "torch": cuda("2.9.1+cu128", "Tesla P40")},
        "no-kernel-image",
        "whl/cu126",
    ),
    "GPUs hidden": (
        {**HEALTHY, "torch": cuda(), "environment": {"CUDA_VISIBLE_DEVICES": ""}},
        "cuda-visible-devices",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "GPU number too high": (
        {**HEALTHY, "torch": cuda(), "environment": {"CUDA_VISIBLE_DEVICES": "1"}},
        "cuda-visible-devices",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "no nvidia-uvm": ({**HEALTHY, "dev": ("nvidia0",), "torch": cuda()}, "cuda-unknown-error", "nvidia-modprobe -u"),
    "CUDA does not start": (
        {**HEALTHY, "torch": cuda(warning="CUDA initialization: CUDA unknown error")},
        "cuda-unknown-error",
        "rmmod nvidia_uvm",
    ),
    "busy GPU": ({**HEALTHY, "smi": "NVIDIA GeForce RTX 4090, 580.95.05, 8.9, 24564, 20000"}, "gpu-busy", "kill PID"),
    "MIG, no slice chosen": (MIG, "nvidia-mig", "CUDA_VISIBLE_DEVICES=MIG-c7384736-a75d-5afc-978f-d2f1294409fd"),
    "MIG without slices": (
        {**MIG, "programs": {**MIG["programs"], "nvidia-smi -L": "GPU 0: NVIDIA A100 (UUID: GPU-e86cb44c)"}},
        "nvidia-mig",
        "nvidia-smi -i 0 -mig 0",
    ),
    "container without NVIDIA": (
        {"pci": LINUX_NVIDIA["pci"], "files": DOCKER, "torch": cuda()},
        "container-without-gpu",
        "docker run --gpus all",
    ),
    "pod without NVIDIA": (
        {"pci": LINUX_NVIDIA["pci"], "environment": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "torch": cuda()},
        "container-without-gpu",
        "docker run --gpus all",
    ),
    "container lost NVIDIA": (
        {**LINUX_NVIDIA, "files": DOCKER, "smi": "Failed to initialize NVML: Unknown Error", "torch": cuda()},
        "container-without-gpu",
        "docker restart",
    ),
    "container without AMD": (
        {"pci": [XTX], "files": DOCKER, "torch": rocm()},
        "container-without-gpu",
        "--device /dev/kfd",
    ),
    "no amdgpu": ({"pci": [(*XTX[:2], "")], "torch": rocm()}, "rocm-not-detected", "sudo modprobe amdgpu"),
    "not in the group render": (
        {
            **RADEON,
            "torch": rocm(),
            "programs": {"id": "me sudo"},
            "unreadable_devices": ("/dev/kfd", "/dev/dri/renderD128"),
        },
        "device-permission",
        "usermod -aG render,video",
    ),
    "sibling without override": (
        {**RADEON, "torch": rocm("AMD Radeon RX 6700 XT"), "programs": {"rocminfo": rocminfo("gfx1031")}},
        "rocm-gfx-override",
        "HSA_OVERRIDE_GFX_VERSION=10.3.0",
    ),
    "override of another generation": (
        {**RADEON, "torch": rocm("RX 7900 XTX"), "environment": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}},
        "rocm-gfx-override",
        "unset HSA_OVERRIDE_GFX_VERSION",
    ),
    "ROCm does not start": (
        {
            **RADEON,
            "torch": rocm(),
            "programs": {"rocminfo": "hsa api call failure: HSA_STATUS_ERROR_OUT_OF_RESOURCES"},
        },
        "rocm-not-detected",
        "dmesg",
    ),
    "torch broken": (
        {"torch": TorchFacts("2.9.1", error="ImportError: libcudnn.so.9: cannot open shared object file")},
        "torch-import-fails",
        "--no-cache-dir",
    ),
    "torchvision of another torch": (
        {"conflicts": ("torchvision 0.20.1 requires torch==2.5.1",)},
        "torch-companion-mismatch",
        "pip install --upgrade torch torchvision",
    ),
    "old bitsandbytes": ({"packages": {"bitsandbytes": "0.41.1"}}, "bitsandbytes-missing", "bitsandbytes>=0.48"),
    "Rosetta": ({"system": "Darwin", "programs": {"sysctl -n": "1"}}, "mac-rosetta", "arch -arm64"),
    "Mac without MPS": (
        {"system": "Darwin", "processor": "arm64", "torch": CPU},
        "mps-fallback",
        "pip install --force-reinstall torch",
    ),
    "container kills": (
        {
            "files": {
                **DOCKER,
                "sys/fs/cgroup/memory.max": str(8 * GIB),
                "sys/fs/cgroup/memory.events": "low 0\noom_kill 3",
            }
        },
        "system-memory",
        "docker update --memory",
    ),
    "small container": (
        {"files": {**DOCKER, "sys/fs/cgroup/memory.max": str(2 * GIB)}},
        "system-memory",
        "docker update --memory",
    ),
    "small container, version 1": (
        {"files": {**DOCKER, "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB)}},
        "system-memory",
        "docker update",
    ),
    "CPU quota": ({"files": {"sys/fs/cgroup/cpu.max": "200000 100000"}}, "cpu-limit", "OMP_NUM_THREADS=2"),
    "memory used up": (
        {"files": {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 400000 kB"}},
        "system-memory",
        "ps aux",
    ),
    "no overcommit": ({"files": {"proc/sys/vm/overcommit_memory": "2\n"}}, "system-memory", "vm.overcommit_memory=0"),
    "ulimit of memory": ({"limits": {"AS": 8 * GIB}}, "system-memory", "ulimit -v unlimited"),
    "ulimit of files": ({"limits": {"NOFILE": 64}}, "open-files", "ulimit -n 4096"),
    "ulimit of file size": ({"limits": {"FSIZE": GIB}}, "open-files", "ulimit -f unlimited"),
    "shared memory": ({"files": DOCKER, "shared_memory_bytes": 64 << 20}, "shared-memory", "--shm-size"),
    "disk full": ({"disks": {**DISKS, "this folder": DiskFacts("/home/me", GIB // 2)}}, "disk-full", "du -xh"),
    "no inodes": ({"disks": {**DISKS, "this folder": DiskFacts("/home/me", 90 * GIB, 12)}}, "disk-full", "du -xh"),
    "cache full": ({"disks": {**DISKS, "the Hub's cache": DiskFacts("/c", 2 * GIB)}}, "disk-full", "HF_HOME="),
    "cache of root": (
        {"disks": {**DISKS, "the Hub's cache": DiskFacts("/c", 90 * GIB, None, False)}},
        "disk-permission",
        "chown -R $USER /c",
    ),
    "noexec": ({**HEALTHY, "noexec_tmp": True}, "triton-compile", "TMPDIR=$HOME/tmp"),
    "no compiler": ({**HEALTHY, "has_compiler": False}, "triton-compile", "build-essential"),
    "Ollama on the CPU": (
        {
            **HEALTHY,
            "programs": {
                **OLLAMA,
                "ollama ps": OLLAMA_PS + "llama3.1:8b  4218  6.2 GB  100% CPU  4096  4 minutes from now",
            },
        },
        "ollama-slow",
        "systemctl restart ollama",
    ),
    "Ollama half on the CPU": (
        {
            **HEALTHY,
            "programs": {
                **OLLAMA,
                "ollama ps": OLLAMA_PS + "llama3.3:70b  a  44 GB  48%/52% CPU/GPU  4096  4 minutes from now",
            },
        },
        "ollama-slow",
        "ollama stop llama3.3:70b",
    ),
    "busy CPU": ({"files": {"proc/loadavg": "30.02 9.1 7.0 3/412 991"}}, "cpu-limit", "OMP_WAIT_POLICY=PASSIVE"),
    "token with a line end": ({"token": "malformed: HF_TOKEN"}, "hub-token", "unset HF_TOKEN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_the_command_that_mends_it(name, machine):
    spec, page, command = FAULTS[name]
    (finding,) = find_machine_problems(machine(**spec))
    assert finding.page == page, finding
    assert any(command in line for line in finding.commands), finding
    assert finding.page in load_error_pages()
    assert finding.evidence


SOUND = {
    "desktop": HEALTHY,
    "laptop with two GPUs": {
        **HEALTHY,
        "pci": [*LINUX_NVIDIA["pci"], ("AMD/ATI Cezanne [Radeon Vega]", AMD, "amdgpu", GIB // 2)],
        "dev": ("nvidia0", "nvidia-uvm", "kfd", "dri/renderD128"),
    },
    "server in a container": {
        **HEALTHY,
        "smi": "\n".join(["NVIDIA H100 80GB HBM3, 570.124.06, 9.0, 81559, 1"] * 8),
        "torch": replace(cuda("2.9.1+cu128", *["H100"] * 8), threads=16),
        "files": {
            **DOCKER,
            "sys/fs/cgroup/memory.max": str(50 * GIB),
            "sys/fs/cgroup/memory.current": str(GIB),
            "sys/fs/cgroup/cpu.max": "1600000 100000",
        },
    },
    "Mac": {
        "system": "Darwin",
        "processor": "arm64",
        "torch": TorchFacts("2.9.1", has_mps=True, gpus=("Apple GPU",)),
        "limits": {"NOFILE": 256},
        "shared_memory_bytes": None,
    },
    "cloud CPU": {
        "pci": [("Cirrus Logic GD 5446", "0x1013", "cirrus")],
        "files": {"sys/fs/cgroup/cpu.max": "max 100000"},
    },
    "Radeon": {**RADEON, "torch": rocm("AMD Radeon RX 7900 XTX")},
    "Radeon with its override": {
        **RADEON,
        "torch": rocm("AMD Radeon RX 6700 XT"),
        "programs": {"rocminfo": rocminfo("gfx1031")},
        "environment": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"},
    },
    "WSL": {
        "pci": [("Microsoft Basic Render Driver", "0x1414", "")],
        "dev": ("dxg",),
        "smi": RTX_4090,
        "torch": cuda("2.9.1+cu128", "RTX 4090"),
        "files": {"proc/version": "Linux 5.15-microsoft-standard-WSL2"},
    },
    "DGX Spark": {
        **HEALTHY,
        "processor": "aarch64",
        "smi": "NVIDIA GB10, 580.95.05, 12.1, [N/A], [N/A]",
        "torch": cuda("2.9.1+cu130", "GB10", archs=("sm_80", "sm_90", "sm_100", "sm_110", "sm_120")),
    },
    "AMD laptop": {
        "pci": [("AMD/ATI Rembrandt [Radeon 680M]", AMD, "amdgpu", GIB // 2)],
        "dev": ("kfd", "dri/renderD128"),
        "programs": {"rocminfo": rocminfo("gfx1035"), "id": "me"},
        "unreadable_devices": ("/dev/kfd",),
    },
    "Windows laptop": {"system": "Windows", "limits": {}, "shared_memory_bytes": None, "has_compiler": False},
    "Intel graphics": {"pci": [("Intel Corporation TigerLake-LP GT2", INTEL, "i915")], "dev": ("dri/renderD128",)},
    "Pascal with its wheel": {**HEALTHY, "smi": GTX_1080, "torch": cuda("2.9.1+cu126", "GTX 1080 Ti", archs=CU126)},
    "Ollama on a machine without a GPU": {
        "programs": {**OLLAMA, "ollama ps": OLLAMA_PS + "qwen3:4b  1  3 GB  100% CPU  4096  now"}
    },
    "half a quota": {"files": {"sys/fs/cgroup/cpu.max": "100000", "sys/fs/cgroup/memory.max": "-1"}},
    "MIG, a slice chosen": {**MIG, "environment": {"CUDA_VISIBLE_DEVICES": "MIG-c7384736-a75d-5afc-978f-d2f1294409fd"}},
    "busy CPU, but a GPU": {**HEALTHY, "files": {"proc/loadavg": "30.02 9.1 7.0 3/412 991"}},
    "second GPU chosen": {**HEALTHY, "smi": f"{RTX_4090}\n{RTX_4090}", "environment": {"CUDA_VISIBLE_DEVICES": "1"}},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_machine_has_no_finding(name, machine):
    assert find_machine_problems(machine(**SOUND[name])) == []


def test_counts():
    assert len(FAULTS) >= 25
    assert len(SOUND) >= 10
    pages = {page for _, page, _ in FAULTS.values()}
    assert pages <= load_error_pages().keys()


def test_nothing_is_found_where_nothing_is_known():
    assert find_machine_problems(MachineFacts()) == []


def test_a_token_never_becomes_a_fact(tmp_path):
    secret = "hf_" + "s3cret" * 5
    for token in (secret, f"{secret}\n"):
        facts = gather_machine_facts(tmp_path, lambda *_: "", {"HF_TOKEN": token}, torch=CPU, system="Linux")
        assert secret not in repr(facts)
        assert facts.token == ("HF_TOKEN" if token == secret else "malformed: HF_TOKEN")


def test_faults_come_before_warnings(machine):
    spec = {"limits": {"NOFILE": 64}, "shared_memory_bytes": 1 << 20, "conflicts": ("vllm 0.11 requires torch==2.8.0",)}
    kinds = [finding.is_fault for finding in find_machine_problems(machine(**spec))]
    assert kinds == [True, True, False]
    assert all(a >= b for a, b in itertools.pairwise(kinds))


def test_program_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(installed_programs, "PATIENCE", 0.1)
    assert "0.1 s" in facts.run_and_get_stdout_stderr_or_hang_note("sleep", "60")
    assert facts.run_and_get_stdout_stderr_or_hang_note("no-such-program") == ""
