"""Which device a model runs on and which dtype its frozen weights have, for training and planning.

"auto" is bfloat16 if the hardware multiplies it (AVX-512 BF16 or AMX, a GPU with bf16): it is faster then, and half as
large. Elsewhere bfloat16 is emulated and slower than float32, so "auto" is float32. On a Mac it is bfloat16 from macOS
14 on, whatever the chip: a GPU of an M1 or M2 emulates it.

What training and planning must agree about is here (`pick_dtype`) and in `gpu_support.py` alone.
"""

import warnings

import torch

from ...errors import UsageError, format_names, suggest
from ..foundation import distributed
from ..foundation.cpu import read_linux_cpu_flags_or_none
from ..foundation.dtype_names import DTYPE_ABBREVIATIONS, dtype_name
from .gpu_support import NO_XPU

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, full) for short, full in DTYPE_ABBREVIATIONS.items() for name in (full, short)
}
DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(requested: str | torch.device = "auto") -> torch.device:
    """Return the device for "auto" (a GPU if there is one), "cpu", "mps", "cuda" or "cuda:N".

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    name = str(requested).strip().lower()
    mps, gpus = torch.backends.mps.is_available(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if not gpus and not mps and torch.xpu.is_available():
            warnings.warn(f"{NO_XPU}; the CPU trains", stacklevel=2)
        return torch.device("cuda" if gpus else "mps" if mps else "cpu")
    kind, _, index = name.partition(":")
    if kind == "xpu":
        raise UsageError(NO_XPU, "an NVIDIA or AMD GPU, a Mac or a CPU", "use --device cpu")
    if kind not in DEVICES[1:] or (index and not index.isdigit()):
        raise UsageError(f"unknown device {requested!r}{suggest(kind, DEVICES)}", format_names(DEVICES))
    if kind == "mps" and not mps:
        raise UsageError(
            "the device is 'mps', and torch finds no Apple GPU", hint="use --device auto", code="torch-cpu-build"
        )
    if kind == "cuda" and int(index or 0) >= gpus:
        hint = "use --device auto, or install a torch build for this GPU (`slimtune doctor` shows what is there)"
        raise UsageError(f"the device is {name!r}, and torch {torch.__version__} finds {gpus} CUDA devices", hint=hint)
    return torch.device(name)


@distributed.raises_on_all_ranks
def pick_training_device(requested: str) -> torch.device:
    """Return the device of this process: with several processes on GPUs, each has its own."""
    device, gpus = pick_device(requested), torch.cuda.device_count()
    if distributed.world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None or distributed.local_rank() >= gpus:
        raise UsageError(
            f"model.device is {requested} for {distributed.local_world_size()} processes on a machine with {gpus} GPUs",
            "auto or cuda, where each process takes its own GPU, or cpu",
            "--set model.device=auto (or cpu), and at most one process per GPU (--nproc-per-node)",
        )
    torch.cuda.set_device(own := torch.device(f"cuda:{distributed.local_rank()}"))
    return own


def pick_dtype(
    requested: str | torch.dtype = "auto", device: str | torch.device = "cpu", *, has_bf16: bool | None = None
) -> torch.dtype:
    """Return the dtype for a name or for "auto".

    Args:
        requested: a dtype, its name, or "auto".
        device: the device of this machine that "auto" asks about.
        has_bf16: the answer for a device of another machine; None: ask `device`.

    Raises:
        UsageError: the name is unknown.
    """
    if isinstance(requested, torch.dtype):
        return requested
    name = dtype_name(str(requested).strip().lower())
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        names = ["auto", *DTYPES]
        raise UsageError(f"unknown dtype {requested!r}{suggest(name, names)}", format_names(names))
    if has_bf16 is None:
        has_bf16 = _multiplies_bf16(torch.device(device))
    return torch.bfloat16 if has_bf16 else torch.float32


def _multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device of this machine multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        # By default torch also says yes for GPUs that emulate it.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type != "cpu":
        return False
    flags = read_linux_cpu_flags_or_none()
    if flags is None:  # torch knows from 2.10 on; before, float32 is right everywhere
        get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
        flags = [name for name, value in get_capabilities().items() if value is True]
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
