"""`slimtune plan`: flags to jobs, plans to text and JSON. The planner is stood in for; its own tests prove it."""

import json
import re
from pathlib import Path

import pytest
from hand_plan import FULL, GIB, hand_plan
from typer.testing import CliRunner

import slimtune.methods
import slimtune.planning.planner as planner
from slimtune.cli import app
from slimtune.cli.plan import format_range
from slimtune.config import load_recipe
from slimtune.errors import UsageError
from slimtune.models.loader import load_tokenizer
from slimtune.planning.gpus import detect_gpu, find_gpu, gpu_with_memory
from slimtune.planning.request import build_request
from slimtune.setup import load_datasets
from slimtune.utils.formatting import format_duration

TALK = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "%s"}]}\n'
CARD = find_gpu("rtx-3090")
BASE = ("llama-3.1-8b", "--gpu", "rtx 3090")


def plan(*args: str):
    return CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "80"})


def said(*args: str) -> dict:
    done = plan(*args, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list:
    """Stand in for the planner; return the requests it gets."""
    requests: list = []
    made = {"full": {"sizes": FULL, "verdict": "does not fit"}, "ia3": {"verdict": "tight"}}

    def fake_make_plan(request, *, advise=True):
        requests.append(request)
        method = request.method.name
        if method == "bottleneck":
            raise UsageError("found 0 of the 2 layers")
        return hand_plan(method, request.gpu, **made.get(method, {}))

    monkeypatch.setattr(planner, "make_plan", fake_make_plan)
    return requests


@pytest.fixture
def rows(tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.touch()
    return file


@pytest.fixture
def recipe(tmp_path, rows) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {name: llama-3.1-8b, dtype: bf16}\ndata: {train: rows.jsonl, max_seq_len: 512}\noutput_dir: o\n"
        "method: {name: lora, r: 4, targets: [q_proj]}\n"
        "train: {batch_size: 3, gradient_accumulation_steps: 2, packing: false, gradient_checkpointing: true}\n"
    )
    return file


# --- what is asked for


def test_a_model_alone_is_planned_as_training_would_run_it(asked):
    said("llama-3.1-8b")
    (request,) = asked
    trained = load_recipe(None, {"model.name": "llama-3.1-8b", "data.train": "d.jsonl", "output_dir": "o"})
    assert (request.model.spec, request.method.name) == ("meta-llama/Llama-3.1-8B", "lora")
    assert request == build_request(trained, request.gpu)
    assert (request.dtype, request.optimizer, request.quantization) == ("auto", "adamw", None)
    assert request.gpu.name == detect_gpu().name


def test_flags(asked):
    said(
        *BASE, "--method", "LoRA", "--rank", "8", "--alpha", "12", "--batch-size", "2", "--max-seq-len", "99",
        "--gradient-accumulation-steps", "4", "--optimizer", "adamw-8bit", "--quantization", "nf4",
        "--gradient-checkpointing", "--dtype", "bf16", "--no-packing", "--set", "method.targets=[q_proj]",
        "--set", "train.gradient_accumulation_steps=5",
        "--set", "train.save_total_limit=7",
    )  # fmt: skip
    (request,) = asked
    assert request.gpu is CARD
    assert request.method.name == "lora"
    assert (request.method.r, request.method.lora_alpha) == (8, 12)
    assert set(request.method.target_modules) == {"q_proj"}
    assert (request.batch_size, request.gradient_accumulation_steps, request.seq_len) == (2, 5, 99)
    assert (request.optimizer, request.quantization, request.gradient_checkpointing) == ("adamw-8bit", "nf4", True)
    assert (request.dtype, request.packing, request.save_total_limit) == ("bfloat16", False, 7)


def test_a_recipe_and_flags_over_it(asked, recipe):
    done = plan(str(recipe), "--vram", "16GiB", "--rank", "6", "--max-seq-len", "300")
    assert done.exit_code == 0, done.stderr
    assert (
        "the tokenizer of meta-llama/Llama-3.1-8B is not on this disk: every row is taken to have 300 tokens"
        in done.stderr
    )
    (request,) = asked
    assert request.gpu == gpu_with_memory("16GiB")
    assert (request.method.r, set(request.method.target_modules)) == (6, {"q_proj"})
    assert (request.batch_size, request.gradient_accumulation_steps, request.seq_len) == (3, 2, 300)
    assert (request.packing, request.gradient_checkpointing, request.dtype) == (False, True, "bfloat16")
    assert request.lengths == ()


def test_other_methods_than_the_recipes_start_from_their_own_defaults(asked, recipe):
    said(str(recipe), "--method", "lora,vera,full")
    by_name = {r.method.name: r for r in asked}
    assert list(by_name) == ["lora", "vera", "full"]
    assert set(by_name["lora"].method.target_modules) == {"q_proj"}
    assert by_name["vera"].method.target_modules == "all-linear"
    assert {(r.batch_size, r.gradient_accumulation_steps) for r in asked} == {(3, 2)}


def test_rows_give_the_longest_and_the_tokens_of_the_run(asked, tiny_folder, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text(TALK % "Ho" + TALK % "Desire and expectation rolled into one." + TALK % "Hello")
    how = ("--data", str(file), "--set", "data.validation_fraction=0", "--gpu", "rtx 3090")
    told = said(str(tiny_folder), *how, "--set", "train.epochs=2")
    (request,) = asked
    tokenizer = load_tokenizer(str(tiny_folder))
    rows = load_datasets(load_recipe(None, {"model": str(tiny_folder), "data.train": str(file), "output_dir": "o",
                                      "data.validation_fraction": 0}), tokenizer).train  # fmt: skip
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) == 3
    assert request.job().lengths == tuple(sorted(lengths, reverse=True))
    assert told["cost"]["tokens"] == 2 * sum(lengths)
    assert told["cost"]["hours"]["low"] == pytest.approx(2 * sum(lengths) / 2000 / 3600)
    told = said(
        str(tiny_folder), *how, "--set", "train.max_steps=6", "--batch-size", "1", "--gradient-accumulation-steps", "2"
    )
    assert told["cost"]["tokens"] == round(6 * 2 * sum(lengths) / 3)
    assert asked[1].job().lengths == asked[0].job().lengths[:1]  # the longest that can come together in a pass
    shown = plan(str(tiny_folder), *how, "--set", "train.epochs=2").stdout
    assert f"the run, {2 * sum(lengths)} tokens" in shown


def test_a_config_alone_is_planned_by_the_longest_row_it_allows(asked, tiny_folder, rows):
    (tiny_folder / "model.safetensors").unlink()
    done = plan(str(tiny_folder / "config.json"), "--gpu", "t4", "--data", str(rows))
    assert done.exit_code == 0, done.stderr
    assert "rows are not read" in done.stderr
    assert asked[0].job().lengths == (1024,) * 8


def test_a_recipe_of_a_base_on_this_disk_has_its_rows_read(asked, tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(TALK % "Ho")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: {{train: rows.jsonl, validation_fraction: 0}}\noutput_dir: o\n")
    done = plan(str(recipe), "--gpu", "t4")
    assert done.exit_code == 0, done.stderr
    assert max(asked[0].job().lengths) < 100
    assert "rows: 1 of 1 rows" in done.stderr


def test_a_setting_goes_to_the_methods_that_have_it(asked):
    said(*BASE, "--method", "lora,ia3", "--rank", "3")
    assert [(r.method.name, getattr(r.method, "r", None)) for r in asked] == [("lora", 3), ("ia3", None)]


def test_all_methods_and_those_that_cannot_be_planned(asked):
    told = said(*BASE, "--method", "all,full")
    planned = [p["method"] for p in told["plans"]]
    unfit = {u["method"]: u["why"] for u in told["unfit"]}
    assert set(planned) | set(unfit) == {*slimtune.methods.method_names(), "full"}
    assert unfit["bottleneck"] == "found 0 of the 2 layers"
    assert "token_indices is []" in unfit["trainable_tokens"]
    lines = plan(*BASE, "--method", "all,full").stdout.splitlines()
    assert "bottleneck is not planned: found 0 of the 2 layers" in lines
    table = lines[: lines.index(next(line for line in lines if "is not planned" in line))]
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table)


# --- wrong use


@pytest.mark.parametrize("verb", ["plan", "gpus"])
def test_help(verb):
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--gpu", "rtx-3091"], "there is no card 'rtx-3091' in the table; did you mean 'rtx-3090'?"),
        (["--vram", "plenty"], "'plenty' is no size of memory"),
        (["--vram", "0"], "'0' is no size of memory"),
        (["--gpu", "t4", "--vram", "16GiB"], "--gpu and --vram are both given"),
        (["--method", "lore"], "there is no method 'lore'; did you mean 'lora'?"),
        (["--method", ","], "--method names none"),
        (["--method", ""], "--method names none"),
        (["--rank", "0"], "method.r: got 0"),
        (["--batch-size", "0"], "train.batch_size: got 0"),
        (["--max-seq-len", "1"], "data.max_seq_len: got 1"),
        (["--method", "lora,ia3", "--max-seq-len", "1"], "data.max_seq_len: got 1"),
        (["--dtype", "bf17"], "model.dtype: got 'bf17'"),
        (["--optimizer", "adamv"], "train.optimizer: got 'adamv'"),
        (["--quantization", "nf8"], "model.quantization: got 'nf8'"),
        (["--method", "full", "--rank", "4"], "method.rank: no such field"),
        (["--method", "ia3", "--rank", "4"], "method.rank"),
        (["--method", "lora,ia3", "--set", "method.rnk=4"], "a setting 'rnk'; did you mean 'rank'?"),
        (["--set", "train.epocs=1"], "did you mean 'epochs'"),
        (["--data", "no/rows.jsonl"], "data.train: there is no file"),
        (["--plot", "plan.pdf"], "'.pdf'"),
        (["--context", "4096"], "--context describes how the tuned model is served"),
        (["--price", "-1"], "--price"),
        (["--price", "0"], "--price is 0"),
        (["--serve", "--engine", "olama"], "there is no engine 'olama'; did you mean 'ollama'?"),
        (["--max-seq-len", "9000000"], "a row of 9000000 tokens"),
        (["--context", "0", "--serve"], "--context"),
    ],
)
def test_wrong_use(asked, args, says):
    done = plan("llama-3.1-8b", *args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert asked == []
    assert json.loads(plan("llama-3.1-8b", *args, "--json").stdout)["error"]["exit_code"] == 2


def test_no_model_and_no_recipe():
    assert plan().exit_code == 2
    done = plan("nowhere.yaml")
    assert (done.exit_code, "there is no recipe file 'nowhere.yaml'" in done.stderr) == (2, True)


@pytest.mark.parametrize("methods", ["lora", "lora,ia3"])
def test_an_unknown_base(asked, methods):
    done = plan("lama-3.1-8b", "--method", methods)
    assert (done.exit_code, done.stdout, asked) == (2, "", [])
    assert done.stderr.count("there is no base 'lama-3.1-8b'; did you mean 'llama-3.1-8b'?") == 1


def test_what_no_method_can_be_planned_for_is_an_error(asked):
    done = plan(*BASE, "--method", "bottleneck")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "found 0 of the 2 layers" in done.stderr


# --- what is shown


def test_one_plan():
    done = plan(*BASE, "--price", "0.5")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "llama-3.1-8b with lora fits on rtx-3090:"
    assert lines[1] == "it needs 18.6 GiB to 19.0 GiB of 22.9 GiB"
    text = " | ".join(" ".join(line.split()) for line in lines)
    for part in (
        "weights 15.0 GiB traced |",
        "activations 1.5 GiB traced |",
        "reserved for them 18.1 to 18.5 GiB",
        "runtime 512.0 MiB",
        "needed 18.6 to 19.0 GiB",
        f"usable {format_range(*CARD.usable)} published, guessed |",
        "micro-batch 1 row, 2048 tokens",
        "longest row in it 2048 tokens",
        "micro-batches in a step 4",
        "trained parameters 41.9 M (0.52 %)",
        "adapter file 160.0 MiB",
        "CPU memory 3.0 GiB",
        "disk 1.0 GiB",
        "longest row that fits, 1 at once 6144 tokens",
        "most rows of 2048 that fit 3 rows",
        "tokens in a second 1000 to 2000",
        "a million tokens 8 min 20 s to 16 min 40 s",
        "0.029 to 0.097 kWh",
        "0.069 to 0.14 $ the price given",
        "--quantization nf4 10.0 GiB fits",
        "lora WWWW",
    ):
        assert part in text
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        ("fits", "llama-3.1-8b with full fits on rtx-3090:"),
        ("tight", "llama-3.1-8b with full is tight on rtx-3090, it may run out of memory:"),
        ("does not fit", "llama-3.1-8b with full does not fit on rtx-3090:"),
    ],
)
def test_a_plan_is_an_answer_whatever_it_says(monkeypatch, verdict, sentence):
    fields = {"verdict": verdict, "max_seq_len": 0, "max_batch_size": 0, "tokens_per_second": None, "advice": []}
    monkeypatch.setattr(
        planner, "make_plan", lambda request, advise: hand_plan(request.method.name, request.gpu, **fields)
    )
    done = plan(*BASE, "--method", "full")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == sentence
    assert done.stdout.count("none fits") == 2
    assert "not known" in done.stdout
    assert "a million tokens" not in done.stdout
    assert "to save memory" not in done.stdout


def test_several_plans_are_a_table_and_bars():
    done = plan(*BASE, "--method", "lora,ia3,full")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["allocated", "reserved", "max"]
    assert lines[1].split() == ["method", "trains", "adapter", "GiB", "GiB", "verdict", "row", "tokens/s"]
    assert lines[2].split() == [
        "lora", "41.9", "M", "160.0", "MiB", "18.0", "18.1–18.5", "fits", "6144", "1000–2000"
    ]  # fmt: skip
    assert lines[3].startswith("ia3 ")
    assert "tight" in lines[3]
    assert [line[:4] for line in lines if "WWWW" in line] == ["lora", "ia3 ", "full"]
    assert max(map(len, lines)) <= 80


def test_what_is_being_planned_is_said_on_stderr():
    done = plan(*BASE, "--method", "lora,ia3", "--json")
    assert done.stderr.splitlines() == [
        "planning llama-3.1-8b, lora, on rtx-3090", "planning llama-3.1-8b, ia3, on rtx-3090",
    ]  # fmt: skip


def test_json_of_one_and_of_several():
    one = said(*BASE, "--price", "2")
    plan_of = hand_plan().to_dict()
    for name in (
        "method", "trainable_params", "total_params", "trainable_fraction", "adapter_bytes", "parts",
        "allocated_bytes", "host_bytes", "verdict", "max_seq_len", "max_batch_size", "reserved_bytes",
        "tokens_per_second", "card", "model", "evidence", "advice",
    ):  # fmt: skip
        assert one[name] == json.loads(json.dumps(plan_of[name])), name
    assert one["tokens_per_second"] == {"low": 1000.0, "high": 2000.0}
    assert one["cost"]["tokens"] == 1_000_000
    assert one["cost"]["hours"]["high"] == pytest.approx(1000 / 3600)
    assert one["cost"]["rent"]["low"] == pytest.approx(2 * 500 / 3600)
    assert one["cost"]["prices"] == []
    assert [p["method"] for p in one["plans"]] == ["lora"]
    several = said(*BASE, "--method", "lora,ia3")
    assert set(several) == {"model", "card", "plans", "unfit", "serve", "plot", "recipe"}
    assert [p["verdict"] for p in several["plans"]] == ["fits", "tight"]
    assert several["plans"][0]["cost"]["prices"][0]["card"] == "rtx-3090"


def test_prices_of_the_table_are_shown_with_their_date():
    text = " ".join(plan(*BASE).stdout.split())
    assert re.search(r"[\d.]+ to [\d.]+ \$ published: RunPod Community Cloud, 20\d\d-\d\d-\d\d", text)


def test_ranges():
    assert format_range(17.9 * GIB, 18.6 * GIB) == "17.9 to 18.6 GiB"
    assert format_range(900 << 20, 1.5 * GIB) == "900.0 MiB to 1.5 GiB"
    assert format_range(GIB, GIB + 1) == "1.0 GiB"
    assert format_range(1, 2, "{:.0f}".format) == "1 to 2"
    assert format_range(500, 1000, format_duration) == "8 min 20 s to 16 min 40 s"


# --- what is written


def test_a_recipe_that_trains_is_written(asked, rows, tmp_path):
    file = tmp_path / "job.yaml"
    done = plan(*BASE, "--rank", "8", "--max-seq-len", "99", "--data", str(rows), "--write", str(file))
    assert done.exit_code == 0, done.stderr
    assert file.read_text().startswith(
        "# llama-3.1-8b with lora fits on rtx-3090: it needs 18.6 GiB to 19.0 GiB of 22.9 GiB\n"
    )
    recipe = load_recipe(file)
    assert (recipe.method.settings["r"], recipe.data.max_seq_len, recipe.data.train) == (8, 99, rows)
    assert recipe.model.name == "meta-llama/Llama-3.1-8B", "what the weights are loaded by"
    assert recipe.output_dir == Path("runs/job")
    assert f"next: slimtune train {file}" in done.stdout
    again = said(str(file), "--gpu", "t4")
    assert again["method"] == "lora"
    assert asked[1].method == asked[0].method
    assert (asked[1].model.spec, asked[1].seq_len) == (asked[0].model.spec, 99)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--write needs the rows"),
        (["--method", "lora,full", "DATA"], "--write got lora, full"),
        (["--method", "lora,ia3", "DATA"], "--write got lora, ia3"),
        (["DATA", "--write", "job.txt"], "'job.txt' is not a name for a recipe"),
        (["DATA", "--write", "no/job.yaml"], "there is no folder 'no'"),
        (["DATA", "--write", "there.yaml"], "there.yaml exists"),
    ],
)
def test_a_recipe_that_cannot_be(asked, rows, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").touch()
    data = ["--data", str(rows)]
    args = [a for arg in args for a in (data if arg == "DATA" else [arg])]
    done = plan(*BASE, "--write", "job.yaml", *args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert asked == []
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "there.yaml"}


def test_a_picture_is_drawn(tmp_path):
    file = tmp_path / "plan.svg"
    assert said(*BASE, "--method", "lora,ia3", "--plot", str(file))["plot"] == str(file)
    assert "19.0 GiB, tight" in file.read_text()


# --- and afterwards


def test_serve():
    how = ("--serve", "--engine", "llama.cpp", "--precision", "q8_0", "--context", "8192")
    done = plan(*BASE, *how)
    assert done.exit_code == 0, done.stderr
    text = " | ".join(" ".join(line.split()) for line in done.stdout.splitlines())
    assert "served by llama.cpp: fits" in text
    assert "Q8_0, the adapter merged, 8192 tokens of context: " in text
    assert "cache 1.0 GiB computed" in text  # 8192 tokens · 32 layers · 2 · 8 heads · 128 numbers · 2 bytes
    served = said(*BASE, *how)["serve"]
    assert (served["engine"], served["context"], served["parts"]["cache"]) == ("llama.cpp", 8192, 1 << 30)
    assert served["verdict"] == "fits"
    assert said(*BASE)["serve"] is None
