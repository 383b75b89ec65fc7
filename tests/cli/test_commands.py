"""The commands parse, call the library and print. The library is replaced: its own tests prove it."""

import io
import itertools
import json
import logging
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hand_results import complete_json
from rich.console import Console
from train_results import make_train_result

from slimtune.cli import COMMANDS, common
from slimtune.cli.common import ConsoleLogHandler, print_fields
from slimtune.cli.generate_command import AnswerPrinter
from slimtune.cli.json_schemas import make_json_schema
from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.config import Recipe
from slimtune.core.foundation.json_results import from_json_dict, to_json_dict
from slimtune.core.foundation.progress_bars import track_progress
from slimtune.diagnostics import machine_facts as facts
from slimtune.diagnostics.machine_facts import MachineFacts, NvidiaSmiGpu, TorchFacts
from slimtune.evaluation.eval_result import ClassificationEvalResult, EvalResult, TextOrPairEvalResult
from slimtune.evaluation.evaluate import EvalSettings
from slimtune.evaluation.general_text import BUILT_IN_TEXT
from slimtune.export.export_results import MergeResult

RESULT = make_train_result(
    steps=3, trained_tokens=4000, supervised_tokens=2000, tokens_per_second=200.0, train_loss=2.0, validation_loss=1.5,
    adapter_bytes=2**20, trainable_params=10, total_params=1000, best_step=2, peak_bytes=2**30, prepare_seconds=2.0,
)  # fmt: skip
MEASURED = {
    "task": "sft",
    "base_loss": 4.0, "tuned_loss": 3.0, "loss_reduction": 1.0, "loss_reduction_ci95": [0.9, 1.1],
    "base_perplexity": 54.6, "tuned_perplexity": 20.1, "base_accuracy": 0.25, "tuned_accuracy": 0.375,
    "accuracy_gain": 0.125, "rows": 90, "tokens": 3000,
    "prompt_dependence": {"base": 0.13, "tuned": 0.16, "tuned_ci95": [0.11, 0.22]},
    "forgetting": {"change": 0.031, "change_ci95": [0.02, 0.04], "budget": 0.1, "within": True},
    "generations": [{"prompt": [{"content": "Hi [b]"}], "reference": "Ho", "base": "Hm", "tuned": "Ha"}],
    "generation_summary": {"ended": {"base": 0.5, "tuned": 1.0}},
    "win_rate": {"prompts": 9, "wins": 5, "losses": 2, "ties": 1, "unclear": 1, "win_rate": 0.6875,
                 "win_rate_ci95": [0.4, 0.9], "consistent": 0.75, "base_characters": 30.2, "tuned_characters": 60.4,
                 "longer_won": None},
    "tasks": {"odd": {"acc": {"base": 0.25, "base_stderr": 0.04, "tuned": 0.5, "tuned_stderr": None}}},
    "verdict": {"passed": True, "reasons": [], "warning": ""},
}  # fmt: skip

MERGED = from_json_dict(MergeResult, complete_json(make_json_schema(MergeResult), {
    "out": "m", "bytes": 2**20, "dtype": "float32", "seconds": 2.0, "max_difference": 1e-6, "mean_difference": 1e-7,
    "effect": 0.5, "strength": 0.75,
}))  # fmt: skip


@pytest.fixture(autouse=True)
def names_exist(monkeypatch):
    """Take every base, run and file of rows to exist."""
    monkeypatch.setattr("slimtune.cli.input_checks.require_base_exists", lambda *_: None)
    monkeypatch.setattr("slimtune.core.training.run_dir.find_adapter_folder", lambda path: path)
    monkeypatch.setattr("slimtune.extras.row_files.list_dataset_file_names_with_readers", lambda *_: [])


@pytest.fixture
def replace(monkeypatch):
    """Return `replace(module, name, result) -> calls`: replaces a function by one that records its calls."""

    def replace_function(module: str, name: str, result: dict) -> list:
        calls: list = []

        def record(*args, **settings):
            calls.append((args, settings))
            return result

        fake = types.ModuleType(f"slimtune.{module}")
        setattr(fake, name, record)
        monkeypatch.setitem(sys.modules, f"slimtune.{module}", fake)
        return calls

    return replace_function


# --- all commands


@pytest.mark.parametrize(
    ("args", "code", "seconds"),
    [
        (["--help"], 0, 0.5),
        (["train", "--help"], 0, 1.2),
        (["methods"], 0, 1.2),
        (["gpus", "rtx-5090"], 0, 1.2),
    ],
)
def test_start_is_fast_without_torch(args, code, seconds):
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


WRONG = {
    "trian": "No such command",
    "train --rnak 3": "No such option: --rnak",
    "train --set train.epocs=3": "train.epocs: no such field; did you mean 'epochs'?",
    "train --method lore": "did you mean 'lora'?",
    "plan llama-3.1-9b": "there is no base 'llama-3.1-9b'",
    "plan nowhere.yaml": "no recipe file 'nowhere.yaml'",
    "plan gpt2 --gpu rtx-4091": "there is no card 'rtx-4091'",
    "plan gpt2 --method lore": "did you mean 'lora'?",
    "plan recipe.yaml": "data.train: there is no file",
    "gpus rtx-4091": "there is no card 'rtx-4091'",
    "gpus --for llama-3.1-9b": "there is no base 'llama-3.1-9b'",
    "data nowhere.jsonl": "no such file: nowhere.jsonl",
    "data rows.jsonl --model smollm2-134m": "there is no base 'smollm2-134m'",
    "train smollm2-134m --data rows.jsonl --out o": "there is no base 'smollm2-134m'",
    "train smollm2-135m --data nowhere.jsonl --out o": "data.train: there is no file",
    "train smollm2-135m --data nowhere.jsonl --out o --set method.rr=3": "method.rr: no such field; did you mean 'r'?",
    "train smollm2-135m --data rows.jsonl --out o --column output": "--column got 'output'",
    "train smollm2-135m --data rows.jsonl --out o --epochs many --lr -1": "train.epochs: got 'many'",
    "train recipe.yaml": "model.name: there is no base 'smollm2-134m'",
    "train nowhere.yaml": "no recipe file 'nowhere.yaml'",
    "train smollm2-135m --data rows.jsonl --out o --gpu rtx-4091": "there is no card 'rtx-4091'",
    "train smollm2-135m --data rows.jsonl --out o --init-adapter nowhere": "no run folder 'nowhere'",
    "eval nowhere": "no run folder 'nowhere'",
    "report nowhere": "no run folder 'nowhere'",
    "compare nowhere.yaml": "no recipe file 'nowhere.yaml'",
    "compare recipe.yaml --methods lora,ia4": "no method is called 'ia4'",
    "generate nowhere hello": "no run folder 'nowhere'",
    "chat nowhere": "no run folder 'nowhere'",
    "merge nowhere --out o": "no run folder 'nowhere'",
    "export nowhere --to vllm --out o": "no run folder 'nowhere'",
    "export nowhere --to olama --out o": "did you mean 'ollama'?",
    "verify nowhere": "no run folder 'nowhere'",
    "push nowhere me/name": "no run folder 'nowhere'",
    "methods lore": "did you mean 'lora'?",
    "methods --model smollm2-134m": "there is no base 'smollm2-134m'",
}


def test_wrong_name_or_file_is_answered_without_torch(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    recipe = "model: smollm2-134m\ndata: nowhere.jsonl\nmethod: {name: lora, r: 4}\noutput_dir: o\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    script = f"""
import sys, time
from slimtune.cli import app
for command in {[*WRONG]}:
    start = time.process_time()
    try:
        app(args=command.split())
    except SystemExit as e:
        heavy = {{"torch", "transformers", "datasets", "peft"}} & set(sys.modules)
        assert e.code == 2 and not heavy and time.process_time() - start < 1.5, (command, e.code, heavy)
    print(end="\\0", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [" ".join(answer.split()) for answer in done.stderr.split("\0")]
    assert [(c, a) for c, a in zip(WRONG, answers, strict=False) if WRONG[c] not in a] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_80_columns(slimtune, command):
    done = slimtune(command, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_every_setting_has_a_flag(slimtune):
    text = " ".join(slimtune("train", "--help").stdout.split())
    for setting in list_settings(Recipe):
        assert f"{setting.flag} " in text
        assert setting.help[1:] in text


def test_no_command_and_version(slimtune):
    assert slimtune().exit_code == 2
    assert "Usage:" in slimtune().stderr
    assert slimtune("--version").stdout.startswith("slimtune 0.")


# --- train


def test_train_from_flags(replace, slimtune, rows_file):
    calls = replace("core.training.train", "train", RESULT)
    done = slimtune(
        "train", "--model", "m", "--data", rows_file, "--out", "o", "--method", "lora", "--rank", 4, "--alpha", 6,
        "--epochs", 2, "--max-steps", 9, "--lr", "1e-3", "--batch-size", 2, "--max-seq-len", 99, "--seed", 7,
        "--on-overlong", "error", "--dtype", "fp32", "--validation", rows_file, "--trust-remote-code", "--no-packing",
        "--column", "messages=talk", "--report-to", "wandb", "--revision", "null", "--set", "method.targets=[q_proj]",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (((recipe,), how),) = calls
    assert callable(how.pop("planner"))
    assert how == {"resume": False, "init_adapter": None, "allow_faulty_rows": False, "accept_changed": []}
    config = recipe.method_config()
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 6, {"q_proj"})
    train, data, model = recipe.train, recipe.data, recipe.model
    assert (train.epochs, train.max_steps, train.learning_rate, train.batch_size) == (2.0, 9, 1e-3, 2)
    assert (train.seed, train.packing, train.report_to, recipe.output_dir) == (7, False, ["wandb"], Path("o"))
    assert (data.max_seq_len, data.on_overlong, data.train, data.validation) == (99, "error", rows_file, rows_file)
    assert data.columns == {"messages": "talk"}
    assert (model.name, model.dtype, model.trust_remote_code, model.revision) == ("m", "float32", True, None)
    for part in (
        "1.5000 (step 2, whose adapter is kept)",
        "1.0 MiB",
        "1.00 %",
        "runs/x/adapter",
        "slimtune eval runs/x",
    ):
        assert part in done.stdout


def test_set_overrides_flags_override_the_recipe(replace, slimtune_json, rows_file, tmp_path):
    calls = replace("core.training.train", "train", RESULT)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: rows.jsonl\noutput_dir: o\nmethod: {r: 4}\ntrain: {epochs: 5, seed: 1}\n")
    assert slimtune_json("train", recipe, "--rank", 8, "--epochs", 3, "--set", "train.epochs=2") == to_json_dict(RESULT)
    loaded = calls[0][0][0]
    assert (loaded.method_config().r, loaded.train.epochs, loaded.train.seed) == (8, 2.0, 1)
    assert loaded.data.train == rows_file


def test_resume_and_init_adapter(replace, slimtune, rows_file, tmp_path):
    calls = replace("core.training.train", "train", RESULT)
    command = ["train", "--model", "m", "--data", rows_file, "--out", tmp_path]
    other_run = slimtune(*command)
    assert (other_run.exit_code, calls) == (2, []), "the folder is not empty"
    assert slimtune(*command, "--resume").exit_code == 0
    assert slimtune(*command[:-1], "o", "--init-adapter", "runs/a").exit_code == 0
    assert [(how["resume"], how["init_adapter"]) for _, how in calls] == [(True, None), (False, Path("runs/a"))]
    both = slimtune(*command, "--resume", "--init-adapter", "runs/a")
    assert (both.exit_code, len(calls)) == (2, 2)
    assert all(flag in both.stderr for flag in ("--resume", "--init-adapter"))


@pytest.mark.parametrize(
    ("flag", "task", "other"), [("--context=x.md", "context", "sdft"), ("--reward=length:9", "rloo", "context")]
)
def test_flag_of_a_task_sets_its_field_and_is_refused_with_another_task(
    flag, task, other, replace, slimtune, rows_file
):
    calls = replace("core.training.train", "train", RESULT)
    command = ["train", "--model", "m", "--data", rows_file, "--out", "o", flag, "--task"]
    assert slimtune(*command, task).exit_code == 0
    objective = calls[0][0][0].objective()
    assert getattr(objective, "context", None) == "x.md" or objective.rewards == ["length:9"]
    refused = slimtune(*command, other)
    assert (refused.exit_code, len(calls)) == (2, 1)
    assert task in refused.stderr


def test_train_lists_all_that_is_missing(slimtune):
    done = slimtune("train", "--rank", 0, "--json")
    assert done.exit_code == 2
    for part in ("(flag --model)", "(flag --data)", "(flag --out)", "method.r: got 0"):
        assert part in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "RecipeError"


# --- eval, merge


def evaluated(values: dict, cls: type = TextOrPairEvalResult) -> EvalResult:
    """Return an evaluation with these values; what it lacks is zero."""
    return from_json_dict(cls, complete_json(make_json_schema(cls), values))


def test_eval_options(monkeypatch, slimtune):
    calls: list = []
    monkeypatch.setattr(
        "slimtune.evaluation.evaluate.evaluate", lambda *args: calls.append(args) or evaluated(MEASURED)
    )
    slimtune("eval", "runs/x")
    slimtune("eval", "runs/x", "--split", "validation", "--data", "d.jsonl", "--general-text", "own.txt")
    slimtune("eval", "runs/x", "--skip-prompt-test", "--general-text", "none", "--forgetting-budget", 0.3,
             "--generate", 4, "--max-new-tokens", 9, "--check", "json", "--check", "regex:a,b", "--tasks", "a, b",
             "--tasks-path", "t")  # fmt: skip
    plain = {"checks": [], "tasks": []}
    assert calls == [(Path("runs/x"), settings) for settings in (
        EvalSettings(general_text=BUILT_IN_TEXT, **plain),
        EvalSettings(split="validation", data=Path("d.jsonl"), general_text=Path("own.txt"), **plain),
        EvalSettings(skip_prompt_test=True, general_text=None, forgetting_budget=0.3, generate=4, max_new_tokens=9,
                     checks=["json", "regex:a,b"], tasks=["a", "b"], tasks_path=Path("t")),
    )]  # fmt: skip


def test_eval_screen(monkeypatch, slimtune, slimtune_json):
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda run, settings: evaluated(MEASURED))
    shown = slimtune("eval", "runs/x").stdout
    for part in (
        "4.0000", "3.0000", "54.60", "37.5 %", "0.9000 to 1.1000", "90 rows", "3000 supervised tokens",
        "is higher by 0.1300 nats per token for the base, by 0.1600 (0.1100 to 0.2200) for the tuned model",
        "no more was forgotten than is allowed; the loss on it rose by 0.0310 (0.0200 to 0.0400) nats per token",
        "Hi [b]\nreference: Ho\nbase: Hm\ntuned: Ha", "0.2500 ± 0.0400",
        "wins 68.8 % (40.0 to 90.0) of 9 prompts: 5 wins", "verdict: the tuned model is better",
    ):  # fmt: skip
        assert part in shown
    assert slimtune_json("eval", "runs/x") == to_json_dict(evaluated(MEASURED))


def test_eval_says_that_few_rows_prove_little(monkeypatch, slimtune):
    few = {**MEASURED, "verdict": {"passed": True, "reasons": [], "warning": "six rows"}}
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda *_: evaluated(few))
    assert re.search(r"^verdict: .*\bsix rows$", slimtune("eval", "runs/x").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "ends", "within", "words"),
    [
        (-0.0241, [-0.03, -0.02], True, "nothing is shown to be forgotten; the loss on it fell by 0.0241 (0.0200"),
        (0.0041, [-0.01, 0.02], True, "nothing is shown to be forgotten; the loss on it rose by 0.0041 (-0.0100"),
        (0.12, [0.08, 0.14], True, "no more was forgotten than is allowed; the loss on it rose by 0.1200"),
        (0.15, [0.11, 0.2], False, "too much was forgotten; the loss on it rose by 0.1500 (0.1100 to 0.2000)"),
    ],
)
def test_words_about_forgetting_follow_the_verdict(monkeypatch, slimtune, change, ends, within, words):
    forgetting = {"change": change, "change_ci95": ends, "budget": 0.1, "within": within}
    result = evaluated({**MEASURED, "forgetting": forgetting})
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda *_: result)
    assert words in slimtune("eval", "runs/x").stdout


def test_progress_is_a_line_every_ten_seconds(monkeypatch, slimtune):
    clock = itertools.count(step=4)

    def merge(run, out, dtype):
        list(track_progress(range(6), "weights"))
        return MERGED

    monkeypatch.setattr("slimtune.export.merge.merge", merge)
    monkeypatch.setattr("slimtune.cli.common.time.monotonic", lambda: next(clock))
    done = slimtune("merge", "r", "--out", "m", "--json")
    assert re.findall(r"\d+", done.stderr) == ["2", "6", "12", "5", "6", "24"]
    assert json.loads(done.stdout)["out"] == "m"


def test_eval_shows_no_table_that_is_too_wide(monkeypatch, slimtune):
    names, counts = [f"category {i}" for i in range(9)], [[40 + (i == j) for j in range(9)] for i in range(9)]
    counts[3][7] = 123
    figures = {"rows": 360, "precision": 0.1, "recall": 0.1, "f1": 0.1}
    result = {"task": "classification", "rows": 9, "accuracy": 0.1, "accuracy_ci95": [0, 0.2], "baseline": "category 1",
              "baseline_accuracy": 0.1, "macro_f1": 0.1, "macro_f1_ci95": [0, 0.2], "loss": 1.0, "training_rows": None,
              "classes": [{"name": n, **figures} for n in names], "confusion": counts,
              "verdict": {"passed": True, "reasons": [], "warning": ""}}  # fmt: skip
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda *_: evaluated(result, ClassificationEvalResult))
    shown = slimtune("eval", "runs/x").stdout.splitlines()
    at = next(i for i, line in enumerate(shown) if line.startswith("most frequent mistakes"))
    assert shown[at + 1].split() == ["category", "3", "category", "7", "123"]
    result |= {"classes": result["classes"][:2], "confusion": [[41, 40], [40, 41]]}
    assert "category 0                    41          40" in slimtune("eval", "runs/x").stdout


def test_eval_verdict_is_the_exit_code(monkeypatch, slimtune):
    verdict = {"passed": False, "reasons": ["it is worse", "it forgot"], "warning": "", "next_steps": []}
    result = {**MEASURED, "prompt_dependence": None, "forgetting": None, "verdict": verdict}
    monkeypatch.setattr("slimtune.evaluation.evaluate.evaluate", lambda run, settings: evaluated(result))
    done = slimtune("eval", "runs/x")
    assert (done.exit_code, done.stderr) == (1, "")
    assert all(reason in done.stdout for reason in verdict["reasons"])
    assert json.loads(slimtune("eval", "runs/x", "--json").stdout)["verdict"] == verdict
    wrong = slimtune("eval", "runs/x", "--split", "tset")
    assert wrong.exit_code == 2
    assert "'tset'" in wrong.stderr


def test_merge(replace, slimtune, slimtune_json):
    calls = replace("export.merge", "merge", MERGED)
    assert "m: 1.0 MiB in float32, 2.0 s" in slimtune("merge", "runs/x", "--out", "m", "--dtype", "float32").stdout
    assert calls == [((Path("runs/x"), Path("m")), {"dtype": "float32"})]
    assert "25%" in slimtune("merge", "runs/x", "--out", "m").stderr
    assert slimtune_json("merge", "runs/x", "--out", "m") == to_json_dict(MERGED)
    assert "--out" in slimtune("merge", "runs/x").stderr


# --- generate, chat, doctor


@pytest.fixture
def generator(monkeypatch) -> list:
    """Replace the model: it answers with its name and the messages it got."""
    calls: list = []

    class Conversation:
        def __init__(self, generator, name, system):
            self.name, self.heard = name, [system] if system else []

        def stream(self, text, params):
            calls.append((params.max_new_tokens, params.temperature, params.seed))
            self.heard.append(text)
            pieces = [self.name, f" got {' / '.join(self.heard)}"]
            self.heard.append("".join(pieces))
            yield from pieces

    def load_run(run, device):
        calls.append(run)
        return types.SimpleNamespace(model=None)

    monkeypatch.setattr("slimtune.generation.run_requirements.require_causal_lm_run", lambda run: None)
    monkeypatch.setattr("slimtune.core.training.trained_model.load_run", load_run)
    for name, replaced in {
        "generation_models.make_base_and_tuned_models": lambda trained: {"base": "base", "tuned": "tuned"},
        "generation_models.describe_trained_model": lambda trained: "tiny with the lora adapter in runs/x/adapter",
        "text_generator.TextGenerator": lambda model: None,
        "conversation.Conversation": Conversation,
    }.items():
        monkeypatch.setattr(f"slimtune.generation.{name}", replaced)
    return calls


def test_generate(generator, slimtune, slimtune_json):
    done = slimtune("generate", "runs/x", "Why?")
    assert (done.exit_code, done.stdout) == (0, "tuned got Why?\n")
    assert generator == [Path("runs/x"), (128, 0.0, 0)]
    command = ["generate", "runs/x", "Hi", "--side-by-side", "--system", "Be brief", "--max-new-tokens", 5]
    command += ["--temperature", 0.7, "--seed", 3]
    assert slimtune(*command).stdout == "base: base got Be brief / Hi\ntuned: tuned got Be brief / Hi\n"
    assert generator[3:] == [(5, 0.7, 3)] * 2
    answers = slimtune_json(*command)
    assert (answers["prompt"], answers["base"]) == ("Hi", "base got Be brief / Hi")


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "PROMPT"), (["Hi", "--temperature", "-1"], "--temperature"), (["Hi", "--max-new-tokens", "0"], "--max-new")],
)
def test_wrong_generate(generator, slimtune, args, message):
    done = slimtune("generate", "runs/x", *args)
    assert (done.exit_code, generator) == (2, [])
    assert message in done.stderr


def test_each_model_of_a_chat_remembers_its_own_answers(generator, slimtune):
    done = slimtune("chat", "runs/x", "--side-by-side", "--json", stdin="one\n\n two \n/new\nthree\n/exit\nfour\n")
    assert json.loads(done.stdout)["turns"] == [
        {"user": "one", "base": "base got one", "tuned": "tuned got one"},
        {"user": "two", "base": "base got one / base got one / two", "tuned": "tuned got one / tuned got one / two"},
        {"user": "three", "base": "base got three", "tuned": "tuned got three"},
    ]


def test_chat_ends_with_its_input(generator, slimtune):
    done = slimtune("chat", "runs/x", "--system", "S", stdin="one")
    assert (done.exit_code, done.stdout) == (0, "tuned got S / one\n")


def test_chat_says_what_it_is_and_answers_its_commands(generator, slimtune):
    done = slimtune("chat", "runs/x", stdin="/help\n/nwe\n//think\n")
    assert done.stdout == "tuned got /think\n"
    assert done.stderr.startswith("tiny with the lora adapter in runs/x/adapter\n/new starts over")
    assert re.search(r"/nwe\b.*'/new'", done.stderr)


def test_words_are_wrapped_whole(capsys):
    file = io.StringIO()
    printer = AnswerPrinter(file, width=12)
    for piece in ["as", "sist", "ing wi", "th a\n  in", "dent \x1b[31m", "你好你好你好你"]:
        printer.write(piece)
    printer.close()
    assert file.getvalue() == "assisting\nwith a\n  indent\n\\x1b[31m你好\n你好你好你"


def test_doctor(slimtune, slimtune_json):
    report = slimtune_json("doctor")
    assert report["libraries"]["torch"]
    assert report["devices"][0] == "cpu"
    assert min(report["memory_free_bytes"], report["disk_free_bytes"]) > 0
    assert "test" in report["extras"]
    for columns in (40, 80, 200):
        first, *lines = slimtune("doctor", columns=columns).stdout.splitlines()
        assert first.endswith(f"frozen weights in {report['dtype']}")
        labels = {line.split("  ")[0] for line in lines}
        assert labels > {"OS", "Python", "torch", "CPU", "memory", "disk", "peft", "bitsandbytes", "Ollama", "vLLM"}
        assert not any("slimtune[test]" in line or "slimtune[prove]" in line for line in lines)


def test_doctor_says_first_what_is_wrong(monkeypatch, slimtune, slimtune_json, screen):
    gpu = NvidiaSmiGpu("NVIDIA GeForce RTX 4090", "580.95.05", (8, 9), 24 << 30, 0)
    sick = MachineFacts(smi_gpus=(gpu,), torch=TorchFacts("2.9.1+cpu", threads=2), limits={"NOFILE": 64})
    monkeypatch.setattr(facts, "gather_machine_facts", lambda: sick)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    text = slimtune("doctor").stdout
    assert text.startswith("2 faults found: trains on the CPU")
    screen("doctor-fault", text.split("\n\n")[1] + "\n")
    report = slimtune_json("doctor")
    assert [finding["page"] for finding in report["findings"]] == ["torch-cpu-build", "open-files"]
    assert report["unused_gpus"][0]["name"] == gpu.name
    assert report["facts"]["limits"] == {"NOFILE": 64}


def test_doctor_reports_without_torch(monkeypatch, slimtune, slimtune_json):
    broken = MachineFacts(torch=TorchFacts("2.9.1", error="ImportError: libcudnn.so.9: cannot open shared object file"))
    monkeypatch.setattr(facts, "gather_machine_facts", lambda: broken)
    assert slimtune("doctor").stdout.startswith("1 fault found: nothing can be trained")
    assert slimtune_json("doctor")["device"] is None


def test_long_values_keep_their_labels(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    print_fields([("first label", "a" * 90), ("second", "word " * 20)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "first label  " + "a" * 90
    assert lines[1].startswith("second       word word")
    assert lines[2].startswith("             word")


def test_messages_of_the_library_are_lines_of_whole_words(monkeypatch):
    monkeypatch.setattr(common, "make_error_console", lambda: Console(file=out, width=20, force_terminal=True))
    out = io.StringIO()
    ConsoleLogHandler(logging.WARNING).emit(
        logging.makeLogRecord({"msg": "a base %s", "args": ("without a template",)})
    )
    assert out.getvalue() == "a base without a \ntemplate\n"
