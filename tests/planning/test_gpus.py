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
    if product := PRODUCT.search(text):
        units, clock, flop = map(float, product.groups())
        assert units * clock * flop / 1e3 == pytest.approx(matrix, rel=0.02)
    text = text.replace("1 PFLOP sparse FP4", "1000 TFLOPS")
    if (published := re.search(r"GPU ([\d.]+) TFLOPS", text)) is not None:
        assert float(published[1]) == matrix
    if quotient := re.search(r"([\d.]+) (?:FP4 |FP8 |BF16 )?(?:AI TOPS|TFLOPS|with)[\w ]*? ?/ (\d+)", text):
        assert float(quotient[1]) / float(quotient[2]) == pytest.approx(matrix, rel=0.02)


UNITS = {
    "rtx-3070": (46, 1.725, 512), "rtx-3080-10gb": (68, 1.71, 512), "gtx-1080-ti": (28, 1.582, 256),
    "rtx-2080-ti": (68, 1.545, 512), "arc-b580": (20, 2.67, 2048), "arc-a770-16gb": (32, 2.1, 2048),
    "rtx-4080": (76, 2.505, 512), "rtx-3090": (82, 1.695, 512), "rtx-4090": (128, 2.52, 512),
    "rtx-5090": (170, 2.407, 512), "rtx-a4000": (48, 1.56, 1024),
    "rtx-4000-ada": (48, 2.175, 1024), "rtx-a5000": (64, 1.695, 1024), "rtx-5000-ada": (100, 2.55, 1024),
    "rtx-6000-ada": (142, 2.505, 1024), "rtx-a6000": (84, 1.8, 1024), "p100": (56, 1.303, 128), "t4": (40, 1.59, 1024),
    **dict.fromkeys(("v100-16gb", "v100-32gb"), (80, 1.53, 1024)),
    **dict.fromkeys(("v100-16gb-pcie", "v100-32gb-pcie"), (80, 1.38, 1024)), "a10": (72, 1.695, 1024),
    "l4": (58, 2.04, 1024), **dict.fromkeys([f"a100-{m}" for m in ("40gb", "40gb-pcie", "80gb", "80gb-pcie")],
    (108, 1.41, 2048)), "a40": (84, 1.74, 1024), "l40s": (142, 2.52, 1024), "mi210": (104, 1.7, 1024),
    "mi250x-gcd": (110, 1.7, 1024), "mi300x": (304, 2.1, 2048), "h100-pcie": (114, 1.62, 4096),
    **dict.fromkeys(("h100-sxm", "h200"), (132, 1.83, 4096)),
}  # fmt: skip
"""Multiprocessors, their clock in GHz and FLOP of each in a clock, for rows whose source does not spell them out."""
MEMORY_BUS = {
    (128, 16): "rtx-4060-laptop rtx-4070-laptop", (128, 17): "rtx-4060", (128, 18): "rtx-4060-ti-16gb",
    (128, 28): "rtx-5060-ti-16gb", (160, 18): "rtx-4000-ada", (192, 12.5): "l4",
    (192, 14): "rtx-2060-12gb rtx-3060-laptop", (192, 15): "rtx-3060-12gb", (192, 18): "rtx-4080-laptop",
    (192, 19): "arc-b580", (192, 21): "rtx-4070", (192, 28): "rtx-5070", (256, 10): "t4",
    (256, 14): "rtx-3070 rtx-3070-laptop rtx-3080-laptop rtx-a4000", (256, 17.5): "arc-a770-16gb",
    (256, 18): "rtx-4090-laptop rtx-5000-ada", (256, 20): "rx-9070-xt", (256, 21): "rtx-4070-ti-super",
    (256, 22.4): "rtx-4080", (256, 28): "rtx-5070-ti rtx-5090-laptop", (256, 30): "rtx-5080",
    (320, 19): "rtx-3080-10gb", (320, 20): "rx-7900-xt", (352, 11): "gtx-1080-ti", (352, 14): "rtx-2080-ti",
    (384, 12.5): "a10 a10g",
    (384, 14.5): "a40", (384, 16): "rtx-a5000 rtx-a6000", (384, 18): "l40s", (384, 19): "rtx-3080-12gb",
    (384, 19.5): "rtx-3090", (384, 20): "rx-7900-xtx rtx-6000-ada", (384, 21): "rtx-3090-ti rtx-4090",
    (512, 28): "rtx-5090 rtx-pro-6000", (4096, 1.43): "p100",
    (4096, 1.758): "v100-16gb v100-32gb v100-16gb-pcie v100-32gb-pcie", (4096, 3.2): "mi210 mi250x-gcd",
    (5120, 2.43): "a100-40gb a100-40gb-pcie", (5120, 3.024): "a100-80gb-pcie", (5120, 3.186): "a100-80gb",
    (5120, 3.125): "h100-pcie", (5120, 5.234): "h100-sxm", (6144, 6.25): "h200", (8192, 7.8125): "b200",
    (8192, 5.2): "mi300x", (128, 4.266): "m1-8gb m1-16gb", (128, 7.5): "m4-16gb m4-24gb m4-32gb",
    (256, 6.4): "m2-pro-16gb m2-pro-32gb", (256, 8.533): "m4-pro-48gb dgx-spark",
    (512, 6.4): "m1-max-64gb m3-max-128gb",
    (512, 8.533): "m4-max-128gb", (1024, 6.4): "m2-ultra-192gb m3-ultra-512gb",
}  # fmt: skip
"""Width of the memory's bus in bits, and Gbit/s of each."""
PRODUCT = re.compile(r"(\d+)(?:[- ][A-Za-z -]+\)?;?)? ?x ([\d.]+) GHz x (\d+) FLOP")


def test_every_row_has_its_arithmetic():
    spelled = {g.name for g in all_gpus() if PRODUCT.search(g.source.partition("watts:")[0])}
    stated = {g.name for g in all_gpus() if re.search(r"(TOPS|FP4|FP8) / \d|GPU [\d.]+ TFLOPS", g.source)}
    without = {g.name for g in all_gpus()} - spelled - stated - UNITS.keys()
    assert without == {"a10g"}, "AWS's own card, of which neither clock nor multiprocessors are published"
    a10g = find_gpu("a10g").rates
    assert a10g["bfloat16"] == 2 * a10g["float32"], "as in the GeForce cards of its chip"
    for gpu in all_gpus():
        if gpu.name in UNITS:
            units, clock, flop = UNITS[gpu.name]
            matrix = gpu.rates.get("bfloat16", gpu.rates["float16"]) / 1e12
            assert units * clock * flop / 1e3 == pytest.approx(matrix, rel=0.02), gpu.name


def test_bandwidth_is_width_times_rate():
    buses = {name: bus for bus, names in MEMORY_BUS.items() for name in names.split()}
    assert buses.keys() == {g.name for g in all_gpus()}
    for gpu in all_gpus():
        width, rate = buses[gpu.name]
        # Apple rounds 204.8, 409.6 and 819.2 GB/s down.
        assert width * rate / 8 == pytest.approx(gpu.bandwidth / 1e9, rel=0.025 if gpu.vendor == "apple" else 0.006), (
            gpu.name
        )


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
