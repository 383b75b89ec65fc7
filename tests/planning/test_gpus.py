"""The table of GPUs, and names and sizes as people write them."""

import pytest

from slimtune.errors import UsageError
from slimtune.planning import gpus
from slimtune.planning.gpus import GIB, Gpu, all_gpus, detect_gpu, find_gpu, gpu_with_memory


def test_table_is_plausible():
    assert len({c.name for c in all_gpus()}) == len(all_gpus()) >= 50
    assert {c.kind for c in all_gpus()} == {"desktop", "laptop", "workstation", "datacentre", "mac", "mini"}
    for gpu in all_gpus():
        assert gpu.source, gpu.name
        assert 0.8 * gpu.memory <= gpu.visible <= gpu.memory
        assert 0 < gpu.usable[0] <= gpu.usable[1] <= gpu.memory
        assert gpu.bandwidth > 1e10
        # Matrix units are never slower than the plain ones, and 16-bit formats go together.
        assert gpu.rates["float16"] >= gpu.rates["float32"] > 1e12
        assert gpu.rates.get("bfloat16", gpu.rates["float16"]) >= 0.9 * gpu.rates["float16"]


@pytest.mark.parametrize("name", ["rtx-3090", "RTX 3090", "rtx3090", "NVIDIA GeForce RTX 3090", "3090"])
def test_spellings_of_a_name(name):
    assert find_gpu(name).name == "rtx-3090"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("rtx 3090 i", None),
        ("rtx-3091", None),
        ("rtx-5060", "rtx-5060-ti-16gb"),
        ("rtx 4070 super", None),
        ("m2", "m2-pro-16gb"),
        ("m4 maxx", "m4-max-128gb"),
        ("GeForce RTX 5060", "rtx-5060-ti-16gb"),
        ("rtxx 3090", "rtx-3090"),
    ],
)
def test_nearest_card_has_the_same_numbers(name, nearest):
    with pytest.raises(UsageError) as caught:
        find_gpu(name)
    close = f"in the table; did you mean {nearest!r}?" if nearest else "in the table\n"
    assert close in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("512MiB", GIB // 2)],
)
def test_memory_sizes(text, size):
    assert gpu_with_memory(text).memory == size >= gpu_with_memory(text).usable[1]


@pytest.mark.parametrize("text", ["", "0", "-1", "big", "24XB", "0.1B", "1e3"])
def test_bad_memory_size(text):
    with pytest.raises(UsageError, match="no size of memory"):
        gpu_with_memory(text)


def test_detect_cpu():
    gpu = detect_gpu("cpu")
    assert gpu.device == "cpu"
    assert gpu.usable[0] == gpu.usable[1] > 0


@pytest.mark.parametrize(("total", "name"), [(24 * GIB, "rtx-3090"), (10 * GIB, "NVIDIA GeForce RTX 3090")])
def test_detect_gpu_by_name_and_memory(monkeypatch, total, name):
    """A slice of a GPU, or another version of it, is not the GPU of the table."""
    monkeypatch.setattr(gpus, "pick_device", lambda _: gpus.torch.device("cuda"))
    monkeypatch.setattr(gpus, "pick_dtype", lambda *_: gpus.torch.bfloat16)
    monkeypatch.setattr(gpus.torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(gpus.torch.cuda, "mem_get_info", lambda *_: (total // 2, total))
    assert (detect_gpu().name, detect_gpu().visible) == (name, total)


def test_unified_memory_is_not_all_usable():
    mac = Gpu("a Mac", "mac", "apple", "", 16 * GIB, 16 * GIB, unified=True)
    assert mac.usable[0] < 0.7 * 16 * GIB
    assert mac.device == "mps"
