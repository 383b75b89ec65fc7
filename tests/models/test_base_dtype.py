from pathlib import Path

import pytest
import torch

from slimtune.errors import UsageError
from slimtune.models import dtype
from slimtune.models.dtype import pick_device, pick_dtype


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("fpu avx512_bf16 sse", torch.bfloat16),
        ("fpu amx_bf16 amx_tile", torch.bfloat16),
        ("fpu avx512f avx2", torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_on_a_cpu_follows_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, wanted: torch.dtype
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(dtype, "_CPUINFO", info)
    assert pick_dtype("auto", "cpu") is wanted


def test_auto_without_cpuinfo_asks_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "cpu_name": "x"}, raising=False)
    assert pick_dtype("auto", "cpu") is torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert pick_dtype("auto", "cpu") is torch.float32


@pytest.mark.parametrize("there", [True, False])
def test_auto_on_a_gpu_asks_torch(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: there or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: there)
    wanted = torch.bfloat16 if there else torch.float32
    assert pick_dtype("auto", "cuda") is wanted
    assert pick_dtype("auto", torch.device("mps")) is wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("fp32", torch.float32),
        ("BF16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("float64", torch.float64),
        (torch.float16, torch.float16),
    ],
)
def test_explicit_names(name: str | torch.dtype, wanted: torch.dtype) -> None:
    assert pick_dtype(name) is wanted


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'bfloat16'\?") as caught:
        pick_dtype("bfloat61")
    assert caught.value.exit_code == 2
    assert "'fp32'" in str(caught.value)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("cud", "did you mean 'cuda'?"),
        ("cuda:x", "unknown device"),
        ("cuda", "finds 0 CUDA devices"),
        ("cuda:3", "finds 0 CUDA devices"),
        ("mps", "no Apple GPU"),
    ],
)
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        pick_device(name)
    assert caught.value.exit_code == 2
    assert word in str(caught.value)
