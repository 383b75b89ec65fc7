"""The output of `--json` against its schema, and the page of the schemas."""

import json
import runpy
import shlex
import shutil
from pathlib import Path

import jsonschema
import pytest
import typer
from hand_measurement import FOUND
from row_files import write_jsonl

from slimtune.cli import app
from slimtune.cli.json_schemas import make_json_schema
from slimtune.cli.json_types import JSON_TYPES, load_json_types, make_command_output_schema

pytestmark = pytest.mark.usefixtures("kept_traces")
ROOT = Path(__file__).parents[2]
COMMAND_LINES = {
    "ChooseResult": "choose base --kind laptop",
    "ServingChoiceResult": "choose base --kind laptop --serve",
    "PlanResult": "plan base --vram 8GiB --max-seq-len 64 --serve",
    "MethodPlansResult": "plan base --vram 8GiB --max-seq-len 64 --method lora,ia3",
    "CostResult": "cost base --gpu rtx-3090",
    "AnswerCostResult": "cost base --gpu rtx-3090 --serve",
    "GpusResult": "gpus --kind laptop",
    "GpuComparisonResult": "gpus rtx-3090 m4-max-128gb --for base",
    "GpuVerdictsResult": "gpus --for base --kind laptop",
    "BenchResult": "bench",
    "RunSpeedResult": "bench run",
    "PublishedSpeedsResult": "benchmarks --gpu rtx-5090",
    "KnownBasesResult": "models",
    "KnownBaseFits": "models --family smollm2 --fits rtx-3090",
    "BaseChoiceResult": "models --family smollm2 --fits rtx-3090 --purpose chat",
    "MethodsResult": "methods --model base",
    "DataReport": "data rows.jsonl --model base",
    "TrainResult": "train --model base --data rows.jsonl --out {new} --max-steps 1 --dtype float32",
    "TuneResult": "tune recipe.yaml --over train.batch_size=2,4 --trials 2 --set train.max_steps=1 --out {new}",
    "TextOrPairEvalResult": "eval run --split validation --generate 1 --max-new-tokens 2",
    "KTOEvalResult": "eval {kto} --split validation",
    "ClassificationEvalResult": "eval {classification} --split validation",
    "RewardEvalResult": "eval {reward} --split validation",
    "PolicyEvalResult": "eval {grpo} --split validation",
    "CompareResult": "compare recipe.yaml --methods lora,ia3 --seeds 1 --tokens 600 --out {new}",
    "RunReportResult": "report run --out {new}.html",
    "GenerateResult": "generate run hello --side-by-side --max-new-tokens 2",
    "ChatResult": "chat run --max-new-tokens 2",
    "TextPrediction": "predict {classification} wave",
    "TextPredictions": "predict {classification} wave wood",
    "FilePredictions": "predict {classification} --data classification.jsonl --out {new}.jsonl",
    "ExportResult": "export run --to vllm --out {new}",
    "AdapterReport": "check run",
    "ImportResult": "import run/adapter --out {new}.yaml",
    "RepairResult": "repair run --for vllm --out {new}",
    "MergeResult": "merge run --out {new}",
    "PushPreview": "push run me/name --dry-run",
    "ServeResult": "serve run --port 0",
    "UiExitResult": "ui --port 0",
    "DoctorReport": "doctor",
    "ExplainResult": "explain disk-full",
    "NoPageResult": "explain how much does it cost",
    "ErrorPagesResult": "explain",
}
"""A command line whose output has the type; `{new}` is a path that does not exist, `{kto}` a run of that task."""
CHECKED_ELSEWHERE = {"PushResult": "tests/export/test_hub.py"}
SLOW = ("CompareResult", "TuneResult", "KTOEvalResult", "RewardEvalResult", "ChooseResult",
        "PolicyEvalResult", "ClassificationEvalResult", "GpuComparisonResult")  # fmt: skip


def make_row(task: str, i: int) -> dict[str, object]:
    """A row of a task; no two are equal."""
    question, answer = [{"role": "user", "content": f"say {i}"}], [{"role": "assistant", "content": f"abc {i}"}]
    other = [{"role": "assistant", "content": f"xyz {i}"}]
    return {
        "kto": {"prompt": question, "completion": answer, "label": bool(i % 2)},
        "reward": {"prompt": question, "chosen": answer, "rejected": other},
        "grpo": {"prompt": question, "answer": i},
        "classification": {"text": f"wave {i}", "label": ("sea", "wood")[i % 2]},
    }[task]


def test_pages_are_fresh():
    files = runpy.run_path(str(ROOT / "docs/internals/make_schemas.py"))["make_files"]()
    stale = [file.name for file, text in files.items() if not file.is_file() or file.read_text("utf-8") != text]
    assert stale == [], "run python docs/internals/make_schemas.py"
    assert {f.stem for f in (ROOT / "docs/schemas").glob("*.json")} == set(JSON_TYPES)


def test_every_command_with_json_has_a_schema():
    group = typer.main.get_command(app)
    context = typer.Context(group)
    commands = {name: group.resolve_command(context, [name])[1] for name in group.list_commands(context)}
    printing = {name for name, command in commands.items() if any("--json" in param.opts for param in command.params)}
    assert printing == set(JSON_TYPES)


def test_every_result_type_is_checked():
    types = {cls.__name__ for command in JSON_TYPES for cls in load_json_types(command)}
    assert types == {*COMMAND_LINES, *CHECKED_ELSEWHERE}


@pytest.mark.parametrize("command", JSON_TYPES)
def test_every_key_has_a_meaning(command):
    rows = runpy.run_path(str(ROOT / "docs/internals/make_schemas.py"))["list_rows"]
    schema = make_command_output_schema(command)
    for result in schema.get("anyOf", [schema]):
        jsonschema.Draft202012Validator.check_schema(result)
        assert [key for key, _, meaning in rows(result) if not meaning] == []


@pytest.fixture
def start_nothing(monkeypatch, tmp_path):
    """Measure no machine, and end a server at once."""
    monkeypatch.setenv("SLIMTUNE_BENCH", str(tmp_path / "bench.json"))
    monkeypatch.setattr("slimtune.hardware.speed_benchmark.measure_machine", lambda device: FOUND)
    monkeypatch.setattr("uvicorn.Server.run", lambda _, sockets: sockets[0].close())


@pytest.fixture(scope="module")
def train_task(home, slimtune):
    """Return the run of a task: it is trained once."""
    runs: dict[str, Path] = {}

    def train(task: str) -> Path:
        if task not in runs:
            runs[task] = home / task
            rows = write_jsonl(home / f"{task}.jsonl", (make_row(task, i) for i in range(24)))
            words = ("train", "--model", home / "base", "--data", rows, "--task", task, "--out", runs[task])
            if task == "grpo":
                words += ("--reward", "length:3", "--set", "task.max_completion_length=4")
            done = slimtune(*words, "--max-steps", 1, "--dtype", "float32", "--set", "data.validation_fraction=0.25")
            assert done.exit_code == 0, done.output
        return runs[task]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMAND_LINES]
)
@pytest.mark.usefixtures("start_nothing")
def test_output_has_its_schema(name, home, slimtune, train_task, tmp_path, monkeypatch):
    line = COMMAND_LINES[name]
    runs = {task: train_task(task) for task in ("kto", "classification", "reward", "grpo") if f"{{{task}}}" in line}
    here = shutil.copytree(home, tmp_path / "here")  # some commands write into the run, which other tests read
    monkeypatch.chdir(here)
    command, *words = shlex.split(line.format(new=tmp_path / "new", **runs))
    done = slimtune(command, *words, "--json", stdin="hello\n")
    assert done.exit_code in (0, 1), done.output
    (cls,) = [c for c in load_json_types(command) if c.__name__ == name]
    jsonschema.validate(json.loads(done.stdout), make_json_schema(cls))
