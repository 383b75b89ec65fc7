"""Plan and training pick the same device and dtype on every kind of machine and for every card of the table."""

import pytest
import torch
from models_zoo import llama

from slimtune.core.models import dtype as dtypes
from slimtune.core.models.base_config import LoadedBaseConfig
from slimtune.core.models.dtype import pick_device, pick_dtype
from slimtune.errors import UsageError
from slimtune.methods.lora import LoraConfig
from slimtune.planning import gpu_specs as gpus
from slimtune.planning.gpu_specs import GIB, GpuSpec, list_gpu_specs, require_gpu_by_name
from slimtune.planning.plan_request import PlanRequest
from slimtune.planning.planner import describe_gpu_dtype_and_software_limits, estimate_resources
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

BASE = LoadedBaseConfig("tiny", "tiny", llama().config, "")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
CAPABILITY = {"pascal": 6, "volta": 7, "turing": 7, "turing-tu116": 7, "ampere": 8, "ada": 8, "hopper": 9,
              "blackwell": 10, "blackwell-thor": 11}  # fmt: skip


def set_machine(monkeypatch, *, cuda=None, bf16=False, mps=False, macos14=True, xpu=False, cpu_flags=""):
    """Pretend that torch finds a CUDA GPU of this name, an Apple GPU, an Intel GPU or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda is not None))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (16 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: macos14)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
    monkeypatch.setattr(dtypes, "read_linux_cpu_flags_or_none", lambda: cpu_flags.split())


def trained(device="auto"):
    picked = pick_device(device)
    return picked.type, pick_dtype("auto", picked)


def planned(gpu):
    job = PlanRequest(BASE, gpu, LORA).job()
    return job.device, job.dtype


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({}, ("cpu", torch.float32)),
        ({"cpu_flags": "amx_bf16"}, ("cpu", torch.bfloat16)),
        ({"cuda": "NVIDIA GeForce RTX 3090", "bf16": True}, ("cuda", torch.bfloat16)),
        ({"cuda": "Tesla T4"}, ("cuda", torch.float32)),
        ({"cuda": "Quadro RTX 6000"}, ("cuda", torch.float32)),  # in no table
        ({"cuda": "AMD Radeon RX 9070 XT", "bf16": True}, ("cuda", torch.bfloat16)),
        ({"mps": True}, ("mps", torch.bfloat16)),
        ({"mps": True, "macos14": False}, ("mps", torch.float32)),
    ],
    ids=str,
)
def test_this_machine(monkeypatch, machine, expected):
    set_machine(monkeypatch, **machine)
    assert planned(detect_gpu_or_cpu_spec()) == trained() == expected


@pytest.mark.parametrize("gpu", [g for g in list_gpu_specs() if g.trains], ids=lambda g: g.name)
def test_card_of_the_table(monkeypatch, gpu):
    if gpu.vendor == "apple":
        set_machine(monkeypatch, mps=True)
    else:  # torch says yes for every AMD GPU
        set_machine(monkeypatch, cuda=gpu.name, bf16=gpu.vendor == "amd" or CAPABILITY[gpu.architecture] >= 8)
    assert planned(gpu) == trained()


def test_intel_gpus_do_not_train(monkeypatch):
    set_machine(monkeypatch, xpu=True)
    with pytest.warns(UserWarning, match=r"Intel .*CPU"):
        assert trained() == planned(detect_gpu_or_cpu_spec())
    with pytest.raises(UsageError, match="Intel"):
        pick_device("xpu")
    assert (
        [g.name for g in list_gpu_specs() if not g.trains]
        == [g.name for g in list_gpu_specs() if g.vendor == "intel"]
        != []
    )
    with pytest.raises(UsageError, match=r"arc-b580: .*Intel"):
        gpus.require_trainable_gpu(require_gpu_by_name("arc-b580"))


def test_float16_plans_half_the_weights():
    in_fp32, in_fp16 = (
        estimate_resources(PlanRequest(BASE, require_gpu_by_name("t4"), LORA, seq_len=32, dtype=dtype))
        for dtype in ("float32", "float16")
    )
    assert in_fp16.parts["weights"] < 0.6 * in_fp32.parts["weights"]


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (
            "t4",
            ["float32, which takes twice the memory", "8.0 times faster (65 against 8.1 TFLOPS)", "--dtype float16"],
        ),
        ("v100", ["8.0 times faster", "torch for CUDA 12.6"]),
        ("gtx-1080-ti", ["twice the memory. --dtype bfloat16", "torch for CUDA 12.6"]),
        ("m2-pro-32gb", ["m2-pro-32gb emulates bfloat16", "Before macOS 14"]),
        ("rtx-3090", []),
    ],
)
def test_notes_say_what_a_default_costs(gpu, words):
    request = PlanRequest(BASE, require_gpu_by_name(gpu), LORA)
    text = " ".join(describe_gpu_dtype_and_software_limits(request, request.job()))
    assert all(word in text for word in words)
    assert bool(text) == bool(words)


@pytest.mark.slow
def test_advice_names_float16_for_a_float32_run_on_a_card_without_bfloat16():
    small = GpuSpec("small", "memory", "nvidia", "turing", 1, 1, rates={"float32": 1e12, "float16": 8e12})
    changes = [a.change for a in estimate_resources(PlanRequest(BASE, small, LORA, seq_len=32)).advice]
    assert any(change.startswith("--dtype float16") for change in changes)
