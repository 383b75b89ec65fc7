"""`slimtune gpus`: the table of cards, and those that run a job. The planner is stood in for."""

import json

import pytest
from hand_plan import hand_plan
from typer.testing import CliRunner

import slimtune.planning.planner as planner
from slimtune.cli import app
from slimtune.cli.plan import format_range
from slimtune.planning.gpus import all_gpus, find_gpu


def gpus(*args: str):
    return CliRunner().invoke(app, ["gpus", *args], env={"COLUMNS": "80"})


def said(*args: str) -> dict:
    done = gpus(*args, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list:
    """Stand in for the planner: 19 GiB at most on a GPU, twice the weights without bf16, 60 GiB on a Mac."""
    requests: list = []

    def fake_make_plan(request, *, advise=True):
        requests.append(request)
        card = request.gpu
        weights = 56.0 if card.device == "mps" else 15.0 if card.bf16 else 30.0
        return hand_plan(request.method.name, card, sizes=(weights, 0.25, 0.25, 0.5, 1.5, 0.5, 0.5))

    monkeypatch.setattr(planner, "make_plan", fake_make_plan)
    return requests


def test_the_table(asked):
    done = gpus()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["GPU", "memory", "GB/s", "bf16", "flash", "watts", "kind"]
    assert [line.split()[0] for line in lines[1:]] == [c.name for c in all_gpus()]
    by_name = {line.split()[0]: line.split()[1:] for line in lines}
    assert by_name["rtx-3090"] == ["24.0", "GiB", "936", "yes", "yes", "350", "desktop"]
    assert by_name["t4"] == ["16.0", "GiB", "320", "no", "no", "70", "datacentre"]
    assert max(map(len, lines)) <= 80
    assert asked == []


def test_kinds():
    kinds = {c["kind"] for c in said("--kind", "mac, Laptop")["cards"]}
    assert kinds == {"mac", "laptop"}
    done = gpus("--kind", "desktop,labtop")
    assert done.exit_code == 2
    assert "there are no GPUs of the kind 'labtop'; did you mean 'laptop'?" in done.stderr


def test_json_has_every_card_with_its_source():
    told = {c["name"]: c for c in said()["cards"]}
    assert len(told) == len(all_gpus())
    assert all(c["source"] for c in told.values())
    card = find_gpu("rtx-3090")
    assert told["rtx-3090"]["memory_bytes"] == card.memory
    assert told["rtx-3090"]["usable_bytes"] == {"low": card.usable[0], "high": card.usable[1]}
    assert told["rtx-3090"]["flops"] == card.rates
    assert told["t4"]["bf16"] is False


def test_the_cards_that_run_a_job_smallest_first(asked):
    done = gpus("--for", "llama-3.1-8b", "--kind", "desktop,datacentre,mac")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "llama-3.1-8b with lora needs 18.6 to 19.0 GiB on GPUs in bfloat16" in lines
    assert "llama-3.1-8b with lora needs 59.6 to 60.0 GiB on Macs in bfloat16" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("GPU "))
    shown = lines[start + 1 : lines.index("", start)]
    names = [line.split()[0] for line in shown]
    memory = [float(line.split()[1]) for line in shown]
    assert memory == sorted(memory)
    usable = format_range(*find_gpu("rx-7900-xt").usable)
    assert shown[0].split() == ["rx-7900-xt", "20.0", "GiB", *usable.split(), "fits", "desktop"]
    assert "rtx-4080" not in names  # 16 GiB
    assert "v100-32gb" not in names  # no bf16: twice the weights, 34 GiB
    assert "m1-max-64gb" not in names  # 48 GiB usable
    assert "m3-max-128gb" in names
    assert "rtx-a6000" not in names  # of another kind
    every = [c for c in all_gpus() if c.kind in ("desktop", "datacentre", "mac")]
    assert lines[-1] == f"{len(every) - len(shown)} of {len(every)} GPUs are too small"


def test_a_job_is_planned_once_for_each_sort_of_card(asked):
    gpus("--for", "llama-3.1-8b")
    sorts = [(r.gpu.device, r.gpu.bf16) for r in asked]
    assert sorted(sorts) == sorted({(c.device, c.bf16) for c in all_gpus()})
    for request in asked:
        alike = [c for c in all_gpus() if (c.device, c.bf16) == (request.gpu.device, request.gpu.bf16)]
        assert request.gpu.memory == max(c.memory for c in alike)


def test_with_a_dtype_the_card_does_not_choose(asked):
    gpus("--for", "llama-3.1-8b", "--dtype", "fp16", "--rank", "4", "--set", "method.targets=[q_proj]")
    assert sorted(r.gpu.device for r in asked) == ["cuda", "mps"]
    assert {(r.dtype, r.method.r) for r in asked} == {("float16", 4)}


def test_json_says_the_verdict_of_every_card():
    told = said("--for", "llama-3.1-8b", "--kind", "desktop")
    verdicts = {c["name"]: c["verdict"] for c in told["cards"]}
    assert set(verdicts) == {c.name for c in all_gpus() if c.kind == "desktop"}
    assert (verdicts["rtx-3090"], verdicts["rtx-4080"]) == ("fits", "does not fit")
    needs = {c["name"]: c["need_bytes"]["high"] for c in told["cards"]}
    assert needs["gtx-1080-ti"] > needs["rtx-3090"]
    assert told["model"] == "llama-3.1-8b"
    assert {p["method"] for p in told["plans"]} == {"lora"}


def test_no_card_at_all():
    done = gpus("--for", "llama-3.1-8b", "--kind", "laptop", "--method", "full")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("llama-3.1-8b with full needs 18.6 to 19.0 GiB")
    runs = [line.split()[0] for line in lines if "laptop" in line and "GiB" in line]
    assert runs == ["rtx-5090-laptop"]
    none = gpus("--for", "llama-3.1-8b", "--kind", "mini", "--dtype", "fp32")
    assert "dgx-spark" in none.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rank", "4"], "method.rank describes a run"),
        (["--set", "train.epochs=1"], "train.epochs describes a run"),
        (["--no-packing"], "train.packing describes a run"),
        (["--for", "gpt2", "--method", "lora,ia3"], "--for got several methods"),
        (["--for", "gpt-3"], "there is no base 'gpt-3'"),
        (["--for", "m", "--method", "lore"], "did you mean 'lora'?"),
        (["--for", "no.yaml"], "there is no recipe file 'no.yaml'"),
    ],
)
def test_wrong_use(asked, args, says):
    done = gpus(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr
    assert asked == []
