"""The table of cards, and names and sizes as people write them."""

import pytest

from slimtune.errors import UsageError
from slimtune.planning import gpus as module
from slimtune.planning.gpus import GIB, Gpu, all_gpus, detect_gpu, find_gpu, gpu_with_memory, parse_bytes


def test_the_table():
    assert len(all_gpus()) >= 50
    assert len({c.name for c in all_gpus()}) == len(all_gpus())
    kinds = {"desktop", "laptop", "workstation", "datacentre", "mac", "mini"}
    assert {c.kind for c in all_gpus()} == kinds
    for card in all_gpus():
        assert card.source, card.name
        assert 0.8 * card.memory <= card.visible <= card.memory
        low, high = card.usable
        assert 0 < low <= high <= card.memory
        assert card.bandwidth > 1e10
        assert card.rates["float32"] > 1e12
        # Matrix units are never slower than the plain ones, and 16-bit formats go together.
        assert card.rates["float16"] >= card.rates["float32"]
        assert card.rates.get("bfloat16", card.rates["float16"]) >= 0.9 * card.rates["float16"]


@pytest.mark.parametrize("name", ["rtx-3090", "RTX 3090", "rtx3090", "NVIDIA GeForce RTX 3090", "3090"])
def test_a_card_however_it_is_spelled(name):
    assert find_gpu(name).name == "rtx-3090"
    assert find_gpu(name).memory == 24 * GIB


def test_an_unknown_card():
    with pytest.raises(UsageError, match=r"no card 'rtx 3091' in the table; did you mean 'rtx-309"):
        find_gpu("rtx 3091")


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("512MiB", GIB // 2)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
    assert gpu_with_memory(text).usable[1] <= size


@pytest.mark.parametrize("text", ["", "0", "-1", "big", "24XB", "0.1B", "1e3"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="no size of memory"):
        parse_bytes(text)


def test_this_machine_is_its_memory_without_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "pick_device", lambda _: module.torch.device("cpu"))
    card = detect_gpu()
    assert card.device == "cpu"
    assert card.usable[0] == card.usable[1] > 0


@pytest.mark.parametrize(("total", "name"), [(24 * GIB, "rtx-3090"), (10 * GIB, "NVIDIA GeForce RTX 3090")])
def test_a_gpu_is_known_by_name_and_memory(monkeypatch, total, name):
    """A slice of a card, or another version of it, is not the card of the table."""
    monkeypatch.setattr(module, "pick_device", lambda _: module.torch.device("cuda"))
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(module.torch.cuda, "mem_get_info", lambda: (total // 2, total))
    assert detect_gpu().name == name
    assert detect_gpu().visible == total


def test_memory_that_is_shared_is_not_all_a_jobs():
    mac = Gpu("a Mac", "mac", "apple", "", 16 * GIB, 16 * GIB, unified=True)
    assert mac.usable[0] < 0.7 * 16 * GIB
    assert mac.device == "mps"
