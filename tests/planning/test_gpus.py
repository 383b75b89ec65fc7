"""The table of GPUs, and names and sizes as people write them."""

import datetime
import re

import pytest

from slimtune.errors import UsageError
from slimtune.planning import gpus, this_machine
from slimtune.planning.gpus import GIB, Gpu, all_gpus, find_gpu, gpu_with_memory
from slimtune.planning.this_machine import detect_gpu
from slimtune.planning.throughput import prices


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


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda g: g.name)
def test_row_agrees_with_the_arithmetic_of_its_source(gpu):
    """`24 SM x 2.46 GHz x 512 FLOP`, `1801 AI TOPS / 16`, `153.4 TFLOPS with sparsity / 2`."""
    datetime.date.fromisoformat(gpu.checked)
    matrix = gpu.rates.get("bfloat16", gpu.rates["float16"]) / 1e12
    text = gpu.source.partition("watts:")[0]
    if product := re.search(r"(\d+)(?:[- ][A-Za-z -]+\)?;?)? ?x ([\d.]+) GHz x (\d+) FLOP", text):
        units, clock, flop = map(float, product.groups())
        assert units * clock * flop / 1e3 == pytest.approx(matrix, rel=0.02)
    if quotient := re.search(r"([\d.]+) (?:FP4 |FP8 |BF16 )?(?:AI TOPS|TFLOPS|with)[\w ]*? ?/ (\d+)", text):
        assert float(quotient[1]) / float(quotient[2]) == pytest.approx(matrix, rel=0.02)


PER_FLOAT32 = {
    ("pascal", "desktop"): 1, ("pascal", "datacentre"): 1, ("turing", "desktop"): 4, ("turing", "datacentre"): 8,
    ("volta", "datacentre"): 8, ("ampere", "desktop"): 2, ("ampere", "laptop"): 2, ("ampere", "workstation"): 4,
    ("ada", "desktop"): 2, ("ada", "laptop"): 2, ("ada", "workstation"): 4, ("ada", "datacentre"): 4,
    ("blackwell", "desktop"): 2, ("blackwell", "laptop"): 2, ("blackwell", "workstation"): 4, ("blackwell", "mini"): 4,
    ("rdna3", "desktop"): 2, ("rdna4", "desktop"): 4, ("xe-hpg", "desktop"): 8, ("xe2-hpg", "desktop"): 8,
    ("cdna2", "datacentre"): 8, ("cdna3", "datacentre"): 8,
}  # fmt: skip
"""How many times faster the matrix units of an architecture are in 16 bits than the plain ones in float32."""


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda g: g.name)
def test_rates_keep_the_ratio_of_their_architecture(gpu):
    ratio = 1 if gpu.vendor == "apple" else PER_FLOAT32.get((gpu.architecture, gpu.kind))
    if ratio is not None:
        assert gpu.rates["float16"] == pytest.approx(ratio * gpu.rates["float32"], rel=0.02)
    assert gpu.rates.get("bfloat16", gpu.rates["float16"]) == gpu.rates["float16"]


def test_prices_have_a_date_and_a_source_and_name_a_card():
    for price in prices():
        datetime.date.fromisoformat(price.date)
        assert price.source
        assert price.dollars_per_hour > 0
        assert find_gpu(price.card).name == price.card
    assert all("spot" in p.provider for p in prices() if "deploybase" in p.source)


def test_age_of_figures():
    assert gpus.is_old("2020-01-01")
    assert not gpus.is_old(datetime.date.today().isoformat())
    assert gpus.format_checked("2020-01-01") == "2020-01-01, older than 180 days"


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
    monkeypatch.setattr(this_machine, "pick_device", lambda _: this_machine.torch.device("cuda"))
    monkeypatch.setattr(this_machine, "pick_dtype", lambda *_: this_machine.torch.bfloat16)
    monkeypatch.setattr(this_machine.torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(this_machine.torch.cuda, "mem_get_info", lambda *_: (total // 2, total))
    assert (detect_gpu().name, detect_gpu().visible) == (name, total)


def test_unified_memory_is_not_all_usable():
    mac = Gpu("a Mac", "mac", "apple", "", 16 * GIB, 16 * GIB, unified=True)
    assert mac.usable[0] < 0.7 * 16 * GIB
    assert mac.device == "mps"
