import pytest
import torch

from slimtune.core.foundation import cpu
from slimtune.core.models.dtype import pick_device, pick_dtype
from slimtune.errors import UsageError


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512_bf16 sse", torch.bfloat16),
        ("fpu amx_bf16 amx_tile", torch.bfloat16),
        ("fpu avx512f avx2", torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_on_cpu(tmp_path, monkeypatch, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    assert pick_dtype("auto", "cpu") is expected


def test_auto_without_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "cpu_name": "x"}, raising=False)
    assert pick_dtype("auto", "cpu") is torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert pick_dtype("auto", "cpu") is torch.float32


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_gpu(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: has_bf16)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert pick_dtype("auto", "cuda") is pick_dtype("auto", torch.device("mps")) is expected


def test_dtype_names():
    assert pick_dtype("fp32") is torch.float32
    assert pick_dtype("BF16") is torch.bfloat16
    assert pick_dtype("torch.float16") is pick_dtype(torch.float16) is torch.float16
    with pytest.raises(UsageError, match="'bfloat16'"):
        pick_dtype("bfloat61")


def set_devices(monkeypatch, *, gpus, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_devices(monkeypatch):
    for gpus, mps, best in ((0, False, "cpu"), (0, True, "mps"), (2, True, "cuda")):
        set_devices(monkeypatch, gpus=gpus, mps=mps)
        assert pick_device("auto") == torch.device(best)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cud", "did you mean 'cuda'?"),
        ("cuda:x", "unknown device"),
        ("cuda", "finds 0 CUDA devices"),
        ("mps", "no Apple GPU"),
    ],
)
def test_missing_devices(monkeypatch, name, message):
    set_devices(monkeypatch, gpus=0, mps=False)
    with pytest.raises(UsageError) as caught:
        pick_device(name)
    assert message in str(caught.value)
