"""The commands parse, call the library and print. The library is replaced by stand-ins: its own tests prove it."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import COMMANDS, app
from slimtune.config import Recipe, aliases
from slimtune.config.schema import iterate_settings
from slimtune.evaluation.evaluate import EvalSettings
from slimtune.evaluation.forgetting import BUILT_IN_TEXT

RESULT = {
    "run": "runs/x", "steps": 3, "trained_tokens": 4000, "supervised_tokens": 2000, "tokens_per_second": 200.0,
    "train_loss": 2.0, "validation_loss": 1.5, "adapter_bytes": 2**20, "trainable_params": 10, "total_params": 1000,
    "peak_bytes": 2**30, "load_seconds": 1.0, "prepare_seconds": 2.0,
}  # fmt: skip
MEASURED = {
    "base_loss": 4.0, "tuned_loss": 3.0, "loss_reduction": 1.0, "loss_reduction_ci95": [0.9, 1.1],
    "base_perplexity": 54.6, "tuned_perplexity": 20.1, "base_accuracy": 0.25, "tuned_accuracy": 0.375,
    "accuracy_gain": 0.125, "rows": 90, "tokens": 3000,
    "prompt_dependence": {"base": 0.13, "tuned": 0.16, "tuned_ci95": [0.11, 0.22]},
    "forgetting": {"change": 0.031, "change_ci95": [0.02, 0.04], "budget": 0.1},
    "generations": [{"prompt": [{"content": "Hi [b]"}], "reference": "Ho", "base": "Hm", "tuned": "Ha"}],
    "generation_summary": {"ended": {"base": 0.5, "tuned": 1.0}},
    "tasks": {"odd": {"acc": {"base": 0.25, "base_stderr": 0.04, "tuned": 0.5, "tuned_stderr": None}}},
    "verdict": {"passed": True, "reasons": []},
}  # fmt: skip


def slimtune(*args: str, stdin: str = ""):
    return CliRunner().invoke(app, list(args), input=stdin, env={"COLUMNS": "80"})


@pytest.fixture
def stand_in(monkeypatch):
    """Return `stand_in(module, name, result) -> calls`: replaces a function by one that records its calls."""

    def replace(module: str, name: str, result: dict) -> list:
        calls: list = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return result

        fake = types.ModuleType(f"slimtune.{module}")
        setattr(fake, name, record)
        monkeypatch.setitem(sys.modules, f"slimtune.{module}", fake)
        return calls

    return replace


@pytest.fixture
def rows(tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.touch()
    return file


# --- all commands


@pytest.mark.parametrize(
    ("args", "code", "seconds"),
    [(["--help"], 0, 0.5), (["trian"], 2, 1), (["train", "--help"], 0, 1.2), (["train", "--rnak", "3"], 2, 1.2)],
)
def test_start_up_is_fast_and_imports_no_torch(args, code, seconds):
    # The seconds of the process: on a busy machine the wall clock counts other work, too.
    script = f"""
import sys, time
from slimtune.cli import app
try:
    app(args={args})
except SystemExit as e:
    heavy = {{"torch", "transformers", "datasets", "peft"}} & set(sys.modules)
    print(time.process_time(), heavy, file=sys.stderr)
    sys.exit(e.code if not heavy else 99)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert float(done.stderr.splitlines()[-1].split()[0]) < seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_in_80_columns(command):
    done = slimtune(command, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_every_setting_has_a_flag_with_its_help():
    text = " ".join(slimtune("train", "--help").stdout.split())
    for setting in iterate_settings(Recipe):
        assert f"{setting.flag} " in text
        assert setting.help[1:] in text
    assert text.index("Base model:") < text.index("Data:") < text.index("Method:") < text.index("Training:")


def test_old_flags_lead_to_flags_that_exist():
    text = "".join(slimtune(command, "--help").stdout for command in COMMANDS)
    missing = [new for new in aliases.FLAGS.values() if new not in text]
    assert missing == []


def test_no_command_and_version():
    assert slimtune().exit_code == 2
    assert "Usage:" in slimtune().stderr
    assert slimtune("--version").stdout.startswith("slimtune 0.")


# --- train


def test_train_from_flags_alone(stand_in, rows):
    calls = stand_in("training.train", "train", RESULT)
    done = slimtune(
        "train", "--model", "m", "--data", str(rows), "--out", "o", "--method", "lora", "--rank", "4", "--alpha", "6",
        "--epochs", "2", "--max-steps", "9", "--lr", "1e-3", "--batch-size", "2", "--max-seq-len", "99",
        "--on-overlong", "error", "--dtype", "fp32", "--seed", "7", "--validation", str(rows), 
        "--trust-remote-code", "--no-packing",
        "--column", "messages=talk", "--report-to", "wandb", "--revision", "null", "--set", "method.targets=[q_proj]",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    ((recipe,), how), = calls  # fmt: skip
    assert callable(how.pop("planner"))
    assert how == {"resume": False, "init_adapter": None, "force": False}
    config = recipe.method_config()
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 6, ["q_proj"])
    train, data, model = recipe.train, recipe.data, recipe.model
    assert (train.epochs, train.max_steps, train.learning_rate, train.batch_size) == (2.0, 9, 1e-3, 2)
    assert (train.seed, train.packing, train.report_to, recipe.output_dir) == (7, False, ["wandb"], Path("o"))
    assert (data.max_seq_len, data.on_overlong, data.train, data.validation) == (99, "error", rows, rows)
    assert data.columns == {"messages": "talk"}
    assert (model.name, model.dtype, model.trust_remote_code, model.revision) == ("m", "float32", True, None)
    for part in ("1.5000", "1.0 MiB", "1.00 %", "runs/x/adapter", "slimtune eval runs/x"):
        assert part in done.stdout


def test_flags_override_the_recipe_and_set_overrides_flags(stand_in, rows, tmp_path):
    calls = stand_in("training.train", "train", RESULT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: rows.jsonl\noutput_dir: o\nmethod: {r: 4}\ntrain: {epochs: 5, seed: 1}\n")
    done = slimtune("train", str(recipe), "--rank", "8", "--epochs", "3", "--set", "train.epochs=2", "--json")
    assert json.loads(done.stdout) == RESULT
    ((loaded,), _), = calls  # fmt: skip
    assert (loaded.method_config().r, loaded.train.epochs, loaded.train.seed, loaded.data.train) == (8, 2.0, 1, rows)


def test_resume_and_init_adapter(stand_in, rows):
    calls = stand_in("training.train", "train", RESULT)
    base = ["train", "--model", "m", "--data", str(rows), "--out", "o"]
    assert slimtune(*base, "--resume").exit_code == 0
    assert slimtune(*base, "--init-adapter", "runs/a").exit_code == 0
    assert [(how["resume"], how["init_adapter"]) for _, how in calls] == [(True, None), (False, Path("runs/a"))]
    done = slimtune(*base, "--resume", "--init-adapter", "runs/a")
    assert done.exit_code == 2
    assert "--resume and --init-adapter are both given" in done.stderr
    assert len(calls) == 2


def test_a_folder_with_another_run_is_refused(stand_in, rows, tmp_path):
    calls = stand_in("training.train", "train", RESULT)
    base = ["train", "--model", "m", "--data", str(rows), "--out", str(tmp_path)]
    (tmp_path / "recipe.yaml").touch()
    done = slimtune(*base)
    assert (done.exit_code, calls) == (2, [])
    assert "--resume" in done.stderr
    assert slimtune(*base, "--resume").exit_code == 0


def test_train_lists_all_that_is_missing():
    done = slimtune("train", "--rank", "0", "--json")
    assert done.exit_code == 2
    for part in ("(flag --model)", "(flag --data)", "(flag --out)", "method.r: got 0"):
        assert part in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "RecipeError"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nowhere.yaml"], "there is no recipe file 'nowhere.yaml'"),
        (["--data", "no/rows.jsonl"], "data.train: there is no file"),
        (["--dtype", "bf17"], "model.dtype: got 'bf17'; did you mean 'bfloat16'?"),
        (["--method", "lore"], "did you mean 'lora'"),
        (["--set", "train.epocs=1"], "did you mean 'epochs'"),
        (["--set", "nonsense"], "path.to.field=value"),
        (["--column", "output"], "--column got 'output'"),
        (["--epochs", "many", "--lr", "-1"], "train.epochs: got 'many'; expected: a number, above 0"),
        (["--epochs", "many", "--lr", "-1"], "train.learning_rate: got -1; expected: a number, above 0"),
        (["--rnak", "3"], "--rank"),
        (["--targets"], "No such option"),
    ],
)
def test_wrong_train_flags(stand_in, rows, args, text):
    calls = stand_in("training.train", "train", RESULT)
    done = slimtune("train", "--model", "m", "--data", str(rows), "--out", "o", *args)
    assert done.exit_code == 2
    assert text in done.stderr
    assert (done.stdout, calls) == ("", [])


# --- eval, merge


def test_eval_passes_its_options_on(monkeypatch):
    calls: list = []

    def evaluate(run, settings):
        calls.append((run, settings))
        return MEASURED

    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", evaluate)
    slimtune("eval", "runs/x")
    plain = {"checks": [], "tasks": []}
    assert calls[0] == (Path("runs/x"), EvalSettings(general_text=BUILT_IN_TEXT, **plain))
    slimtune("eval", "runs/x", "--split", "validation", "--data", "d.jsonl", "--general-text", "own.txt")
    assert calls[1][1] == EvalSettings(split="validation", data=Path("d.jsonl"), general_text=Path("own.txt"), **plain)
    slimtune("eval", "runs/x", "--skip-prompt-test", "--general-text", "none", "--forgetting-budget", "0.3",
             "--generate", "4", "--max-new-tokens", "9", "--check", "json", "--check", "regex:a,b", "--tasks", "a, b",
             "--tasks-path", "t")  # fmt: skip
    assert calls[2][1] == EvalSettings(
        skip_prompt_test=True, general_text=None, forgetting_budget=0.3, generate=4, max_new_tokens=9,
        checks=["json", "regex:a,b"], tasks=["a", "b"], tasks_path=Path("t"),
    )  # fmt: skip


def test_eval_prints_its_result(monkeypatch):
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda run, settings: MEASURED)
    done = slimtune("eval", "runs/x")
    assert done.exit_code == 0
    for part in (
        "4.0000", "3.0000", "54.60", "37.5 %", "0.9000 to 1.1000", "90 rows", "3000 supervised tokens",
        "0.1300 nats per token for the base, 0.1600 (0.1100 to 0.2200) for the tuned model",
        "forgotten on general text: 0.0310 (0.0200 to 0.0400) nats per token, budget 0.1",
        "Hi [b]\nreference: Ho\nbase: Hm\ntuned: Ha", "0.2500 ± 0.0400", "verdict: the tuned model is better",
    ):  # fmt: skip
        assert part in done.stdout
    assert json.loads(slimtune("eval", "runs/x", "--json").stdout) == MEASURED


def test_eval_with_a_negative_verdict(monkeypatch):
    verdict = {"passed": False, "reasons": ["it is worse", "it forgot"]}
    result = {**MEASURED, "prompt_dependence": None, "forgetting": None, "verdict": verdict}
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda run, settings: result)
    done = slimtune("eval", "runs/x")
    assert (done.exit_code, done.stderr) == (1, "")
    assert "verdict: no: it is worse; it forgot" in done.stdout
    asked = slimtune("eval", "runs/x", "--json")
    assert (asked.exit_code, json.loads(asked.stdout)["verdict"]) == (1, verdict)
    wrong = slimtune("eval", "runs/x", "--split", "tset")
    assert wrong.exit_code == 2
    assert "'tset' is not one of" in wrong.stderr


def test_merge(stand_in):
    merged = {"out": "m", "bytes": 2**20, "dtype": "float32", "seconds": 2.0, "max_difference": 1e-6,
              "mean_difference": 1e-7, "effect": 0.5}  # fmt: skip
    calls = stand_in("export.merge", "merge", merged)
    done = slimtune("merge", "runs/x", "--out", "m", "--dtype", "float32")
    assert calls == [((Path("runs/x"), Path("m")), {"dtype": "float32"})]
    assert "m: 1.0 MiB in float32, 2.0 s" in done.stdout
    assert json.loads(slimtune("merge", "runs/x", "--out", "m", "--json").stdout) == merged
    missing = slimtune("merge", "runs/x")
    assert missing.exit_code == 2
    assert "--out" in missing.stderr


# --- generate, chat, doctor


@pytest.fixture
def generator(monkeypatch) -> list:
    """Replace the model: it answers with its name and the messages it got."""
    calls: list = []

    class Generator:
        @classmethod
        def open(cls, run):
            calls.append(run)
            return cls()

        def stream(self, messages, *, tuned, max_new_tokens, temperature, seed):
            calls.append((max_new_tokens, temperature, seed))
            yield from ["tuned" if tuned else "base", f" got {' / '.join(m['content'] for m in messages)}"]

    fake = types.ModuleType("slimtune.evaluation.generate")
    fake.Generator = Generator
    monkeypatch.setitem(sys.modules, "slimtune.evaluation.generate", fake)
    return calls


def test_generate(generator):
    done = slimtune("generate", "runs/x", "What is love?")
    assert (done.exit_code, done.stdout) == (0, "tuned got What is love?\n")
    assert generator == [Path("runs/x"), (128, 0.0, 0)]
    assert "base" not in json.loads(slimtune("generate", "runs/x", "Hi", "--json").stdout)


def test_generate_side_by_side(generator):
    args = ["generate", "runs/x", "Hi", "--side-by-side", "--system", "Be brief", "--max-new-tokens", "5"]
    args += ["--temperature", "0.7", "--seed", "3"]
    assert slimtune(*args).stdout == "base: base got Be brief / Hi\ntuned: tuned got Be brief / Hi\n"
    assert generator[1:] == [(5, 0.7, 3)] * 2
    answers = json.loads(slimtune(*args, "--json").stdout)
    assert (answers["prompt"], answers["base"]) == ("Hi", "base got Be brief / Hi")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["runs/x"], "PROMPT"),
        (["runs/x", "Hi", "--temperature", "-1"], "--temperature"),
        (["runs/x", "Hi", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_generate(generator, args, text):
    done = slimtune("generate", *args)
    assert done.exit_code == 2
    assert text in done.stderr
    assert generator == []


def test_each_model_of_a_chat_remembers_its_own_answers(generator):
    done = slimtune("chat", "runs/x", "--side-by-side", "--json", stdin="one\n\n two \n/new\nthree\n/exit\nfour\n")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["turns"] == [
        {"user": "one", "base": "base got one", "tuned": "tuned got one"},
        {"user": "two", "base": "base got one / base got one / two", "tuned": "tuned got one / tuned got one / two"},
        {"user": "three", "base": "base got three", "tuned": "tuned got three"},
    ]


def test_a_chat_ends_with_its_input(generator):
    done = slimtune("chat", "runs/x", "--system", "S", stdin="one")
    assert (done.exit_code, done.stdout) == (0, "tuned got S / one\n")


def test_doctor():
    report = json.loads(slimtune("doctor", "--json").stdout)
    assert report["libraries"]["torch"]
    assert report["devices"][0] == "cpu"
    assert min(report["memory_free_bytes"], report["disk_free_bytes"]) > 0
    assert "test" in report["extras"]
    lines = dict(line.split(maxsplit=1) for line in slimtune("doctor").stdout.splitlines())
    assert lines["torch"].strip() == report["libraries"]["torch"]
    assert lines["auto"].endswith(report["dtype"])
