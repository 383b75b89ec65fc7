"""`slimtune gpus A B`, `choose`, `cost` and `models`. The planner is replaced: an 8B that needs 19 GiB."""

import json
import re
from dataclasses import replace

import pytest
from hand_plan import SIZES, hand_plan

from slimtune.errors import ModelError
from slimtune.extras.known_models import load_known_models_by_alias
from slimtune.hardware.machine_choice import make_machine_offer, rank_fitting_machines_by_price
from slimtune.planning import planner
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.interval import Interval


@pytest.fixture(autouse=True)
def requests(replace_planner) -> list:
    return replace_planner()


def test_side_by_side(slimtune, slimtune_json, requests):
    done = slimtune("gpus", "RTX 3090", "m4 max 128 gb")
    assert done.stdout.splitlines()[0].split() == ["rtx-3090", "m4-max-128gb"]
    assert requests == []
    job = ("--for", "llama-3.1-8b", "--kwh-price", 0.3)
    machines = slimtune_json("gpus", "RTX 3090", "m4 max 128 gb", *job)["machines"]
    assert [(m["card"], m["verdict"]) for m in machines] == [("rtx-3090", "fits"), ("m4-max-128gb", "fits")]
    assert machines[0]["cost"]["power"]["high"] > 0
    assert max(map(len, slimtune("gpus", "RTX 3090", "m4-max-128gb", *job).stdout.splitlines())) <= 84


def test_side_by_side_says_which_cannot_train(slimtune):
    lines = slimtune("gpus", "rtx 4070 super", "arc b580").stdout.splitlines()
    assert [line for line in lines if line.endswith(": arc-b580")]


def test_choose_ranks_by_price(slimtune, slimtune_json, requests):
    result = slimtune_json("choose", "llama-3.1-8b", "--kind", "desktop,rent", "--budget", 2500)
    is_crowded = [m["free_bytes"] < 2 << 30 for m in result["buy"]]
    assert is_crowded == sorted(is_crowded)
    roomy = [m for m, crowded in zip(result["buy"], is_crowded, strict=True) if not crowded]
    is_launch = [all(p["condition"] == "launch" for p in m["purchases"]) for m in roomy]
    assert is_launch == sorted(is_launch)
    prices = [m["price"]["high"] for m in roomy]
    assert prices[: is_launch.index(True)] == sorted(prices[: is_launch.index(True)])
    assert max(prices) <= 2500
    assert {m["verdict"] for m in result["buy"] + result["rent"]} == {"fits"}
    assert all(r.max_tokens == 1 for r in requests)
    text = slimtune("choose", "llama-3.1-8b", "--kind", "desktop").stdout
    assert re.findall(r"^to (\w+): (\S+)", text, re.MULTILINE) == [("buy", result["buy"][0]["card"])]


def test_choose_a_macbook(slimtune_json):
    bought = slimtune_json("choose", "llama-3.1-8b", "--kind", "macbook")["buy"]
    assert bought
    assert {p["machine"].split()[0] for m in bought for p in m["purchases"]} == {"MacBook"}


def test_choose_marks_machines_on_which_a_quantized_base_is_not_proven(slimtune):
    args = ("choose", "llama-3.1-8b", "--kind", "desktop,mac")
    shown = slimtune(*args, "--quantization", "nf4").stdout
    marked = re.findall(r"\S+(?= \*)", shown)
    assert marked
    assert not any(name.startswith("rtx") for name in marked)
    assert re.search(r"^\* .*bitsandbytes", shown, re.MULTILINE)
    assert "*" not in slimtune(*args).stdout


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        (["--budget", 10], ["budget"]),
        (["--hours", 0.001], ["hours"]),
        (["--budget", 10, "--hours", 0.001], ["budget", "hours"]),
        ([], []),
    ],
)
def test_the_limit_that_leaves_no_machine_is_named(slimtune, flags, limits):
    done = slimtune("choose", "llama-3.1-8b", "--kind", "laptop", *flags, "--quantization", "nf4", "--json")
    assert json.loads(done.stdout)["binding_limits"]["buy"] == limits


def test_memory_is_named_where_it_leaves_no_machine(slimtune, replace_planner):
    replace_planner(lambda request: hand_plan(request.method.name, request.gpu, sizes=(900.0, *SIZES[1:])))
    flags = ["--kind", "laptop", "--budget", 10]
    assert json.loads(slimtune("choose", "llama-3.1-8b", *flags, "--json").stdout)["binding_limits"]["buy"] == [
        "memory"
    ]
    hint = "\n".join(slimtune("choose", "llama-3.1-8b", *flags, "--quantization", "nf4").stdout.splitlines())
    assert re.findall(r"--[a-z-]+", hint) == ["--kind", "--gradient-checkpointing"]  # what is not given yet


def test_choose_finds_none(slimtune):
    done = slimtune("choose", "llama-3.1-8b", "--kind", "laptop", "--budget", 10)
    assert done.exit_code == 1
    assert re.search(r"^to \w+: none\b", done.stdout, re.MULTILINE)


def test_cost(slimtune, slimtune_json):
    args = ("cost", "llama-3.1-8b", "--gpu", "rtx-3090", "--tokens", 3_600_000, "--kwh-price", 0.5)
    result = slimtune_json(*args, "--price", 900, "--rent", 2)
    assert result["rent"] == [{"name": "rent, 2.0 $/h", "run": {"low": 1.0, "high": 2.0}}]
    assert result["runs_to_break_even"]["low"] == pytest.approx(900 / (2 - 0.0525))
    assert [s["service"] for s in result["services"]] == ["Together AI, LoRA"]
    assert "openai-ends-fine-tuning" in slimtune(*args).stdout
    assert "--rent" in slimtune("cost", "llama-3.1-8b", "--gpu", "m4-max-128gb").stdout


@pytest.mark.parametrize(
    "command",
    [
        ("choose", "llama-3.1-8b"),
        ("cost", "llama-3.1-8b", "--gpu", "rtx-3090"),
        ("models", "--family", "olmo"),
    ],
)
def test_old_figures_are_counted(slimtune, monkeypatch, command):
    monkeypatch.setattr("slimtune.planning.gpu_specs.MAX_AGE", -1)
    assert "-1 days" in slimtune(*command).stdout


def test_models(slimtune_json):
    assert {m["name"] for m in slimtune_json("models")["models"]} == set(load_known_models_by_alias())
    llama = next(m for m in slimtune_json("models", "--family", "llama")["models"] if m["name"] == "llama-3.1-8b")
    assert (llama["gated"], llama["released"], llama["context"]) == (True, "2024-07", 131072)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("gpus", *["t4"] * 6), "6 GPUs to compare"),
        (("gpus", "t4", "l4", "--kind", "mac"), "--kind are both given"),
        (("cost", "llama-3.1-8b", "--gpu", "arc-b580"), "does not train on Intel GPUs"),
        (("models", "--family", "nope"), "'nope' is no family of bases"),
    ],
)
def test_wrong_use(slimtune, args, message):
    done = slimtune(*args)
    assert done.exit_code == 2
    assert message in done.stderr


def test_licences_are_broken_between_words(slimtune):
    lines = [line.split() for line in slimtune("models").stdout.splitlines() if "license" in line]
    assert {words[-2] if len(words) > 1 else words[0] for words in lines} == {
        "falcon-llm-license", "license", "license,", "open-model-license",
    }  # fmt: skip


def test_machines_that_cannot_be_planned_are_left_out(slimtune_json, monkeypatch):
    estimate, why = planner.estimate_resources, "its experts are bfloat16"

    def refuse_float32(request, **options):
        if request.gpu.device == "cuda" and not request.gpu.bf16:
            raise ModelError(why)
        return estimate(request, **options)

    monkeypatch.setattr(planner, "estimate_resources", refuse_float32)
    chosen = slimtune_json("choose", "llama-3.1-8b")
    (left_out,) = chosen["unplanned"]
    assert "t4" in left_out["cards"]
    assert left_out["why"] == why
    assert "rtx-3090" in {offer["card"] for offer in chosen["buy"]}
    listed = slimtune_json("gpus", "--for", "llama-3.1-8b")
    assert [group["group"] for group in listed["unplanned"]] == [left_out["group"]]
    assert "t4" not in {card["name"] for card in listed["cards"]}
    beside = slimtune_json("gpus", "t4", "rtx-3090", "--for", "llama-3.1-8b")["machines"]
    assert [machine["verdict"] for machine in beside] == [None, "fits"]


def test_a_machine_without_room_for_its_screen_is_not_the_first_choice():
    run = hand_plan("lora", require_gpu_by_name("rtx-3090"))
    cheap, dear = (
        replace(make_machine_offer(require_gpu_by_name("rtx-3090"), run, trained_tokens=1000), price=Interval(n, n))
        for n in (100, 900)
    )
    crowded = replace(cheap, free_bytes=1 << 30)
    roomy = replace(dear, free_bytes=3 << 30)
    assert rank_fitting_machines_by_price([crowded, roomy]) == [roomy, crowded]
    server = replace(crowded, kind="workstation")
    assert rank_fitting_machines_by_price([server, roomy]) == [server, roomy]
