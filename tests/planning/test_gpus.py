"""The table of GPUs, and names and sizes as people write them."""

import csv
import datetime
import re
from importlib.resources import files

import pytest

from slimtune.errors import UsageError
from slimtune.planning import gpu_specs as gpus
from slimtune.planning import this_machine
from slimtune.planning.gpu_specs import GIB, GpuSpec, list_gpu_specs, make_gpu_with_memory, require_gpu_by_name
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

TABLE = list(csv.DictReader((files("slimtune.planning") / "gpus.csv").read_text().splitlines()))


def test_table_is_plausible():
    assert len({c.name for c in list_gpu_specs()}) == len(list_gpu_specs()) >= 150
    assert {c.kind for c in list_gpu_specs()} == {"desktop", "laptop", "workstation", "datacentre", "mac", "mini"}
    for gpu in list_gpu_specs():
        assert gpu.source, gpu.name
        assert 0.75 * gpu.memory <= gpu.visible <= gpu.memory
        assert 0 < gpu.usable.low <= gpu.usable.high <= gpu.memory
        assert gpu.bandwidth > 1e10
        # Matrix units are never slower than the plain ones, and 16-bit formats go together.
        assert gpu.rates["float16"] >= gpu.rates["float32"] > 1e12
        assert gpu.rates.get("bfloat16", gpu.rates["float16"]) >= 0.9 * gpu.rates["float16"]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: r["name"])
def test_row_agrees_with_its_arithmetic(row):
    """Units × clock × FLOP of a clock is the rate, width × rate of the bus the bandwidth; so are sums in the source."""
    datetime.date.fromisoformat(row["checked"])
    datetime.date.fromisoformat(f"{row['released']}-01")
    matrix = float(row["fp16_tflops"])
    # AWS's own card, of which neither clock nor multiprocessors are published, and one that is held below its units.
    assert row["units"] or re.search(r"TOPS|spars|PFLOPS", row["source"]) or row["name"] in ("a10g", "h20")
    if row["units"]:
        product = float(row["units"]) * float(row["clock_ghz"]) * float(row["unit_flop"]) / 1e3
        assert product == pytest.approx(matrix, rel=0.02)
    text = row["source"].partition("watts:")[0].replace("1 PFLOP sparse FP4", "1000 TFLOPS")
    if quotient := re.search(r"([\d.]+) (?:FP4 |FP8 |BF16 )?(?:AI TOPS|TFLOPS|with)[\w ]*? ?/ (\d+)", text):
        assert float(quotient[1]) / float(quotient[2]) == pytest.approx(matrix, rel=0.02)
    # Apple rounds 204.8, 409.6 and 819.2 GB/s down.
    width_times_rate = float(row["bus_bits"]) * float(row["pin_gbps"]) / 8
    tolerance = 0.025 if row["vendor"] == "apple" else 0.006
    assert width_times_rate == pytest.approx(float(row["bandwidth_gbs"]), rel=tolerance)


PER_FLOAT32 = {
    ("pascal", "desktop"): 1, ("pascal", "datacentre"): 1, ("turing", "desktop"): 4, ("turing", "datacentre"): 8,
    ("volta", "datacentre"): 8, ("ampere", "desktop"): 2, ("ampere", "laptop"): 2, ("ampere", "workstation"): 4,
    ("ada", "desktop"): 2, ("ada", "laptop"): 2, ("ada", "workstation"): 4, ("ada", "datacentre"): 4,
    ("blackwell", "desktop"): 2, ("blackwell", "laptop"): 2, ("blackwell", "workstation"): 4, ("blackwell", "mini"): 4,
    ("rdna3", "desktop"): 2, ("rdna4", "desktop"): 4, ("xe-hpg", "desktop"): 8, ("xe2-hpg", "desktop"): 8,
    ("cdna2", "datacentre"): 8, ("cdna3", "datacentre"): 8, ("cdna4", "datacentre"): 16, ("vega20", "datacentre"): 2,
    ("turing", "workstation"): 8, ("ampere", "mini"): 8, ("xe2-hpg", "workstation"): 8, ("rdna2", "desktop"): 2,
    ("rdna3", "workstation"): 2, ("rdna4", "workstation"): 4, ("rdna3.5", "mini"): 2,
}  # fmt: skip
"""How many times faster the matrix units of an architecture are in 16 bits than the plain ones in float32."""


@pytest.mark.parametrize("gpu", list_gpu_specs(), ids=lambda g: g.name)
def test_rates_keep_the_ratio_of_their_architecture(gpu):
    if gpu.name == "l40":  # its matrix units run at half the rate of the L40S
        return
    kind = "mini" if gpu.vendor == "nvidia" and gpu.unified else gpu.kind  # RTX Spark is the chip of DGX Spark
    ratio = 1 if gpu.vendor == "apple" else PER_FLOAT32.get((gpu.architecture, kind))
    if ratio is not None:
        assert gpu.rates["float16"] == pytest.approx(ratio * gpu.rates["float32"], rel=0.02)
    assert gpu.rates.get("bfloat16", gpu.rates["float16"]) == gpu.rates["float16"]


def test_age_of_figures():
    assert gpus.is_date_outdated("2020-01-01")
    assert not gpus.is_date_outdated(datetime.date.today().isoformat())
    assert re.search(r"^2020-01-01, .*180 days$", gpus.format_date_with_age_note("2020-01-01"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((name, "rtx-3090") for name in ("rtx-3090", "RTX 3090", "rtx3090", "NVIDIA GeForce RTX 3090", "3090")),
        ("m4 max 64 gb", "m4-max-64gb"),
        ("M4 Max", "m4-max-48gb"),
        ("macbook air m2", "m2-8gb"),
        ("RTX 3090 24GB", "rtx-3090"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx-4070-super"),
        ("AMD Ryzen AI Max+ 395", "strix-halo-64gb"),
        ("AMD Ryzen AI Max 385", "strix-halo-32gb"),
        ("RTX PRO 4500", "rtx-pro-4500"),
        ("M6", "m6-16gb"),
        ("mac mini m6 32gb", "m6-32gb"),
    ],
)
def test_names_as_people_write_them(name, found):
    assert require_gpu_by_name(name).name == found


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("a100", ["a100-40gb-pcie", "a100-80gb", "a100-80gb-pcie"]),
        ("M5 Ultra", ["m5-ultra-64core-96gb", "m5-ultra-64core-256gb", "m5-ultra-256gb", "m5-ultra-512gb"]),
        ("rtx 4060 ti", ["rtx-4060-ti-8gb"]),
        ("rtx-3060", []),
        ("a100-80gb", []),
    ],
)
def test_other_versions_of_a_gpu_are_named(name, others):
    assert re.findall(r"'([^']+)'", gpus.describe_other_versions(name)) == others


def test_unified_memory_of_amd_reaches_from_the_bios_to_the_gtt_limit():
    usable = require_gpu_by_name("strix halo 128gb").usable
    assert (usable.low, usable.high) == (96 * GIB, 124 * GIB)


def test_memory_that_a_chip_does_not_have():
    with pytest.raises(UsageError, match=r"m4-max-48gb.*m4-max-64gb.*m4-max-128gb"):
        require_gpu_by_name("m4 max 80gb")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("rtx 3090 i", None),
        ("rtx-3091", None),
        ("m4 maxx", "m4-max-48gb"),
        ("rtxx 3090", "rtx-3090"),
    ],
)
def test_nearest_card_has_the_same_numbers(name, nearest):
    with pytest.raises(UsageError) as caught:
        require_gpu_by_name(name)
    close = f"in the table; did you mean {nearest!r}?" if nearest else "in the table\n"
    assert close in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("512MiB", GIB // 2)],
)
def test_memory_sizes(text, size):
    assert make_gpu_with_memory(text).memory == size >= make_gpu_with_memory(text).usable.high


@pytest.mark.parametrize("text", ["", "0", "-1", "big", "24XB", "0.1B", "1e3"])
def test_bad_memory_size(text):
    with pytest.raises(UsageError, match="memory"):
        make_gpu_with_memory(text)


def test_detect_cpu():
    gpu = detect_gpu_or_cpu_spec("cpu")
    assert gpu.device == "cpu"
    assert gpu.usable.low == gpu.usable.high > 0


@pytest.mark.parametrize(("total", "name"), [(24 * GIB, "rtx-3090"), (10 * GIB, "NVIDIA GeForce RTX 3090")])
def test_detect_gpu_by_name_and_memory(monkeypatch, total, name):
    """A slice of a GPU, or another version of it, is not the GPU of the table."""
    monkeypatch.setattr(this_machine, "pick_device", lambda _: this_machine.torch.device("cuda"))
    monkeypatch.setattr(this_machine, "pick_dtype", lambda *_: this_machine.torch.bfloat16)
    monkeypatch.setattr(this_machine.torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(this_machine.torch.cuda, "mem_get_info", lambda *_: (total // 2, total))
    assert (detect_gpu_or_cpu_spec().name, detect_gpu_or_cpu_spec().visible) == (name, total)


def test_unified_memory_is_not_all_usable():
    mac = GpuSpec("a Mac", "mac", "apple", "", 16 * GIB, 16 * GIB, unified=True)
    assert mac.usable.low < 0.7 * 16 * GIB
    assert mac.device == "mps"
