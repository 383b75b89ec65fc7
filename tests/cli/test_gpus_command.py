"""`slimtune gpus`: the table of GPUs, and those that run a job. The planner is replaced."""

import pytest
from hand_plan import hand_plan

from slimtune.planning.gpu_specs import list_gpu_specs, require_gpu_by_name


@pytest.fixture(autouse=True)
def requests(replace_planner) -> list:
    """The planner's requests: 19 GiB at most on a GPU, twice the weights without bf16, 60 GiB on a Mac."""

    def make(request):
        weights = 56.0 if request.gpu.device == "mps" else 15.0 if request.gpu.bf16 else 30.0
        return hand_plan(request.method.name, request.gpu, sizes=(weights, 0.25, 0.25, 0.5, 1.5, 0.5, 0.5))

    return replace_planner(make)


def test_table(slimtune, requests):
    lines = slimtune("gpus").stdout.splitlines()
    assert lines[0].split() == ["GPU", "memory", "GB/s", "bf16", "flash", "watts", "kind"]
    assert [line.split()[0] for line in lines[1:]] == [c.name for c in list_gpu_specs()]
    by_name = {line.split()[0]: line.split()[1:] for line in lines}
    assert by_name["rtx-3090"] == ["24.0", "GiB", "936", "yes", "yes", "350", "desktop"]
    assert by_name["t4"] == ["16.0", "GiB", "320", "no", "no", "70", "datacentre"]
    assert max(map(len, lines)) <= 80
    assert requests == []


def test_one_gpu(slimtune, slimtune_json):
    text = " ".join(slimtune("gpus", "rtx 3090").stdout.split())
    for part in (
        "rtx-3090, desktop, nvidia ampere",
        "bfloat16 71 TFLOPS",
        "GA102 whitepaper",
        "checked 2026-",
        "0.22 $/h",
    ):
        assert part in text
    assert [c["name"] for c in slimtune_json("gpus", "t4")["cards"]] == ["t4"]
    assert "Intel" in slimtune("gpus", "arc-b580").stdout


def test_sources(slimtune):
    text = " ".join(slimtune("gpus", "--sources", "--kind", "mini").stdout.split())
    assert "dgx-spark NVIDIA DGX Spark spec page" in text
    assert "(checked 2026-11-2" in text


def test_sources_of_a_job(slimtune):
    text = " ".join(slimtune("gpus", "--for", "llama-3.1-8b", "--kind", "mini", "--sources").stdout.split())
    assert "dgx-spark NVIDIA DGX Spark spec page" in text
    assert "usable_bytes published" in text
    assert "base " in text


@pytest.mark.parametrize("job", [[], ["--for", "llama-3.1-8b"]])
def test_old_figures_are_said_to_be_old(slimtune, job, monkeypatch):
    command = ["gpus", "--kind", "mini", *job]
    assert "180 days" not in slimtune(*command).stdout
    monkeypatch.setattr("slimtune.planning.gpu_specs.MAX_AGE", -1)
    assert "-1 days" in slimtune(*command).stdout


def test_kinds(slimtune_json):
    assert {c["kind"] for c in slimtune_json("gpus", "--kind", "mac, Laptop")["cards"]} == {"mac", "laptop"}


def test_json(slimtune_json):
    cards = {c["name"]: c for c in slimtune_json("gpus")["cards"]}
    assert len(cards) == len(list_gpu_specs())
    assert all(c["source"] for c in cards.values())
    gpu = require_gpu_by_name("rtx-3090")
    assert cards["rtx-3090"]["memory_bytes"] == gpu.memory
    assert cards["rtx-3090"]["usable_bytes"] == {"low": gpu.usable.low, "high": gpu.usable.high}
    assert cards["rtx-3090"]["flops"] == gpu.rates
    assert cards["t4"]["bf16"] is False


def test_gpus_for_a_job(slimtune):
    done = slimtune("gpus", "--for", "llama-3.1-8b", "--kind", "desktop,datacentre,mac")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "llama-3.1-8b with lora needs 18.6 to 19.0 GiB on GPUs in bfloat16" in lines
    names = [line.split()[0] for line in lines if " fits " in line or " tight " in line]
    assert any(line.endswith(": rx-7900-xt, 20.0 GiB") for line in lines)
    shown = [require_gpu_by_name(name) for name in names]
    assert [g.memory for g in shown] == sorted(g.memory for g in shown), "smallest first"
    assert {"rtx-3090", "m3-max-128gb"} <= set(names)
    assert not {"rtx-4080", "v100-32gb"} & set(names), "too small, or too small without bf16"
    assert require_gpu_by_name("rtx-3090").usable.format() in done.stdout
    known = [g for g in list_gpu_specs() if g.kind in ("desktop", "datacentre", "mac") and g.trains]
    assert lines[-1].startswith("slimtune does not train on Intel GPUs: arc-a750, ")
    assert lines[-2].startswith(f"{len(known) - len(shown)} of {len(known)} ")
    assert max(map(len, lines[:-1])) <= 80


def test_job_is_planned_once_for_each_class(slimtune, requests):
    slimtune("gpus", "--for", "llama-3.1-8b")
    classes = [(r.gpu.device, r.gpu.bf16) for r in requests]
    assert sorted(classes) == sorted({(g.device, g.bf16) for g in list_gpu_specs() if g.trains})
    for request, of_class in zip(requests, classes, strict=True):  # the smallest, where a batch is split the most
        assert request.gpu.memory == min(
            g.memory for g in list_gpu_specs() if g.trains and (g.device, g.bf16) == of_class
        )


def test_given_dtype_makes_fewer_classes(slimtune, requests):
    slimtune("gpus", "--for", "llama-3.1-8b", "--dtype", "fp32", "--rank", 4)
    assert sorted(r.gpu.device for r in requests) == ["cuda", "mps"]
    assert {(r.dtype, r.method.r) for r in requests} == {("float32", 4)}


def test_json_for_a_job(slimtune_json):
    result = slimtune_json("gpus", "--for", "llama-3.1-8b", "--kind", "desktop")
    cards = {c["name"]: c for c in result["cards"]}
    assert set(cards) == {g.name for g in list_gpu_specs() if g.kind == "desktop" and g.trains}
    assert (cards["rtx-3090"]["verdict"], cards["rtx-4080"]["verdict"]) == ("fits", "does not fit")
    assert cards["gtx-1080-ti"]["need_bytes"]["high"] > cards["rtx-3090"]["need_bytes"]["high"]
    assert (result["model"], {p["method"] for p in result["plans"]}) == ("llama-3.1-8b", {"lora"})
    assert result["smallest"] == "rx-7900-xt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "desktop,labtop"], "there is no kind 'labtop'; did you mean 'laptop'?"),
        (["--rank", "4"], "method.rank describes a run"),
        (["--for", "gpt2", "--method", "lora,ia3"], "--for got several methods"),
    ],
)
def test_wrong_use(slimtune, requests, args, message):
    done = slimtune("gpus", *args)
    assert (done.exit_code, done.stdout, requests) == (2, "", [])
    assert message in done.stderr
