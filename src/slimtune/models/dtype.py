"""Which number format the frozen base is held in, and on which device.

"auto" takes bfloat16 where the machine multiplies it in hardware (AVX-512 BF16 or AMX, a GPU with bf16): there it is
faster and half as large. Elsewhere bfloat16 is emulated and slower than float32, so "auto" takes float32.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UsageError, format_names, nearest

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
_CPUINFO = Path("/proc/cpuinfo")


def pick_device(requested: str | torch.device = "auto") -> torch.device:
    """Return the device for `requested`: "auto" (a GPU if there is one), "cpu", "mps", "cuda" or "cuda:N".

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    name = str(requested).strip().lower()
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    known = ("auto", "cpu", "cuda", "mps")
    if kind not in known[1:] or (index and not index.isdigit()):
        raise UsageError(f"unknown device {requested!r}{nearest(kind, known)}", format_names(known))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("the device 'mps' was asked for, but torch finds no Apple GPU", hint="use --device auto")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UsageError(
                f"the device {name!r} was asked for, but torch {torch.__version__} finds {count} CUDA devices",
                hint="use --device auto, or install a torch build for this GPU (`slimtune doctor` shows what is there)",
            )
    return torch.device(name)


def pick_dtype(requested: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> torch.dtype:
    """Return the dtype for `requested` on `device`; "auto" is bfloat16 where the hardware has it, else float32.

    Raises:
        UsageError: the name is unknown.
    """
    if isinstance(requested, torch.dtype):
        return requested
    name = str(requested).strip().lower().removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(
            f"unknown dtype {requested!r}{nearest(name, ['auto', *DTYPES])}", format_names(["auto", *DTYPES])
        )
    return torch.bfloat16 if _has_bf16(torch.device(device)) else torch.float32


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        # Without the second word torch also says yes to GPUs that only emulate it.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


def _cpu_flags() -> set[str]:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # Not Linux. torch >= 2.10 can say; an older one leaves float32, which is right everywhere.
        ask = getattr(torch.cpu, "get_capabilities", None)
        return {name for name, there in (ask() if ask else {}).items() if there is True}
    return set(next((line.split() for line in lines if line.startswith("flags")), []))
