"""The verbs: parse → library call → print. The rooms they call are stood in for; their own tests prove them."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.cli.train import FLAGS
from slimtune.config import Recipe
from slimtune.config.errors import fields_of, flag_of
from slimtune.evaluation.forgetting import BUILT_IN_TEXT

RESULT = {
    "run": "runs/x", "steps": 3, "trained_tokens": 4000, "supervised_tokens": 2000, "tokens_per_second": 200.0,
    "train_loss": 2.0, "validation_loss": 1.5, "adapter_bytes": 2**20, "trainable_params": 10, "total_params": 1000,
    "peak_bytes": 2**30, "load_seconds": 1.0, "prepare_seconds": 2.0,
}  # fmt: skip
MEASURED = {
    "base_loss": 4.0, "tuned_loss": 3.0, "loss_reduction": 1.0, "loss_reduction_ci95": [0.9, 1.1], "base_perplexity": 54.6,
    "tuned_perplexity": 20.1, "base_accuracy": 0.25, "tuned_accuracy": 0.375, "accuracy_gain": 0.125, "rows": 90,
    "tokens": 3000, "prompt_dependence": {"base": 0.13, "tuned": 0.16, "tuned_ci95": [0.11, 0.22]},
    "forgetting": {"change": 0.031, "change_ci95": [0.02, 0.04], "budget": 0.1},
    "generations": [{"prompt": [{"content": "Hi [b]"}], "reference": "Ho", "base": "Hm", "tuned": "Ha"}],
    "generation_summary": {"ended": {"base": 0.5, "tuned": 1.0}},
    "tasks": {"odd": {"acc": {"base": 0.25, "base_stderr": 0.04, "tuned": 0.5, "tuned_stderr": None}}},
    "verdict": {"passed": True, "reasons": []},
}  # fmt: skip
MERGED = {
    "out": "m",
    "bytes": 2**20,
    "dtype": "float32",
    "seconds": 2.0,
    "max_difference": 1e-6,
    "mean_difference": 1e-7,
    "effect": 0.5,
}


def slimtune(*args: str, typed: str = ""):
    return CliRunner().invoke(app, list(args), input=typed)


@pytest.fixture
def room(monkeypatch):
    """Return `stand_in(module, name, result) -> calls`: a function replaced by one that notes its calls."""

    def stand_in(module: str, name: str, result: dict) -> list:
        calls: list = []

        def noted(*args, **kwargs):
            calls.append((args, kwargs))
            return result

        fake = types.ModuleType(f"slimtune.{module}")
        setattr(fake, name, noted)
        monkeypatch.setitem(sys.modules, f"slimtune.{module}", fake)
        return calls

    return stand_in


@pytest.fixture
def speaker(monkeypatch):
    """Stand in for the model: it answers with who it is and what it was told."""
    opened: list = []

    class Speaker:
        @classmethod
        def open(cls, run):
            opened.append(run)
            return cls()

        def stream(self, messages, *, tuned, max_new_tokens, temperature, seed):
            opened.append((max_new_tokens, temperature, seed))
            told = " / ".join(m["content"] for m in messages)
            yield from ["tuned" if tuned else "base", f" heard {told}"]

    fake = types.ModuleType("slimtune.evaluation.generate")
    fake.Speaker = Speaker
    monkeypatch.setitem(sys.modules, "slimtune.evaluation.generate", fake)
    return opened


@pytest.fixture
def rows(tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.touch()
    return file


# --- the whole


def test_help_is_fast_and_imports_no_torch():
    # The process's own seconds: on a busy machine the wall clock counts other work too.
    code = """
import sys, time
from slimtune.cli import app
try:
    app(args=["--help"])
except SystemExit as e:
    heavy = {"torch", "transformers", "pydantic", "datasets", "peft"} & set(sys.modules)
    print(time.process_time(), file=sys.stderr)
    sys.exit(e.code or (f"imports {heavy}" if heavy else 0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    assert float(done.stderr) < 0.5


def test_every_verb_has_help():
    for verb in ("plan", "gpus", "data", "train", "eval", "generate", "chat", "merge", "methods", "doctor"):
        done = slimtune(verb, "--help")
        assert done.exit_code == 0
        assert "--json" in done.stdout


def test_no_verb_and_version():
    assert slimtune().exit_code == 2
    assert "Usage:" in slimtune().stderr
    assert slimtune("--version").stdout.startswith("slimtune 0.")


def test_an_unknown_verb():
    done = slimtune("trian")
    assert done.exit_code == 2
    assert "Did you mean 'train'?" in done.stderr


# --- train


def test_train_from_flags_alone(room, rows, tmp_path):
    calls = room("train.run", "train", RESULT)
    done = slimtune(
        "train", "--model", "m", "--data", str(rows), "--out", "o", "--method", "lora", "--rank", "4", "--alpha", "6",
        "--epochs", "2", "--max-steps", "9", "--lr", "1e-3", "--batch-size", "2", "--max-seq-len", "99", "--too-long",
        "error", "--dtype", "fp32", "--seed", "7", "--validation", str(rows), "--trust-remote-code",
        "--set", "train.packing=false", "--set", "method.targets=[q_proj]",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    ((recipe,), how), = calls  # fmt: skip
    assert callable(how.pop("planner"))
    assert how == {"resume": False, "init_adapter": None, "force": False}
    config = recipe.method_config()
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 6, ["q_proj"])
    train, data, model = recipe.train, recipe.data, recipe.model
    assert (train.epochs, train.max_steps, train.learning_rate, train.batch_size) == (2.0, 9, 1e-3, 2)
    assert (train.seed, train.packing, recipe.output_dir) == (7, False, Path("o"))
    assert (data.max_seq_len, data.on_overlong, data.train, data.validation) == (99, "error", rows, rows)
    assert (model.name, model.dtype, model.trust_remote_code) == ("m", "float32", True)
    for part in ("1.5000", "1.0 MiB", "1.00 %", "runs/x/adapter", "slimtune eval runs/x"):
        assert part in done.stdout


def test_flags_override_the_recipe_and_set_overrides_flags(room, rows, tmp_path):
    calls = room("train.run", "train", RESULT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: rows.jsonl\nout: o\nmethod: {r: 4}\ntrain: {epochs: 5, seed: 1}\n")
    done = slimtune("train", str(recipe), "--rank", "8", "--epochs", "3", "--set", "train.epochs=2", "--json")
    assert json.loads(done.stdout) == RESULT
    ((made,), _), = calls  # fmt: skip
    assert (made.method_config().r, made.train.epochs, made.train.seed, made.data.train) == (8, 2.0, 1, rows)


def test_resume_and_continue(room, rows, tmp_path):
    calls = room("train.run", "train", RESULT)
    base = ["train", "--model", "m", "--data", str(rows), "--out", "o"]
    assert slimtune(*base, "--resume").exit_code == 0
    assert slimtune(*base, "--continue", "runs/a").exit_code == 0
    assert [{k: v for k, v in how.items() if k != "planner"} for _, how in calls] == [
        {"resume": True, "init_adapter": None, "force": False},
        {"resume": False, "init_adapter": Path("runs/a"), "force": False},
    ]
    done = slimtune(*base, "--resume", "--continue", "runs/a")
    assert done.exit_code == 2
    assert "--resume and --continue are both given" in done.stderr
    assert len(calls) == 2


def test_a_folder_with_another_run_is_refused_at_once(room, rows, tmp_path):
    calls = room("train.run", "train", RESULT)
    base = ["train", "--model", "m", "--data", str(rows), "--out", str(tmp_path)]
    (tmp_path / "recipe.yaml").touch()
    done = slimtune(*base)
    assert (done.exit_code, calls) == (2, [])
    assert "already holds another run" in done.stderr
    assert "--resume" in done.stderr
    assert slimtune(*base, "--resume").exit_code == 0


def test_train_says_all_that_is_missing():
    done = slimtune("train", "--rank", "0")
    assert done.exit_code == 2
    for part in ("(flag --model)", "(flag --data)", "(flag --out)", "method.r: got 0"):
        assert part in done.stderr
    asked = slimtune("train", "--json")
    assert asked.exit_code == 2
    assert json.loads(asked.stdout)["error"]["kind"] == "RecipeError"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere.yaml"], "there is no recipe file 'nowhere.yaml'"),
        (["--data", "no/rows.jsonl"], "data.train: there is no file"),
        (["--dtype", "bf17"], "model.dtype: got 'bf17'"),
        (["--too-long", "cut"], "data.on_overlong: got 'cut'"),
        (["--method", "lore"], "did you mean 'lora'"),
        (["--set", "train.epocs=1"], "did you mean 'epochs'"),
        (["--set", "nonsense"], "path.to.field=value"),
        (["--epochs", "many"], "Invalid value for '--epochs'"),
        (["--lr", "-1"], "train.learning_rate: got -1.0"),
        (["--rnak", "3"], "--rank"),
        (["--targets"], "No such option"),
    ],
)
def test_faulty_train_flags(room, rows, args, says):
    calls = room("train.run", "train", RESULT)
    done = slimtune("train", "--model", "m", "--data", str(rows), "--out", "o", *args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""
    assert calls == []


def test_the_flags_are_those_the_recipe_names():
    options = {o for p in get_command(app).commands["train"].params for o in p.opts}
    named = {flag_of(info): path for path, info in fields_of(Recipe) if flag_of(info)}
    assert set(named) <= options
    assert named.pop("--map") == "data.map"  # its roles are fields of their own
    ours = {f"--{name.replace('_', '-')}": path for name, path in FLAGS.items()}
    assert {f: p for f, p in ours.items() if f not in ("--rank", "--alpha")} == named


# --- eval, merge


def test_eval(room):
    calls = room("evaluate.held_out", "evaluate", MEASURED)
    done = slimtune("eval", "runs/x")
    assert done.exit_code == 0
    plain = {"any_prompt": False, "budget": 0.1, "generate": 0, "max_new_tokens": 128, "checks": [], "tasks": []}
    plain |= {"split": "test", "data": None, "general": BUILT_IN_TEXT, "tasks_path": None}
    assert calls == [((Path("runs/x"),), plain)]
    for part in (
        "base", "4.0000", "3.0000", "54.60", "37.5 %", "0.9000 to 1.1000", "90 rows", "3000 supervised tokens",
        "0.1300 nats a token to the base, 0.1600 (0.1100 to 0.2200) to the tuned model",
        "forgotten on general text: 0.0310 (0.0200 to 0.0400) nats a token, budget 0.1",
        "Hi [b]\nreference: Ho\nbase: Hm\ntuned: Ha", "0.2500 ± 0.0400", "verdict: the tuned model is better",
    ):  # fmt: skip
        assert part in done.stdout
    asked = slimtune("eval", "runs/x", "--split", "validation", "--data", "d.jsonl", "--json")
    assert json.loads(asked.stdout) == MEASURED
    assert calls[1] == ((Path("runs/x"),), {**plain, "split": "validation", "data": Path("d.jsonl")})
    slimtune("eval", "runs/x", "--any-prompt", "--general", "none", "--forgetting-budget", "0.3", "--generate", "4",
             "--max-new-tokens", "9", "--check", "json", "--check", "regex:a,b", "--tasks", "a, b",
             "--tasks-path", "t")  # fmt: skip
    assert calls[2][1] == {
        "split": "test", "data": None, "any_prompt": True, "general": None, "budget": 0.3, "generate": 4,
        "max_new_tokens": 9, "checks": ["json", "regex:a,b"], "tasks": ["a", "b"], "tasks_path": Path("t"),
    }  # fmt: skip
    slimtune("eval", "runs/x", "--general", "own.txt")
    assert calls[3][1]["general"] == Path("own.txt")
    wrong = slimtune("eval", "runs/x", "--split", "tset")
    assert wrong.exit_code == 2
    assert "'tset' is not one of" in wrong.stderr
    assert slimtune("eval").exit_code == 2


def test_eval_says_no(room):
    verdict = {"passed": False, "reasons": ["it is worse", "it forgot"]}
    room(
        "evaluate.held_out", "evaluate", {**MEASURED, "prompt_dependence": None, "forgetting": None, "verdict": verdict}
    )
    done = slimtune("eval", "runs/x")
    assert done.exit_code == 1
    assert "verdict: no: it is worse; it forgot" in done.stdout
    assert done.stderr == ""
    asked = slimtune("eval", "runs/x", "--json")
    assert asked.exit_code == 1
    assert json.loads(asked.stdout)["verdict"] == verdict


def test_merge(room):
    calls = room("export.merge", "merge", MERGED)
    done = slimtune("merge", "runs/x", "--out", "m", "--dtype", "float32")
    assert calls == [((Path("runs/x"), Path("m")), {"dtype": "float32"})]
    assert "m: 1.0 MiB in float32, 2.0 s; merged and adapted model differ by 1e-07 nats on average" in done.stdout
    assert "(1e-06 at most), where the adapter changes the base by 0.5" in done.stdout
    assert json.loads(slimtune("merge", "runs/x", "--out", "m", "--json").stdout) == MERGED
    missing = slimtune("merge", "runs/x")
    assert missing.exit_code == 2
    assert "--out" in missing.stderr


# --- generate, chat


def test_generate(speaker):
    done = slimtune("generate", "runs/x", "What is love?")
    assert (done.exit_code, done.stdout) == (0, "tuned heard What is love?\n")
    assert speaker == [Path("runs/x"), (128, 0.0, 0)]


def test_generate_side_by_side_with_a_system_message(speaker):
    done = slimtune("generate", "runs/x", "Hi", "--side-by-side", "--system", "Be brief", "--max-new-tokens", "5",
                    "--temperature", "0.7", "--seed", "3")  # fmt: skip
    assert done.stdout == "base: base heard Be brief / Hi\ntuned: tuned heard Be brief / Hi\n"
    assert speaker[1:] == [(5, 0.7, 3)] * 2


def test_generate_json(speaker):
    done = slimtune("generate", "runs/x", "Hi", "--side-by-side", "--json")
    said = json.loads(done.stdout)
    assert (said["prompt"], said["base"], said["tuned"]) == ("Hi", "base heard Hi", "tuned heard Hi")
    assert "base" not in json.loads(slimtune("generate", "runs/x", "Hi", "--json").stdout)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["runs/x"], "PROMPT"),
        (["runs/x", "Hi", "--temperature", "-1"], "--temperature"),
        (["runs/x", "Hi", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_faulty_generate(speaker, args, says):
    done = slimtune("generate", *args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert speaker == []


def test_chat_remembers_each_voices_own_answers(speaker):
    done = slimtune("chat", "runs/x", "--side-by-side", "--json", typed="one\n\n two \n/new\nthree\n/exit\nfour\n")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["turns"] == [
        {"user": "one", "base": "base heard one", "tuned": "tuned heard one"},
        {
            "user": "two",
            "base": "base heard one / base heard one / two",
            "tuned": "tuned heard one / tuned heard one / two",
        },
        {"user": "three", "base": "base heard three", "tuned": "tuned heard three"},
    ]


def test_chat_ends_with_its_input(speaker):
    done = slimtune("chat", "runs/x", "--system", "S", typed="one")
    assert (done.exit_code, done.stdout) == (0, "tuned heard S / one\n")


# --- doctor


def test_doctor():
    said = json.loads(slimtune("doctor", "--json").stdout)
    assert said["libraries"]["torch"]
    assert said["libraries"]["slimtune"]
    assert said["devices"][0] == "cpu"
    assert said["memory_free_bytes"] > 0
    assert said["disk_free_bytes"] > 0
    assert {"demo", "quantization", "test"} <= set(said["extras"])
    assert said["dtype"] in ("float32", "bfloat16")
    assert "chosen" in slimtune("doctor").stdout
