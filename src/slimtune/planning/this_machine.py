"""The GPU of this machine, as a plan takes it."""

from dataclasses import replace

import psutil
import torch

from ..core.foundation.device import count_free_memory
from ..core.foundation.distributed import local_world_size
from ..core.models.dtype import pick_device, pick_dtype
from ..errors import UsageError
from .gpu_specs import THIS_MACHINE, GpuSpec, add_gpu_measurement, find_gpus_by_name, require_gpu_by_name
from .measured_speeds import load_machine_measurement


def detect_gpu_or_cpu_spec(device: str = "auto") -> GpuSpec:
    """Return this machine's GPU, or its memory if it has none or the CPU is wanted; `device`: as for `pick_device`.

    What `slimtune bench` measured on it is used, on a CPU only if it computed with as many threads.
    """
    gpu, found = _detect_gpu(device), load_machine_measurement()
    threads = torch.get_num_threads() if gpu.device == "cpu" else 0
    if found is None or (found.name, found.device, found.threads) != (gpu.name, gpu.device, threads):
        return gpu
    return add_gpu_measurement(gpu, found)


def _detect_gpu(device: str) -> GpuSpec:
    picked = pick_device(device)
    bf16 = pick_dtype("auto", picked) is torch.bfloat16
    if picked.type == "cuda":
        name = torch.cuda.get_device_name(picked)
        total = torch.cuda.mem_get_info(picked)[1]
        # A slice of a GPU, or a version with another memory, is not the one of the table.
        known = (gpu for gpu in find_gpus_by_name(name) if abs(gpu.visible - total) < 0.05 * total)
        gpu = next(known, GpuSpec(name, "memory", "", "", total, visible=total, source="this machine"))
        return replace(gpu, auto_bf16=bf16)
    if picked.type == "mps":
        total = psutil.virtual_memory().total
        return GpuSpec(
            "this Mac", "mac", "apple", "", total, total, unified=True, source="this machine", auto_bf16=bf16
        )
    free = count_free_memory(torch.device("cpu"))
    others = f", one of {local_world_size()} processes on it" if local_world_size() > 1 else ""
    return GpuSpec(THIS_MACHINE + others, "cpu", "", "", free, free, source=THIS_MACHINE)


def require_machine_has_gpu(gpu_model: str, device: str = "auto") -> None:
    """Raise UsageError unless this machine has the GPU of the table with this name; `device` as for `pick_device`."""
    wanted, found = require_gpu_by_name(gpu_model), detect_gpu_or_cpu_spec(device)
    if found.name != wanted.name and not (found.vendor == "apple" == wanted.vendor and found.memory == wanted.memory):
        hint = f"leave it out to train here; `slimtune plan --gpu {wanted.name}` plans for that GPU"
        raise UsageError(f"--gpu is {wanted.name}, and this would train on {found.name}", "this machine's GPU", hint)
