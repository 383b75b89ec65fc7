"""Do two checkouts give the same results? Run the same small commands in both, and compare all that they leave.

    python benchmarks/same_results.py OTHER_CHECKOUT [THIS_CHECKOUT] [--only CHAIN ...] [--jobs 2] [--no-times]

For a change that must not change behavior, such as moving code: OTHER_CHECKOUT is a checkout of before, THIS_CHECKOUT
(by default the one of this file) is the changed one. The commands of `CHAINS` run on tiny random bases and rows that
are made here. Compared are exit codes, stdout, stderr, the answers of servers, and every file that is written: tensors
bit for bit, JSON by keys, types and values, texts line by line. `library LORA_RUN` compares the public names, PEFT's
module paths, and what every method computes, its gradients and its files. What may differ between two runs of the same
source (times, measured memory, dates, paths) is in `IGNORED` and `VOLATILE`. Only public names and the command line are
used, so that modules may move.

The chains of `PLAIN` run as `python -m slimtune`; the commands of the others do the same in forks of a process that has
loaded torch and transformers, but nothing of slimtune, which halves their time (--plain: all in a Python of their own).
At the end the starts of three commands are timed in both checkouts; their ratios are no reason to fail.

Results are kept in a temporary folder by a hash of the source and of this file, so those of before are made once. One
checkout takes about four minutes on two cores that do nothing else. Exit code 1: something differs.
"""

import argparse
import hashlib
import http.cookiejar
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORE = Path(tempfile.gettempdir(), "slimtune-same-results")
SECONDS = 900  # until a command is taken to hang
LIBRARIES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
"""Variables that libraries read when they are loaded."""
PRELOADED = [
    "torch", "torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils", "transformers.trainer_utils",
    "transformers.optimization", "transformers.models.llama.modeling_llama",
]  # fmt: skip
"""What most commands load; it takes longer than their work."""
PLAIN = {"resume", "machines", "wrong uses", "help"}
"""Chains whose commands start in a Python of their own, as those of users do."""
PAIRS = "--data pairs.jsonl --test pairs_test.jsonl"
LABELS = "--data labels.jsonl --test labels_test.jsonl"


def forget_the_end(folder: Path) -> None:
    """Leave of the run `whole` what a kill after its second last checkpoint would have left, as the run `half`."""
    left_out = shutil.ignore_patterns("checkpoint-6", "adapter", "result.json", "report.html")
    shutil.copytree(folder / "whole", folder / "half", ignore=left_out)


# Chains of commands by name: each has a folder of its own, and a command may use what those before it left there.
Step = str | Callable[[Path], None]
CHAINS: dict[str, list[Step]] = {
    "lora": [
        "train recipe.yaml --out lora --json",
        "eval lora --generate 2 --max-new-tokens 8 --check exact --json",
        "report lora --json",
        "generate lora hello --side-by-side --max-new-tokens 8 --temperature 0.7 --seed 3 --json",
        "chat lora --max-new-tokens 8 --json",
        "merge lora --out merged --json",
        "export lora --to gguf --out gguf --json",
        "export lora --to vllm --out vllm --json",
        "export lora --to ollama --out ollama --json",
        "verify lora --json",
        "push lora me/name --dry-run --json",
        "library lora",
        "serve lora --port 0 --json",
        "ui . --port 0 --json",
    ],
    "compare": ["compare recipe.yaml --methods lora,ia3 --seeds 1 --tokens 400 --out compared --json"],
    "tune": ["tune recipe.yaml --over train.learning_rate=log:1e-4..1e-2 --trials 2 --out tuned --json"],
    "gguf base": [
        "train recipe.yaml --model tiny.gguf --out lora --json",
        "generate lora 'say 1' --max-new-tokens 8 --json",
        "export lora --to gguf --out adapter --json",
        "export lora --to gguf --merged --precision q8_0 --out merged --json",
        "verify adapter --json",
    ],
    "classification": [
        f"train recipe.yaml --task classification {LABELS} --out run --json",
        "eval run --json",
        "predict run 'good number 3' --json",
        "predict run --data labels_test.jsonl --out predicted.jsonl --json",
    ],
    "dpo": [f"train recipe.yaml --task dpo {PAIRS} --out run --json", "eval run --json"],
    "reward": [f"train recipe.yaml --task reward {PAIRS} --out run --json", "predict run 'say 3' --json"],
    "kto": ["train recipe.yaml --task kto --data goodness.jsonl --set data.test=null --out run --json"],
    "orpo": [f"train recipe.yaml --task orpo {PAIRS} --out run --json"],
    "simpo": [f"train recipe.yaml --task simpo {PAIRS} --out run --json"],
    "resume": [
        "train recipe.yaml --save-steps 2 --out whole --json",
        forget_the_end,
        "train half/recipe.yaml --out half --resume --json",
    ],
    "dora": ["train recipe.yaml --method lora --set method.use_dora=true --out run --json", "merge run --out m --json"],
    "prefix_tuning": ["train recipe.yaml --method prefix_tuning --out run --json"],
    "bottleneck": ["train recipe.yaml --method bottleneck --out run --json"],
    "ia3": ["train recipe.yaml --method ia3 --out run --json"],
    "prompt_tuning": ["train recipe.yaml --method prompt_tuning --out run --json"],
    "full": ["train recipe.yaml --method full --out run --json"],
    "sliding window": ["train recipe.yaml --model gemma --out run --json"],
    "experts": ["train recipe.yaml --model experts --out run --json"],
    "convolutions": ["train recipe.yaml --model convolutions --out run --json"],
    "4 bits": ["train recipe.yaml --quantization nf4 --out run --json"],
    "documents": ["train recipe.yaml --data text.txt --set data.test=null --max-seq-len 64 --out run --json"],
    "switches": [
        "train recipe.yaml --no-packing --gradient-checkpointing --mlp-tile-size 64 --optimizer adamw-8bit"
        " --forgetting-budget 0.5 --max-tokens-per-micro-batch 128 --gradient-accumulation-steps 2 --max-grad-norm 0.1"
        " --lr-scheduler linear --weight-decay 0.1 --eval-steps 2 --early-stopping-patience 1"
        " --set method.lora_dropout=0.1 --report-to tensorboard --out run --json",
        "train recipe.yaml --init-adapter run/adapter --max-steps 2 --out again --json",
    ],
    "data": [
        "data rows.jsonl --model base --validation test.jsonl --html page.html --json",
        "data broken.jsonl --model base --json",
        "data labels.jsonl --model base --format classification --json",
        "data pairs.jsonl --model base",
        "data text.txt --model base --max-seq-len 64 --json",
    ],
    "plan": [
        "plan recipe.yaml --vram 8GiB --json",
        "plan recipe.yaml --vram 8GiB --method lora,ia3 --details",
        "plan smollm2-135m --gpu rtx-3090 --quantization nf4 --json",
    ],
    "machines": [
        "choose recipe.yaml --json",
        "cost recipe.yaml --gpu rtx-3090 --json",
        "gpus --json",
        "gpus 'rtx 3090' m4-max-128gb --json",
        "models --json",
        "methods --json",
        "methods lora",
        "methods --model base --json",
        "doctor --json",
        "explain --json",
        "explain disk-full --json",
        "explain what is an epoch --json",
        "explain no space left on device",
        "--version",
    ],
    "wrong uses": [
        "",
        "trian",
        "train --model base --data rows.jsonl --out o --epocs 2 --dtype bf17",
        "train recipe.yaml --method lorra --out o --json",
        "train recipe.yaml --data nowhere.jsonl --out o",
        "train --model smollm2-135n --data rows.jsonl --out o",
        "train --model base --data rows.jsonl --out o --epochs many --dtype bf17 --set method.rnak=3 --json",
        "train recipe.yaml --set train.epochs=-1 --set train.learing_rate=1 --out o",
        "train recipe.yaml --set method.rank=0 --out o",
        "train recipe.yaml --set train.max_steps=[1] --set task.beta=1 --out o",
        "train recipe.yaml --out base",
        "train nowhere.yaml --out o --json",
        "train recipe.yaml --task dpo --out o",
        "train broken.yaml --out o",
        "train recipe.yaml --data broken.jsonl --out o --json",
        "eval nowhere --json",
        "eval base",
        "generate base hello --json",
        "export base --to olama --out o",
        "merge base --out base",
        "plan llama-3.1-9b --json",
        "gpus --kind desktops",
        "cost llama-3.1-8b --gpu 'm4 max 80gb'",
        "methods lore",
        "compare nowhere.yaml",
        "compare recipe.yaml --methods lora,lorra --out o",
        "tune recipe.yaml --over train.learning_rat=1e-5..1e-2 --out o",
        "push base name",
        "bench --show --json",
        "serve nowhere",
        "predict base text",
        "chat base --temperature hot",
    ],
    "help": [
        f"{command} --help".strip()
        for command in (
            "", "plan", "choose", "cost", "gpus", "bench", "models", "data", "train", "eval", "report", "tune",
            "compare", "generate", "chat", "predict", "merge", "export", "verify", "push", "serve", "ui", "methods",
            "doctor", "explain",
        )
    ],
}  # fmt: skip
TYPED = {"chat": "hello\n/hlep\n/exit\n"}
"""What a user types into a command."""
ASKED: dict[str, list[tuple[str, Any]]] = {
    "serve": [
        ("/models", None),
        ("/chat/completions", {"model": "lora", "messages": [{"role": "user", "content": "say 1"}], "max_tokens": 6,
                               "temperature": 0.7, "seed": 3, "logprobs": True, "top_logprobs": 2}),
        ("/completions", {"model": "base", "prompt": "say", "max_tokens": 6, "temperature": 0, "logprobs": 1}),
        ("/completions", {"model": "lore", "prompt": "say"}),
        ("/chat/completions", {"model": "lora", "messages": "say 1"}),
    ],
    "ui": [(page, None) for page in ("/", "/plan", "/train", "/evaluate", "/chat", "/runs", "/runs/lora", "/export")],
}  # fmt: skip
"""What is asked of the commands that serve: paths and bodies."""
STARTS = {"help": "--help", "a wrong flag": "train recipe.yaml --epocs 2", "plan": "plan recipe.yaml --vram 8GiB"}
"""The commands whose starts are timed."""

IGNORED = {
    # times and speeds
    "seconds", "train_seconds", "train_cpu_seconds", "start_seconds", "load_seconds", "prepare_seconds",
    "time_seconds", "tokens_per_second",
    # measured memory, and what is best by time and memory
    "peak_bytes", "front",
    # dates
    "finished", "created",
    # the machine
    "versions",
}  # fmt: skip
"""Keys of JSON whose values may differ between two runs of the same source; their types may not."""
IGNORED_IN = {
    "plan.json": {"usable_bytes", "reason", "max_batch_size", "bytes", "as_planned"},  # what this machine has free
    "metrics.jsonl": {"memory_bytes"},
    "checksums.json": {"training_state.json", "adapter_config.json"},  # files with times, and with the base's path
    "doctor": {"memory_free_bytes", "disk_free_bytes", "facts", "findings"},
}
"""More of them, in files of a name, and in what a command prints."""
VOLATILE = [
    (r"^(.*\d+ of \d+ .*(so far|after\b).*|step (?!1/)\d+/\d+ · .*)$\n?", ""),  # progress, by chance of the moment
    (r"^other processes compete for the cores.*$\n?", ""),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(\.\d+)?(\+00:00| UTC|Z)?", "DATE"),
    (r"\b\d\d:\d\d:\d\d\b", "TIME"),
    (r"\b\d[\d.]*( to \d[\d.]*)? ([KMGT]i?)?B\b", "N B"),
    (r"\b\d[\d.]* (s|ms|min( \d+ s)?|h( \d+ min)?)\b", "N s"),
    (r"\b\d[\d.,]*( [kM])? ?(tok(ens)?)?/s\b", "N tokens/s"),
    (r"\b(chat)?cmpl-\w+", "ANSWER"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
    (r"process \d+", "process N"),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}(-\d+)?", "UUID"),
    (r"\b\d{10}\.\d+", "TIME"),
]
"""Parts of texts that may differ, and what stands for them."""
VOLATILE_HTML = [
    (r"<figure(?:(?!</figure>).)*(speed|memory|Speed|Memory)(?:(?!</figure>).)*</figure>", "<figure/>"),
    (r"(tokens/s</th>).*?(</tr>)", r"\1\2"),
    (r"<td>\d[\d,]*</td>", "<td>N</td>"),
    (r'<line class="measured"[^>]*>', '<line class="measured">'),
]
"""More of them, in pages: charts and tables of speed and memory."""


# --- texts, JSON and files as facts, which can be compared ------------------------------------------------------------


class Facts:
    """Turns what a command leaves into JSON that is equal for two runs of the same source.

    Args:
        folder: the working folder, which texts may name.
        checkout: the checkout whose source runs.
    """

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = str(folder), str(checkout)

    def text(self, text: str, more: list[tuple[str, str]] | None = None) -> str:
        """Replace paths, times, speeds and measured memory."""
        text = re.sub(re.escape(self.checkout) + r"/src/slimtune(/[\w.-]+)*/", "PACKAGE/", text)
        text = text.replace(self.folder, "HERE").replace(self.checkout, "CHECKOUT")
        for pattern, replacement in [*(more or []), *VOLATILE]:
            flags = re.MULTILINE | (re.DOTALL if "figure" in pattern else 0)
            text = re.sub(pattern, replacement, text, flags=flags)
        return text

    def lines(self, text: str, more: list[tuple[str, str]] | None = None) -> list[str]:
        return self.text(text, more).splitlines()

    def json(self, value: Any, ignored: set[str] = IGNORED) -> Any:
        """Replace the values of ignored keys by their types, and what may differ in texts."""
        if isinstance(value, dict):
            return {self.text(k): types_of(v) if k in ignored else self.json(v, ignored) for k, v in value.items()}
        if isinstance(value, list):
            return [self.json(v, ignored) for v in value]
        return self.text(value) if isinstance(value, str) else value

    def output(self, text: str, command: str) -> Any:
        """Return what a command prints: JSON if it is JSON, else lines."""
        try:
            return self.json(json.loads(text), IGNORED | IGNORED_IN.get(command, set()))
        except ValueError:
            return self.lines(text)

    def file(self, path: Path) -> Any:
        """Return what a file holds: tensors by name, JSON, or lines; else its hash."""
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            return tensors_in(data)
        if path.name == "tokenizer.json" or path.suffix == ".gguf":
            return [len(data), digest(data)]
        if path.suffix == ".svg":  # of time and memory
            return "picture"
        text = data.decode()
        ignored = IGNORED | IGNORED_IN.get(path.name, set())
        if path.suffix == ".json":
            return self.json(json.loads(text), ignored)
        if path.suffix == ".jsonl":
            return [self.json(json.loads(line), ignored) for line in text.splitlines() if line.startswith("{")]
        return self.lines(text, VOLATILE_HTML if path.suffix == ".html" else None)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def types_of(value: Any) -> Any:
    """Return the keys and types of a value, without the values."""
    if isinstance(value, dict):
        return {k: types_of(v) for k, v in value.items()}
    return type(value).__name__


def tensors_in(data: bytes) -> dict[str, Any]:
    """Return dtype, shape and a hash of each tensor of a .safetensors file; its metadata are left out."""
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    tensors.pop("__metadata__", None)
    return {
        name: [t["dtype"], t["shape"], digest(data[start + t["data_offsets"][0] : start + t["data_offsets"][1]])]
        for name, t in tensors.items()
    }


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Yield where two facts differ, and how."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                yield f"{where}/{key}: only in {'this' if key in b else 'the other'}"
            else:
                yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list) and isinstance(b, list):
        for i, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from differences(one, other, f"{where}[{i}]")
        if len(a) != len(b):
            extra = (a if len(a) > len(b) else b)[min(len(a), len(b))]
            yield f"{where}: {len(a)} and {len(b)} entries; the first one too many is {str(extra)[:200]}"
    elif repr(a) != repr(b):  # of different types, too; NaN is equal to itself
        yield f"{where}: {str(a)[:300]!r} is now {str(b)[:300]!r}"


# --- running commands of a checkout -----------------------------------------------------------------------------------


class Checkout:
    """A checkout and how its commands are run.

    Args:
        path: its folder.
        work: the folder in which commands run, one folder for each chain.
        plain: start a Python for each command; else most are forked from a process that has loaded the libraries.
    """

    def __init__(self, path: Path, work: Path, plain: bool) -> None:
        self.path, self.work, self.plain = path.resolve(), work, plain

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the variables of a command: one thread, this source, no network, nothing measured or kept before."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLIMTUNE_", "PYTHON", "HF_", "XDG_"))}
        own = {
            "PYTHONPATH": str(self.path / "src"),
            "PYTHONPYCACHEPREFIX": str(STORE / "bytecode"),  # leaves no file in the checkout
            "SLIMTUNE_BENCH": os.devnull, "SLIMTUNE_TRACES": os.devnull, "SLIMTUNE_UI_TOKEN": "t" * 32,
            "SLIMTUNE_CACHE": str(folder.with_name(f"{folder.name}.cache")),
            "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "100",
        }  # fmt: skip
        return {**kept, **LIBRARIES, **own}

    def start(self, words: list[str], folder: Path, **pipes: Any) -> subprocess.Popen[str]:
        """Start a command in a Python of its own."""
        command = [sys.executable, "-P", "-m", "slimtune", *words]
        return subprocess.Popen(command, cwd=folder, env=self.environment(folder), text=True, **pipes)

    def run(self, words: list[str], folder: Path, plain: bool) -> dict[str, Any]:
        """Run a command; return its exit code and what it printed."""
        facts, name = Facts(folder, self.path), words[0] if words else ""
        if name in ASKED and (folder / "lora").is_dir():
            return self.serve(words, folder, facts)
        outputs = [folder.with_name(f"{folder.name}.{kind}") for kind in ("in", "out", "err")]
        outputs[0].write_text(TYPED.get(name, ""))
        if plain:
            with outputs[0].open() as stdin, outputs[1].open("w") as stdout, outputs[2].open("w") as stderr:
                process = self.start(words, folder, stdin=stdin, stdout=stdout, stderr=stderr)
                code = wait_or_kill(process.wait, process)
        else:
            fork = multiprocessing.get_context("forkserver").Process(
                target=run_here, args=(words, folder, self.environment(folder), *outputs)
            )
            fork.start()
            wait_or_kill(fork.join, fork)
            code = fork.exitcode
        stdout, stderr = (output.read_text(errors="replace") for output in outputs[1:])
        return {"exit code": code, "stdout": facts.output(stdout, name), "stderr": facts.lines(stderr)}

    def serve(self, words: list[str], folder: Path, facts: Facts) -> dict[str, Any]:
        """Start a server, ask it, and interrupt it; return its answers and what it printed."""
        process = self.start(words, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stderr is not None
        begun, answers = "", []
        try:
            while "Ctrl-C" not in begun and (line := process.stderr.readline()):
                begun += line
            if found := re.search(r"(http://[^\s/]+(/v1)?)/?(\?token=\S+)?", begun):
                opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
                if found[3]:
                    fetch(opener, found[0], None)
                for path, body in ASKED[words[0]]:
                    code, text = fetch(opener, found[1] + path, body)
                    page = facts.lines(text, VOLATILE_HTML) if text.startswith("<") else facts.output(text, words[0])
                    answers.append([path, code, page])
                process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        printed = {"stdout": facts.output(stdout, words[0]), "stderr": facts.lines(begun + stderr)}
        return {"exit code": process.returncode, **printed, "answers": answers}

    def run_chain(self, name: str) -> dict[str, Any]:
        """Run the commands of a chain in a folder of its own; return the facts of each, with the files it wrote."""
        folder = self.work / name.replace(" ", "-")
        shutil.copytree(self.work / "inputs", folder)
        facts, found, before = Facts(folder, self.path), {}, list_files(folder)
        for step in CHAINS[name]:
            if not isinstance(step, str):
                step(folder)
                before = list_files(folder)
                continue
            plain = (self.plain or name in PLAIN) and not step.startswith("library")
            done = self.run(shlex.split(step), folder, plain)
            after = list_files(folder)
            written = [path for path, state in after.items() if before.get(path) != state]
            done["files"] = {facts.text(path): facts.file(folder / path) for path in written}
            done["removed"] = [path for path in before if path not in after]
            found[step or "(no command)"], before = done, after
        shutil.rmtree(folder)
        return found


def wait_or_kill(wait: Callable[..., Any], process: Any) -> Any:
    """Wait for a process, but kill it if it hangs."""
    try:
        return wait(timeout=SECONDS)
    finally:
        process.kill()


def run_here(words: list[str], folder: Path, environment: dict[str, str], *streams: Path) -> None:
    """Be `python -m slimtune` in this process, which was forked from one that has loaded the libraries."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.dont_write_bytecode, sys.pycache_prefix = False, environment["PYTHONPYCACHEPREFIX"]
    sys.path[:] = [environment["PYTHONPATH"], *(p for p in sys.path if p != str(Path(__file__).parent))]
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = ["slimtune", *words]
    if words[:1] == ["library"]:
        print(json.dumps(library_facts(words[1])))
    else:
        runpy.run_module("slimtune", run_name="__main__", alter_sys=True)


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the time and the size of each file below a folder, without those whose names are made by chance."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in files
        if "tfevents" not in path.name
    }


def fetch(opener: Any, address: str, body: Any) -> tuple[int, str]:
    """Return the status and the text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"} if data else {})
    try:
        with opener.open(request, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def source_hash(checkout: Path) -> str:
    """Return a hash of what decides the results: the source, the texts that `explain` reads, this file, libraries."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for folder in ("src", "docs"):
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(str(path.relative_to(checkout)).encode() + b"\0" + path.read_bytes())
    for library in ("torch", "transformers", "peft"):
        found.update(importlib.metadata.version(library).encode())
    return found.hexdigest()[:16]


def collect(checkout: Path, names: list[str], jobs: int, plain: bool, fresh: bool) -> dict[str, Any]:
    """Return the facts of some chains in a checkout: those that are kept, and the others by running them."""
    kept = STORE / f"{source_hash(checkout)}.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    missing = [name for name in names if fresh or name not in found]
    if not missing:
        print(f"{checkout}: kept in {kept}", file=sys.stderr)
        return found
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slimtune-same-") as folder, ThreadPoolExecutor(jobs) as pool:
        work = Path(folder).resolve()
        write_inputs(work / "inputs")
        for name, result in zip(missing, pool.map(Checkout(checkout, work, plain).run_chain, missing), strict=True):
            found[name] = result
            kept.write_text(json.dumps(found))
            print(f"{checkout}: {name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return json.loads(json.dumps(found))


def time_starts(checkouts: list[Path], repeats: int = 5) -> Iterator[str]:
    """Yield how long some commands take in both checkouts, the least of the repeats, which alternate."""
    with tempfile.TemporaryDirectory(prefix="slimtune-same-") as folder:
        work = Path(folder).resolve() / "inputs"
        write_inputs(work)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for name, command in STARTS.items():
            times: list[list[float]] = [[], []]
            for _ in range(repeats):
                for checkout, seconds in zip(checkouts, times, strict=True):
                    begun = time.perf_counter()
                    Checkout(checkout, work, True).start(shlex.split(command), work, **quiet).wait()
                    seconds.append(time.perf_counter() - begun)
            other, this = map(min, times)
            yield f"start of {name}: {other:.2f} s, now {this:.2f} s, ratio {this / other:.2f}"


# --- what the commands read -------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """Write tiny random bases, rows of every kind, and recipes. Nothing of slimtune is used, so all checkouts agree."""
    folder.mkdir(parents=True)
    write_bases(folder)
    answers = ["abc", "a long answer with more words", "abc abc", "x y z", "no"]
    rows = [chat(f"say {i}", answers[i % 5]) for i in range(24)]
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "test.jsonl", [chat(f"say {i}", answers[i % 5]) for i in range(100, 112)])
    pairs = [{"prompt": f"say {i}", "chosen": answers[i % 5], "rejected": "xyz " * (1 + i % 3)} for i in range(32)]
    write_lines(folder / "pairs.jsonl", pairs[:24])
    write_lines(folder / "pairs_test.jsonl", pairs[24:])
    labels = [{"text": f"{('good', 'bad', 'so so')[i % 3]} number {i}", "label": "abc"[i % 3]} for i in range(48)]
    write_lines(folder / "labels.jsonl", labels[:36])
    write_lines(folder / "labels_test.jsonl", labels[36:])
    goodness = [{"prompt": f"say {i}", "completion": answers[i % 5], "label": i % 2 == 0} for i in range(24)]
    write_lines(folder / "goodness.jsonl", goodness)
    write_lines(
        folder / "broken.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}, "no row", rows[0], rows[0]]
    )
    (folder / "text.txt").write_text("".join(f"Paragraph {i} of a text has {i * i} words.\n\n" for i in range(60)))
    (folder / "recipe.yaml").write_text(
        "model: {name: base, dtype: float32}\n"
        "data: {train: rows.jsonl, test: test.jsonl, validation_fraction: 0.25}\n"
        "train: {batch_size: 4, max_steps: 6}\n"
        "output_dir: run\n"
    )
    (folder / "broken.yaml").write_text("model: base\nmodel: base\ndata: [rows.jsonl\n")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_llama(**more: Any) -> Any:
    """Return a random Llama in float32, the same each time."""
    import torch
    import transformers as tf

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "max_position_embeddings": 512,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **more})).eval()


def write_bases(folder: Path) -> None:
    """Write random bases with a byte-level tokenizer: a Llama, also as GGUF, and three other architectures."""
    import torch
    import transformers as tf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    sys.path.append(str(ROOT / "tests"))
    from chatml import CHATML
    from tiny_gguf import write_gguf

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ends = {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2]}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHATML, **ends)
    sizes = tiny_llama().config.to_diff_dict()
    sizes = {k: sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    gemma = tf.Gemma3TextConfig(
        **sizes, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    experts = tf.Qwen3MoeConfig(**sizes, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    convolutions = tf.Lfm2Config(**sizes, layer_types=["conv", "full_attention"])
    others = {"gemma": gemma, "experts": experts, "convolutions": convolutions}
    for name, config in [("base", None), *others.items()]:
        torch.manual_seed(0)
        model = tiny_llama() if config is None else tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.add_tokens(["Ġa", "Ġ1"])  # what the merges that write_gguf writes make
    write_gguf(folder / "tiny.gguf", tiny_llama(vocab_size=261), tokenizer)


# --- the public names, in a process that imports slimtune -------------------------------------------------------------

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaLora": ("AdaLoraConfig", {"total_step": 10, "tinit": 1, "tfinal": 1}),
    "AdaptionPrompt": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
    "BitFit": ("BitFitConfig", {"new_biases": True}),
    "Bottleneck": ("BottleneckConfig", {}),
    "Full": ("FullConfig", {}),
    "Hira": ("HiraConfig", {}),
    "IA3": ("IA3Config", {}),
    "LNTuning": ("LNTuningConfig", {}),
    "LoHa": ("LoHaConfig", {"target_modules": ["q_proj", "up_proj"]}),
    "LoKr": ("LoKrConfig", {"target_modules": ["q_proj", "up_proj"]}),
    "LoRA": ("LoraConfig", {}),
    "LoRA, all layers": ("LoraConfig", {"target_modules": "all-linear", "use_rslora": True, "r": 4}),
    "LoRA, DoRA": ("LoraConfig", {"use_dora": True}),
    "LoRA, PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "LoRA, OLoRA": ("LoraConfig", {"init_lora_weights": "olora"}),
    "LoRA, orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal"}),
    "LoRA, gaussian": ("LoraConfig", {"init_lora_weights": "gaussian", "bias": "lora_only"}),
    "LoRA, ranks": ("LoraConfig", {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "layers_to_transform": [0]}),
    "LoRA, embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA, head": ("LoraConfig", {"modules_to_save": ["lm_head"]}),
    "LoRA, tokens": ("LoraConfig", {"trainable_token_indices": [3, 5]}),
    "LoRA, invoked": ("LoraConfig", {"alora_invocation_tokens": [7, 8]}),
    "LoRA, repeated layers": ("LoraConfig", {"layer_replication": [[0, 2], [0, 2]]}),
    "Miss": ("MissConfig", {"r": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "target_modules": ["q_proj", "up_proj"]}),
    "PTuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "Prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "Prefix, projected": ("PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True,
                                                 "encoder_hidden_size": 16}),
    "Prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "Shira": ("ShiraConfig", {"r": 2}),
    "TrainableTokens": ("TrainableTokensConfig", {"token_indices": [3, 5]}),
    "Vera": ("VeraConfig", {"r": 8}),
}  # fmt: skip
"""Methods and variants that the library attaches to a tiny Llama: a config class and its fields."""
TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")


def library_facts(run: str) -> dict[str, Any]:
    """Return what the public names are and compute; `run` is a run folder."""
    import slimtune

    home = Path(slimtune.__file__).resolve()
    assert home.is_relative_to(Path(os.environ["PYTHONPATH"]).resolve()), f"another slimtune is imported: {home}"
    paths = importlib.import_module("slimtune.tuners")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = computed_facts(run)
    return {
        **found,
        "warnings": sorted({f"{w.category.__name__}: {without_paths(str(w.message))}" for w in warned}),
        "public names": {name: describe(getattr(slimtune, name)) for name in slimtune.__all__},
        "PEFT's classes": {name: shared_methods(name) for name in slimtune.__all__},
        "PEFT's modules": [path for path in peft_modules() if has_module(f"slimtune{path}")],
        "PEFT's names": {name: attempt(lambda name=name: type(getattr(paths, name)).__name__) for name in dir(paths)},
        "a wrong name": attempt(lambda: slimtune.LoraConfi),
    }


def computed_facts(run: str) -> dict[str, Any]:
    return {
        "methods": {name: attempt(method_facts, *config) for name, config in CONFIGS.items()},
        "tasks": {
            f"{task}, {name}": attempt(task_facts, task, name)
            for task in TASKS
            for name in ("LoRA", "Prompt", "Prefix")
        },
        "several adapters": attempt(several_adapters),
        "converted": attempt(converted_facts),
        "a run": attempt(run_facts, run),
    }


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a call returns, or its error as text."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {without_paths(str(error))}"


def has_module(path: str) -> bool:
    try:
        return bool(importlib.import_module(path))
    except ImportError:
        return False


def without_paths(text: str) -> str:
    """Leave out addresses in memory, and the modules in which names of slimtune are defined."""
    return re.sub(r"\bslimtune(\.\w+)*\.(\w+)", r"slimtune.\2", re.sub(r" at 0x\w+", "", text))


def parameters_of(function: Any) -> list[str] | None:
    """Return the parameters of a function or class with their defaults, without types."""
    import inspect

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [without_paths(f"{p.kind.name} {p.replace(annotation=p.empty)}") for p in parameters]


def describe(value: Any) -> Any:
    """Return what a public name is: members of an enumeration, entries of a mapping, or parameters."""
    import enum

    if isinstance(value, dict):
        return {str(k): without_paths(str(v)) for k, v in value.items()}
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return [str(member.value) for member in value]
    if isinstance(value, type):
        return [f"class {value.__name__}", [base.__name__ for base in value.__mro__ if base.__module__ == "builtins"],
                parameters_of(value)]  # fmt: skip
    return [type(value).__name__, parameters_of(value)]


def shared_methods(name: str) -> dict[str, Any] | None:
    """Return the parameters of the public methods that a class has in PEFT and here."""
    import peft

    import slimtune

    theirs, ours = getattr(peft, name, None), getattr(slimtune, name)
    if not isinstance(theirs, type) or not isinstance(ours, type):
        return None
    names = [n for n in dir(theirs) if not n.startswith("_") and n not in dir(dict)]
    return {n: parameters_of(getattr(ours, n)) if hasattr(ours, n) else "missing" for n in names}


def peft_modules() -> list[str]:
    """Return the paths of PEFT's modules without `peft`, such as ".tuners.lora.layer"; none is imported."""
    spec = importlib.util.find_spec("peft")
    assert spec is not None
    home = Path((spec.submodule_search_locations or [""])[0])
    files = (path.relative_to(home).with_suffix("") for path in sorted(home.rglob("*.py")))
    return ["".join(f".{part}" for part in file.parts if part != "__init__") for file in files]


def hash_of(tensor: Any) -> list[Any]:
    """Return dtype, shape and a hash of the bits of a tensor."""
    import torch

    bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return [str(tensor.dtype), list(tensor.shape), digest(bits)]


def token_ids() -> Any:
    import torch

    ids = torch.randint(9, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[:, 4:6] = torch.tensor([7, 8])  # what invokes the adapter that is invoked
    return ids


def shake(model: Any) -> None:
    """Add noise to all that trains, so that adapters that begin as nothing change the model."""
    import torch

    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p += torch.randn(p.shape, generator=draws) * 0.05


def method_facts(config_class: str, fields: dict[str, Any]) -> Any:
    """Return what an adapted Llama computes, its gradients, what it saves, and what it is when loaded and merged."""
    import torch

    import slimtune

    torch.manual_seed(0)
    config = getattr(slimtune, config_class)(task_type="CAUSAL_LM", **fields)
    model = slimtune.get_peft_model(tiny_llama(), config)
    begin = {name: hash_of(p) for name, p in model.named_parameters() if p.requires_grad}
    shake(model)
    found = model_facts(model.eval(), {"input_ids": token_ids(), "labels": token_ids()})
    with torch.no_grad(), model.disable_adapter():
        disabled = hash_of(model(input_ids=token_ids()).logits)
    return {
        "begin": begin,
        **found,
        "disabled": disabled,
        "generated": attempt(lambda: model.generate(input_ids=token_ids()[:1], max_new_tokens=4).tolist()),
        "loaded": attempt(saved_facts, model, tiny_llama(), slimtune.PeftModelForCausalLM),
        "status": attempt(lambda: without_paths(str(slimtune.get_model_status(model)))),
        "merged": attempt(lambda: hash_of(model.merge_and_unload()(input_ids=token_ids()).logits)),
    }


def model_facts(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return an adapted model's outputs, gradients and adapter."""
    import slimtune

    out = model(**inputs)
    values = {k: hash_of(v) for k, v in out.items() if hasattr(v, "detach")}
    total = out.loss if out.get("loss") is not None else out.last_hidden_state.square().mean()
    total.backward()
    gradients = {n: None if p.grad is None else hash_of(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    state = {name: hash_of(tensor) for name, tensor in slimtune.get_peft_model_state_dict(model).items()}
    return {"outputs": values, "gradients": gradients, "state": state}


def saved_facts(model: Any, base: Any, model_class: Any) -> Any:
    """Return the files that a model saves, and the adapter's outputs when loaded on another base."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        tensors = tensors_in(Path(folder, "adapter_model.safetensors").read_bytes())
        loaded = model_class.from_pretrained(base, folder).eval()
        with torch.no_grad():
            return [config, tensors, hash_of(loaded(input_ids=token_ids()).logits)]


def task_facts(task: str, method: str) -> Any:
    """Return what an adapted model of another task than text generation computes."""
    import torch
    import transformers as tf

    import slimtune

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = tf.BertConfig(
        **small, vocab_size=320, num_labels=2 if task == "QUESTION_ANS" else 3, max_position_embeddings=64
    )
    t5 = tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=320, dropout_rate=0.0,
                     decoder_start_token_id=0)  # fmt: skip
    classes = {"SEQ_CLS": "BertForSequenceClassification", "TOKEN_CLS": "BertForTokenClassification",
               "QUESTION_ANS": "BertForQuestionAnswering", "FEATURE_EXTRACTION": "BertModel",
               "SEQ_2_SEQ_LM": "T5ForConditionalGeneration"}  # fmt: skip
    labels = {"SEQ_CLS": {"labels": torch.tensor([0, 2])}, "TOKEN_CLS": {"labels": token_ids() % 3},
              "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
              "FEATURE_EXTRACTION": {}, "SEQ_2_SEQ_LM": {"labels": token_ids()[:, :5].clone()}}  # fmt: skip
    torch.manual_seed(0)
    base = getattr(tf, classes[task])(t5 if task == "SEQ_2_SEQ_LM" else encoder).eval()
    config_class, fields = CONFIGS[method]
    model = slimtune.get_peft_model(base, getattr(slimtune, config_class)(task_type=task, **fields))
    shake(model)
    mask = torch.ones_like(token_ids())
    found = model_facts(model.eval(), {"input_ids": token_ids(), "attention_mask": mask, **labels[task]})
    return {"class": type(model).__name__, **found}


def several_adapters() -> Any:
    """Return what a model with two adapters computes with each, with both, and with a batch that mixes them."""
    import torch

    import slimtune

    torch.manual_seed(0)
    model = slimtune.get_peft_model(tiny_llama(), slimtune.LoraConfig(task_type="CAUSAL_LM", r=4))
    model.add_adapter("other", slimtune.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    found: dict[str, Any] = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        shake(model)
    model.eval()
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            found[name] = hash_of(model(input_ids=token_ids()).logits)
        model.add_weighted_adapter(["default", "other"], [0.5, 1.0], "both", combination_type="cat")
        model.set_adapter("both")
        found["both"] = hash_of(model(input_ids=token_ids()).logits)
        mixed = model(input_ids=token_ids(), adapter_names=["other", "__base__"]).logits
        found["mixed"] = hash_of(mixed)
    found["layers"] = without_paths(str(slimtune.get_layer_status(model)))
    return found


def converted_facts() -> Any:
    """Return a LoRA made of another method's adapter; it is written, too."""
    import slimtune

    config_class, fields = CONFIGS["LoHa"]
    model = slimtune.get_peft_model(tiny_llama(), getattr(slimtune, config_class)(task_type="CAUSAL_LM", **fields))
    shake(model)
    slimtune.save_as_lora("as-lora", model, rank=2)
    config, tensors = slimtune.convert_to_lora(model, rank=0.5)
    return [config.to_dict(), {name: hash_of(tensor) for name, tensor in tensors.items()}]


def run_facts(run: str) -> Any:
    """Return what `load_run` loads."""
    import torch

    import slimtune

    loaded = slimtune.load_run(run)
    with torch.no_grad():
        return [type(loaded.model).__name__, hash_of(loaded.model(input_ids=token_ids()).logits)]


# --- the command ------------------------------------------------------------------------------------------------------


def compare(other: dict[str, Any], this: dict[str, Any], names: list[str], show: int) -> int:
    """Print a line for each command; return how many differ."""
    wrong = 0
    for name in names:
        for step in [*other[name], *(s for s in this[name] if s not in other[name])]:
            found = list(differences(other[name].get(step), this[name].get(step)))
            wrong += bool(found)
            print(f"{'differs' if found else 'same   '}  {name}: {step}"[:150])
            for line in found[:show]:
                print(f"           {line}")
            if len(found) > show:
                print(f"           and {len(found) - show} more")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("this", type=Path, nargs="?", default=ROOT, metavar="THIS_CHECKOUT")
    parser.add_argument("--only", nargs="+", choices=CHAINS, metavar="CHAIN", help=", ".join(CHAINS))
    parser.add_argument("--jobs", type=int, default=2, help="commands at the same time")
    parser.add_argument("--show", type=int, default=3, help="differences shown for each command")
    parser.add_argument("--plain", action="store_true", help="start a Python for each command, which takes longer")
    parser.add_argument("--fresh", action="store_true", help="run THIS_CHECKOUT even if its results are kept")
    parser.add_argument("--no-times", action="store_true", help="do not time the starts")
    args = parser.parse_args()
    names = args.only or list(CHAINS)
    checkouts = [args.other.resolve(), args.this.resolve()]
    os.environ.update(LIBRARIES)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    STORE.mkdir(exist_ok=True)
    other = collect(checkouts[0], names, args.jobs, args.plain, fresh=False)
    this = collect(checkouts[1], names, args.jobs, args.plain, args.fresh)
    wrong = compare(other, this, names, args.show)
    for line in [] if args.no_times else time_starts(checkouts):
        print(line, flush=True)
    print(f"{wrong} commands differ" if wrong else "all the same")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
