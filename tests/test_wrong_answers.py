"""Inputs that an earlier release answered wrongly, and what is said now: one line per case, and anyone adds one.

A case writes its files into an empty folder, runs one command there, and names the exit code and words of the output.
In files and commands BASE stands for the folder of a tiny Llama, RUN for a finished run that trained it (a copy of its
own), ROWS for a file of 24 sound chat rows. What needs more than one command is tested beside the code it is about.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_run import write_rows
from typer.testing import CliRunner

from slimtune.cli import app

pytestmark = pytest.mark.usefixtures("kept_traces")


class Case(NamedTuple):
    name: str
    files: dict[str, str | bytes]
    command: str
    exit_code: int
    words: str


MILLION = (
    '{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1000000, "num_attention_heads": 4, '
    '"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 320}'
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def row(**columns: Any) -> str:
    return json.dumps(columns) + "\n"


def chat(content: Any = "Hi", role: str = "user", **more: Any) -> str:
    """A row of one turn; `name` belongs to the first message, `thinking` to the last, other columns to the row."""
    keys = [{k: more.pop(k)} if k in more else {} for k in ("name", "thinking")]
    turns = [{"role": role, "content": content, **keys[0]}, {"role": "assistant", "content": "Ho.", **keys[1]}]
    turns[1:1] = [{"role": "user", "content": "Q"}] if role != "user" else []
    return row(messages=turns, **more)


KTO = row(prompt="Say", completion=" so", label=True) + row(prompt="Say", completion=" no", label=False)
PAIR = row(prompt="Say", chosen=" so", rejected=" no")
TRAIN = "train --model BASE --data a.jsonl --max-steps 1 --dtype float32 --out out"
TRAIN_FLAGS = "train --model BASE --data ROWS --max-steps 1"
ALIASES = "x0: &x0 [a]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))


def recipe(*lines: str) -> dict[str, str | bytes]:
    """Return the recipe r.yaml, with more lines."""
    return {"r.yaml": "\n".join(["model: BASE", "data: ROWS", *lines]) + "\n"}


SET_METHOD = f"{TRAIN_FLAGS} --out out --set 'method."


def adapter(**fields: Any) -> dict[str, str | bytes]:
    """The run's adapter with another config: a LoRA of rank 16."""
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj",
              "gate_proj", "up_proj", "down_proj"]}  # fmt: skip
    return {"run/adapter/adapter_config.json": json.dumps(config | fields)}


ONE_ROW = '{"messages": [{"role": "user", "content": "Say x."}, {"role": "assistant", "content": "x y z"}]}\n'
CASES: list[Case] = [
    Case("unknown-base", {}, "plan no-such-base", 2, "there is no base 'no-such-base'"),
    # Data: columns, labels, images, contents that are not understood
    Case("kto-label", {"a.jsonl": KTO}, "data a.jsonl --model BASE", 1, "('label': rows that it rates low"),
    Case("kto-label-without-a-base", {"a.jsonl": KTO}, "data a.jsonl", 1, "--ignore-columns label"),
    Case("kto-label-trained", {"a.jsonl": KTO}, TRAIN, 1, "--ignore-columns label"),
    Case("kto-label-evaluated", {"a.jsonl": KTO}, "eval RUN --data a.jsonl", 1, "--ignore-columns label"),
    Case("kto-label-ignored", {"a.jsonl": KTO}, "data a.jsonl --model BASE --ignore-columns label", 0, "left out"),
    Case("kto-label-misspelled", {"a.jsonl": KTO}, "data a.jsonl --ignore-columns lable", 1, "did you mean 'label'"),
    Case("scored-planned", {"a.jsonl": chat(score=1)}, "plan BASE --data a.jsonl --vram 8GiB", 0, "will refuse"),
    Case(
        "images",
        {"a.jsonl": chat(images=["cat.png"])},
        "data a.jsonl --model BASE",
        1,
        "'images': only text is learned",
    ),
    Case("image-in-text", {"a.jsonl": chat("<image>\nWhat?")}, "data a.jsonl --model BASE", 1, "media-placeholder"),
    Case(
        "image-part",
        {"a.jsonl": chat([{"type": "image_url"}])},
        "data a.jsonl --model BASE",
        1,
        "of the type 'image_url'",
    ),
    Case("oasst", {"a.jsonl": row(text="Hi", role="prompter", parent_id="7")}, "data a.jsonl", 1, "one message of a"),
    Case("scored", {"a.jsonl": chat(score=0.1)}, "data a.jsonl --model BASE", 1, "--ignore-columns score"),
    Case("summary", {"a.jsonl": row(text="Long.", summary="S.")}, "data a.jsonl", 1, "it seems to belong to each text"),
    Case("preference-trained", {"a.jsonl": PAIR}, TRAIN, 1, "--task dpo"),
    Case(
        "prompt-response",
        {"a.jsonl": row(prompt="Q", response="A")},
        "data a.jsonl",
        1,
        "completion --column completion=response",
    ),
    Case(
        "dolly",
        {"a.jsonl": row(instruction="Q", context="C", response="A", category="qa")},
        "data a.jsonl",
        1,
        "try --format instruction --column output=response --column input=context",
    ),
    Case(
        "alpaca",
        {"a.jsonl": row(instruction="Q", input="", output="A", text="## Q\n## A")},
        "data a.jsonl",
        0,
        "not used: text",
    ),
    Case("name-of-a-speaker", {"a.jsonl": chat(name="Ann")}, "data a.jsonl", 1, "--ignore-columns messages.name"),
    Case("developer", {"a.jsonl": chat(role="developer")}, "data a.jsonl --model BASE", 1, "call it 'system'"),
    Case("reasoning", {"a.jsonl": chat(thinking="Hm")}, "data a.jsonl --model BASE", 1, "such as <think>"),
    Case("one-paragraph", {"a.txt": "A night. " * 300}, TRAIN.replace("jsonl", "txt"), 1, "put a blank line between"),
    Case(
        "rich-markup",
        {"a.jsonl": row(text="[INST] Hi [/INST] Ho")},
        "data a.jsonl --model BASE",
        1,
        "⟦[INST] Hi [/INST]",
    ),
    Case(
        "no-valid-row", {"a.jsonl": "no\n"}, "data a.jsonl --model BASE", 1, "tokens none: no row of the file is valid"
    ),
    Case("no-valid-format", {"a.jsonl": "no\n"}, "data a.jsonl", 1, "a.jsonl: rows of an unknown format"),
    Case("escape-in-a-row", {"a.jsonl": chat("\x1b]0;x\x07")}, "data a.jsonl --model BASE", 0, r"\x1b]0;x\x07"),
    Case("escape-in-bad-json", {"a.jsonl": "{\x1b[2J\n"}, "data a.jsonl --model BASE", 1, r"{\x1b[2J"),
    Case("escape-in-a-name", {}, "data 'no\x1b[2J'", 2, r"no\x1b[2J"),
    Case("both-test-sets", {"a.jsonl": CHAT}, f"{TRAIN} --test ROWS --test-fraction 0.1", 2, "only one of the two"),
    # Rows and templates that are hostile: duplicate keys, huge numbers, deep nesting, endless loops
    Case(
        "key-twice",
        {"a.jsonl": CHAT.replace("{", '{"messages": [], ', 1)},
        "data a.jsonl --model BASE",
        1,
        "has the key 'messages' twice in one object: line 1",
    ),
    Case(
        "5000-digits",
        {"a.jsonl": CHAT.replace("{", '{"id": ' + "9" * 5000 + ", ", 1)},
        "data a.jsonl --model BASE",
        1,
        "does not parse as JSON (a huge number)",
    ),
    Case("utf-16", {"a.jsonl": CHAT.encode("utf-16")}, "data a.jsonl --model BASE", 1, "is UTF-16 text"),
    Case("endless-template", {"t.jinja": LOOP}, "data ROWS --model BASE --chat-template t.jinja", 1, "too many steps"),
    Case("endless-in-chat", {"run/adapter/chat_template.jinja": LOOP}, "generate RUN/adapter hi", 1, "too many steps"),
    Case(
        "template-divides",
        {"t.jinja": "{{ 1/0 }}"},
        "data ROWS --model BASE --chat-template t.jinja",
        1,
        "ZeroDivisionError",
    ),
    Case("million-layers", {"b/config.json": MILLION}, "plan b", 1, "num_hidden_layers = 1000000"),
    Case("gz", {"a.jsonl.gz": b"x"}, "data a.jsonl.gz --model BASE", 2, "gunzip -k a.jsonl.gz"),
    #
    #
    # Plans: positions, devices, families, names of bases
    Case("plan-intel", {}, "plan gpt2 --gpu arc-b580", 2, "slimtune does not train on Intel GPUs"),
    Case("plan-beyond-positions", {}, "plan tinyllama-1.1b --gpu t4 --max-seq-len 9000", 2, "has 2048 positions"),
    Case("plan-float16", {}, "plan gpt2 --gpu t4 --dtype float16", 0, "fits on t4"),
    Case("plan-two-cards", {}, "plan gpt2 --gpu t4 --gpu l4", 2, "--gpu is given 2 times: t4, l4"),
    Case("train-other-size", {}, "train --model gpt-oss-7b --data ROWS --out r", 2, "no base 'gpt-oss-7b' expected"),
    Case("data-nearest-base", {}, "data ROWS --model lama-3.1-8b", 2, "did you mean 'llama-3.1-8b'?"),
    Case("plan-dora", {}, "plan gpt2 --gpu t4 --method dora", 2, "--method lora --set method.use_dora=true"),
    #
    # Catalog
    Case("card-unknown", {}, "plan gpt2 --gpu rtx-5061", 2, "no card 'rtx-5061' in the table"),
    Case("card-5090-laptop", {}, "gpus rtx-5090-laptop", 0, "bfloat16 114 TFLOPS"),
    Case("card-rent-price", {}, "gpus rtx-5090", 0, "0.69 $/h, RunPod Community Cloud, 2026-10-01"),
    #
    # Adapter files: patterns, ranks, dtypes
    Case("file-endless-targets", adapter(target_modules="(.*)*!"), "generate RUN hi", 2, "matches no module"),
    Case("file-endless-exclude", adapter(exclude_modules="(([a-z0-9_.])+)+!"), "generate RUN hi", 0, ""),
    Case("file-endless-ranks", adapter(rank_pattern={"(a|a|b)*(.*)*(.+)+!": 4}), "generate RUN hi", 0, ""),
    Case("file-broken-pattern", adapter(rank_pattern={"*.q_proj": 4}), "generate RUN hi", 1, "nothing to repeat at"),
    Case("file-pissa", adapter(init_lora_weights="pissa_niter_1000000000"), "generate RUN hi", 1, "pissa_niter_N"),
    Case("file-rank", adapter(r=10**7), "generate RUN hi", 2, "r is 10,000,000 for "),
    Case("file-alpha-inf", adapter(lora_alpha=float("inf")), "generate RUN hi", 1, "lora_alpha is inf"),
    Case("file-alpha-huge", adapter(lora_alpha=1e308), "generate RUN hi", 1, "at most 1e+09 in size"),
    #
    # Method settings
    Case("star", {}, f'{SET_METHOD}target_modules="*.q_proj"\'', 2, "'*.q_proj' is not a regular expression"),
    Case("star-path", {}, f'{SET_METHOD}target_modules="*.q_proj"\'', 2, "method.target_modules: '*.q_proj' is not a"),
    Case("star-hint", {}, f'{SET_METHOD}target_modules="*.q_proj"\'', 2, "a list of names: [q_proj]"),
    Case("star-unquoted", {}, f"{SET_METHOD}target_modules=*.q_proj'", 2, "needs quotes"),
    Case("parenthesis", {}, f"{SET_METHOD}target_modules=(q_proj'", 2, "unterminated subpattern at position 0"),
    Case("endless-targets", {}, f"{SET_METHOD}target_modules=(.*)*!'", 2, "matches no module"),
    Case("alpha-huge", {}, f"{SET_METHOD}lora_alpha=1e308'", 2, "at most 1e+09 in size"),
    Case("alpha-dict", {}, f"{SET_METHOD}lora_alpha={{a: 1}}'", 2, "lora_alpha"),
    Case("alpha-nan", {}, f"{SET_METHOD}lora_alpha=.nan'", 2, "lora_alpha: got nan"),
    #
    Case(
        "rr-and-no-file", {}, "plan BASE --data no.jsonl --set method.rr=3", 2, "2 problems: method.rr: no such field"
    ),
    #
    # Training: non-finite losses, two writers
    Case("diverged", {}, "train --model BASE --data ROWS --out o --lr 1e30 --max-steps 8 --dtype float32", 1, "is NaN"),
    Case(
        "metrics-list",
        {"run/metrics.jsonl": "[1]\n"},
        "train RUN/recipe.yaml --resume",
        0,
        "line 1: it is no JSON object",
    ),
    Case("no-sums", {"run/checkpoints/checkpoint-1/checksums.json": "{}"}, "train RUN/recipe.yaml --resume", 1, "name"),
    Case("other-step", {"run/checkpoints/checkpoint-²/x": ""}, "train RUN/recipe.yaml --resume", 0, "done already"),
    #
    # Run folders and reports that are damaged
    Case("result-list", {"run/result.json": "[1]"}, "report RUN", 0, "result.json is damaged: it contains a list"),
    Case(
        "result-cut",
        {"run/result.json": '{"a'},
        "push RUN me/it --dry-run",
        1,
        "result.json is damaged: it is not JSON",
    ),
    Case(
        "plan-text", {"run/plan.json": '{"plan": "x"}'}, "report RUN", 0, "plan.json is damaged: plan is no JSON object"
    ),
    Case("data-digits", {"run/data.json": f'{{"train": {"9" * 5000}}}'}, "report RUN", 0, "more than 4300 digits"),
    Case("data-nested", {"run/data.json": f'{{"train": {"[" * 10**5}'}, "report RUN", 0, "nested too deep"),
    Case(
        "data-types",
        {"run/data.json": '{"train": {"issues": 5}}'},
        "report RUN",
        0,
        "data.json or result.json is damaged",
    ),
    Case(
        "eval-types",
        {"run/eval-test.json": '{"base_loss": 1, "generations": 5}'},
        "report RUN",
        0,
        "eval-test.json is damaged",
    ),
    Case(
        "report-metrics-list",
        {"run/metrics.jsonl": "[1]\n{}\n"},
        "report RUN",
        0,
        "metrics.jsonl, line 1: it is no JSON object",
    ),
    Case(
        "report-metrics-bytes",
        {"run/metrics.jsonl": b"{}\n\xff\n"},
        "report RUN",
        0,
        "metrics.jsonl, line 2: it is not JSON",
    ),
    Case("out-folder", {"out/x": ""}, "report RUN --out out", 2, "out cannot be written: it is a folder"),
    Case("page-over-rows", {"a.jsonl": CHAT}, "data a.jsonl --html a.jsonl", 2, "it exists and is no page"),
    Case("page-over-rows-of-a-run", {"a.jsonl": CHAT}, "report RUN --out a.jsonl", 2, "it exists and is no page"),
    Case("page-again", {"a.html": "<!doctype html>", "a.jsonl": CHAT}, "data a.jsonl --html a.html", 0, "page: a.html"),
    Case("answers-over-rows", {"a.jsonl": CHAT}, "predict RUN --data a.jsonl --out a.jsonl", 2, "has the rows"),
    Case("out-nowhere", {}, "data ROWS --html no/x.html", 2, "there is no folder no"),
    Case("out-long", {}, f"merge RUN --out {'n' * 300}", 2, "the name is too long"),
    Case("write-long", {}, f"plan BASE --data ROWS --write {'n' * 300}.yaml", 2, "the name is too long"),
    # Export, merge and push
    Case(
        "ollama-name-of-another-base",
        {},
        "export RUN --to ollama --out o --ollama-base llama3.1:8b",
        2,
        "llama3.1:8b is not the base that the adapter was trained on",
    ),
    Case(
        "ollama-name-without-check",
        {},
        "export RUN --to ollama --out o --ollama-base llama3.1:8b --no-verify",
        2,
        "llama3.1:8b is not the base that the adapter was trained on",
    ),
    Case(
        "ollama-name-unknown", {}, "export RUN --to ollama --out o --ollama-base mine:1b --threads 1", 0, "NOT PROVEN: "
    ),
    Case(
        "proof-required",
        {},
        "export RUN --to ollama --out o --ollama-base mine:1b --require-proof --threads 1",
        1,
        "the export is not proven",
    ),
    Case("proof-without-check", {}, "export RUN --to gguf --out o --no-verify --require-proof", 2, "--no-verify"),
    Case("check-left-out", {}, "export RUN --to gguf --out o --no-verify", 0, "NOT PROVEN: the check was left out"),
    Case(
        "push-of-a-diary",
        {"run/adapter/merges.txt": "my diary of today"},
        "push RUN ada/x --dry-run",
        0,
        "not uploaded: merges.txt",
    ),
    Case(
        "push-of-a-token",
        {"run/adapter/LICENSE": "hf_" + "a" * 34},
        "push RUN ada/x --dry-run",
        2,
        "LICENSE contains a token of the Hub",
    ),
    # Evaluation and generation
    Case(
        "eval-of-training-rows", {}, "eval RUN --data ROWS --general-text none", 1, "the run was trained on all 24 rows"
    ),
    Case(
        "eval-of-one-row",
        {"one.jsonl": ONE_ROW},
        "eval RUN --data one.jsonl --general-text none",
        1,
        "1 row is too few",
    ),
    Case(
        "eval-of-equal-rows",
        {"one.jsonl": ONE_ROW * 30},
        "eval RUN --data one.jsonl --general-text none",
        1,
        "only 1 of the 30 rows differ",
    ),
    # Recipes and flags
    #
    Case("yaml-number-as-key", recipe("1: 2"), "plan r.yaml", 2, "a key that is not text: put it in quotes"),
    Case("yaml-null-as-key", recipe("method: {~: 2}"), "plan r.yaml", 2, "a key that is not text"),
    Case("yaml-date-as-key", recipe("2024-01-01: 2"), "plan r.yaml", 2, "2024-01-01: no such field"),
    Case("yaml-no-date", recipe("train: {epochs: 2024-13-45}"), "plan r.yaml", 2, "epochs: got '2024-13-45'"),
    Case("yaml-int-tag", recipe("train: {seed: !!int abc}"), "plan r.yaml", 2, "'abc' is not of the type !!int"),
    Case("yaml-bool-tag", recipe("train: {packing: !!bool x}"), "plan r.yaml", 2, "'x' is not of the type !!bool"),
    Case("yaml-5000-digits", recipe(f"method: {{r: {'9' * 5000}}}"), "plan r.yaml", 2, "a number of 5000 characters"),
    Case("yaml-nested", {"r.yaml": "[" * 2000 + "]" * 2000}, "plan r.yaml", 2, "more than 40 levels of nesting"),
    Case("yaml-aliases", {"r.yaml": ALIASES}, "plan r.yaml", 2, "more than 200000 values"),
    Case("yaml-fields", {"r.yaml": "".join(f"f{i}: 1\n" for i in range(10**5))}, "plan r.yaml", 2, "10000 keys"),
    Case("yaml-wrong-fields", recipe(*(f"f{i}: 1" for i in range(9000))), "plan r.yaml", 2, "… and 8981 more"),
    Case("set-5000-digits", {}, f"plan BASE --set train.seed={'9' * 5000}", 2, "a number of 5000 characters"),
    Case("set-nested", {}, f"plan BASE --set train.seed={'[' * 3000}", 2, "more than 40 levels of nesting"),
    Case("set-dates", {}, "plan BASE --set train.epochs=2024-13-45", 2, "epochs: got '2024-13-45'"),
    Case("huge-batch", {}, f"plan BASE --batch-size {10**30}", 2, "at least 1 and at most 1000000"),
    Case("huge-accumulation", {}, f"plan BASE --gradient-accumulation-steps {10**30}", 2, "at most 1000000"),
    Case("huge-rows", {}, f"plan BASE --max-seq-len {10**30}", 2, "at most 100000000"),
    Case("huge-epochs", {}, "plan BASE --epochs 1e308", 2, "above 0 and at most 1000000"),
    Case("huge-micro-batch", {}, f"plan BASE --max-tokens-per-micro-batch {10**30}", 2, "train.max_tokens_per_micro"),
    Case("flag-twice", {}, f"{TRAIN_FLAGS} --out o --epochs 1 --epochs 2", 2, "--epochs is given twice"),
    Case("switch-both-ways", {}, f"{TRAIN_FLAGS} --out o --packing --no-packing", 2, "--packing is given twice"),
    Case("set-twice", {}, "plan BASE --set train.seed=1 --set train.seed=2", 2, "--set train.seed is given twice"),
    Case("long-out", {}, f"{TRAIN_FLAGS} --out {'a' * 300}", 2, "the name is too long"),
    Case("long-model", {}, f"plan {'a' * 300}", 2, "there is no base"),
    Case("page-is-a-folder", {"run/report.html/x": ""}, "eval RUN --split validation", 2, "it is a folder"),
    Case("another-gpu", {}, f"{TRAIN_FLAGS} --out o --gpu rtx-4090", 2, "this would train on this machine"),
    Case("two-bases", {}, f"train gpt2 {TRAIN_FLAGS[6:]} --out o", 2, "'gpt2' and --model are both given"),
    Case("two-devices", {}, "plan BASE --gpu t4 --device cpu", 2, "--device and --gpu are both given"),
    Case("bare-base", {}, "train BASE --data ROWS --max-steps 1 --out o --dtype float32", 0, "validation loss"),
    Case("device-of-eval", {}, "eval RUN --split validation --device cuda:9", 2, "CUDA devices"),
    Case("long-data", {}, f"train --model BASE --data {'a' * 300} --out o", 2, "the name is too long"),
    Case("nul-in-out", recipe('output_dir: "a\\0b"'), "train r.yaml", 2, "output_dir"),
    Case("nul-in-model", {}, "plan BASE --set 'model=\"a\\0b\"'", 2, "there is no base"),
    Case("surrogate-in-out", {}, f"{TRAIN_FLAGS} --out a\udcffb", 2, "output_dir"),
    Case("surrogate-in-data", {}, "train --model BASE --data a\udcffb --out o", 2, "data.train"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]):
    folder = tmp_path_factory.mktemp("wrong-answers")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", 24)
    settings = f"--model {folder}/base --data {folder}/rows.jsonl --max-steps 1 --dtype float32"
    done = CliRunner().invoke(app, ["train", *settings.split(), "--out", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder


CONVERTED = ("ollama-name-unknown", "proof-required", "scored-planned")
"""Cases that convert or plan a base, which takes seconds."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.name in CONVERTED else []) for c in CASES]
)
def test_wrong_answer(case: Case, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = {"BASE": home / "base", "RUN": tmp_path / "run", "ROWS": home / "rows.jsonl"}

    def fill(text: str) -> str:
        for word, place in places.items():
            text = text.replace(word, str(place))
        return text

    monkeypatch.chdir(tmp_path)
    if "RUN" in case.command:
        shutil.copytree(home / "run", tmp_path / "run")
        if any(name.startswith("run/report.html/") for name in case.files):
            (tmp_path / "run" / "report.html").unlink()
    for name, content in case.files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else fill(content).encode())
    done = CliRunner().invoke(app, shlex.split(fill(case.command)), env={"COLUMNS": "200"})
    assert done.exit_code == case.exit_code, done.output
    assert case.words in " ".join(done.output.split())
    assert "bug in slimtune" not in done.output
