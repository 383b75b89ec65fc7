"""A real vLLM on the CPU serves exported adapters: does it say what was trained, and does it refuse what we refuse?

    make verify-vllm [ARGS="RUN ..."]      (.venv/bin/python benchmarks/verify_vllm.py [RUN ...] [--keep FOLDER])

SmolLM2-135M is tuned for a few steps in five ways on answers, and by DPO on pairs of them (or the given runs are taken,
which must stand on one base). Each is exported by `write_vllm_adapter`, and one server is started by the printed
command in its CPU form:

    vllm serve BASE …     becomes     .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model BASE …

with all adapters, in float32. Every adapter then goes through the gate (`export/expected_logps.py`): token ids of
rendered prompts, log p under teacher forcing over 200 positions at least, within 0.01 nats at the worst, and greedy
answers. One adapter, "control", is written wrong on purpose: with rank and alpha patterns left out, as releases that do
not know them read it; the gate must refuse it. Then adapters that vLLM refuses are offered to it, and its own words
stand beside ours. Exit code 1: a gate failed, the control passed, or something that vLLM refuses was not refused by us.
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from slimtune.core.adapters.method_registry import list_methods
from slimtune.core.adapters.peft_config import CONFIG_FILE
from slimtune.core.adapters.peft_model import get_peft_model
from slimtune.core.config import Recipe
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.model_source import resolve_model_source
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import RunError, SlimtuneError
from slimtune.export.expected_logps import (
    QUESTIONS,
    AdapterReference,
    EngineTolerance,
    ReferenceText,
    judge_engine_against_adapter,
)
from slimtune.export.export_results import EngineVerdict
from slimtune.export.merge import load_run_for_export
from slimtune.export.vllm import write_vllm_adapter
from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds
from slimtune.extras.row_files import read_rows
from slimtune.generation.inference_engines import VllmClient

HERE = Path(__file__).parents[1]
ROWS = HERE / "examples/devils-dictionary"
PYTHON = HERE / ".venv-vllm/bin/python"
FACTS = HERE / "benchmarks/vllm_ways/facts.py"
BASE = "smollm2-135m"
LIMIT = EngineTolerance(max_difference=0.01, mean_difference=0.01)
HELD, LONGEST = 4, 200
STEPS = 10
"""Optimizer steps of 8 rows."""
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 4, "layers.3.mlp.down_proj": 24},
        "alpha_pattern": {"q_proj": 32, "up_proj": 4},
        "use_rslora": True,
    },
    "pissa": {"r": 8, "lora_alpha": 16, "init_lora_weights": "pissa_niter_4"},
    "ends": {"r": 8, "lora_alpha": 16, "target_modules": ["embed_tokens", "lm_head", "q_proj", "up_proj"]},
    "dpo": {"r": 16, "lora_alpha": 32},
}
"""Runs by name, and what their method is set to; PiSSA's start lies in the weight, SmolLM2's two ends are tied."""
REFUSED: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trained biases": {"bias": "all"},
    "a bias on B": {"lora_bias": True},
    "rows of an embedding": {"trainable_token_indices": [1, 2]},
    "rank 520": {"r": 520},
    "LoftQ": {},
}
NEEDED = {
    "bitfit": {"new_biases": True},  # Llama has none
    "trainable_tokens": {"token_indices": [1, 2, 198, 520, 4093, 9690]},
}
START_SECONDS = 600


# --- runs and their exports ------------------------------------------------------------------------------------------


def tuned(name: str, settings: dict[str, Any], folder: Path) -> Path:
    """Tune SmolLM2 for a few steps, or take the run that lies there."""
    out = folder / name
    if not (out / "result.json").is_file():
        data = {"train": str(ROWS / "train.jsonl"), "validation": str(ROWS / "validation.jsonl")}
        recipe = {
            "model": {"name": BASE},
            "task": "dpo" if name == "dpo" else "sft",
            "data": {"train": str(write_pairs(folder))} if name == "dpo" else data,
            "method": {"name": "lora", **settings},
            "train": {"max_steps": STEPS, "learning_rate": 2e-4 if name == "dpo" else 1e-3},
            "output_dir": str(out),
        }
        train(Recipe.from_dict(recipe))
    return out


def write_pairs(folder: Path) -> Path:
    """Write pairs: the answer to a question is better than the answer to the next one."""
    talks = [row.messages for row in read_rows(ROWS / "train.jsonl")[: 8 * STEPS]]
    rows = [
        {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": other[-1:]}
        for talk, other in zip(talks, talks[1:] + talks[:1], strict=True)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts_of(tokenizer: Any) -> list[ReferenceText]:
    """Return fixed questions and held-out rows, each as the prompt rendered for an answer and the whole talk."""
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    talks += [row.messages for row in read_rows(ROWS / "test.jsonl")[:HELD]]
    found = []
    for talk in talks:
        prompt = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        found.append(ReferenceText(prompt, tokenizer(whole, add_special_tokens=False)["input_ids"][:LONGEST]))
    return found


def judged(run: Path, url: str, facts: dict[str, Any]) -> EngineVerdict:
    """Compare one adapter that the server serves with the run it was exported from, both in float32."""
    loaded = load_run(run, dtype="float32", device="cpu")
    texts = texts_of(loaded.base.tokenizer)
    server = VllmClient(url, facts["name"])
    for text, (question, _) in zip(texts, QUESTIONS, strict=False):
        ours = loaded.base.tokenizer(text.prompt, add_special_tokens=False)["input_ids"]
        theirs = server.tokenize_chat([{"role": "user", "content": question}])
        if ours != theirs:
            raise RunError(f"vLLM's own chat template renders {question!r} as {theirs}", f"{ours}")
    reference = AdapterReference(loaded.model, loaded.base.tokenizer, texts)
    return judge_engine_against_adapter(reference, server, "f32", LIMIT)


# --- the server ------------------------------------------------------------------------------------------------------


def cpu_command(exports: list[dict[str, Any]], port: int) -> list[str]:
    """Return the first export's printed command in its CPU form, with the other exports' adapters beside."""
    base, *rest = exports[0]["arguments"]
    modules = [e["arguments"][e["arguments"].index("--lora-modules") + 1] for e in exports]
    at = rest.index("--lora-modules")
    rest[at + 1 : at + 2] = modules
    rest[rest.index("--max-lora-rank") + 1] = str(max(e["max_lora_rank"] for e in exports))
    more = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    return [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", base, *rest, *more]


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Run the server until the block ends, however it ends; give its address."""
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    # So that adapters can be offered to it that it refuses.
    small |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | small, start_new_session=True
        )
    try:
        while True:
            if process.poll() is not None:
                raise RunError(f"vLLM ended with code {process.returncode}:\n{_tail(log)}", "a server that starts")
            if time.monotonic() - began > START_SECONDS:
                raise RunError(f"vLLM did not start in {START_SECONDS} s:\n{_tail(log)}", "a server that starts")
            with contextlib.suppress(SlimtuneError), contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                VllmClient(url, _first_name(command), timeout=10)
                break
            time.sleep(1)
        print(f"vLLM is up after {time.monotonic() - began:.0f} s", flush=True)
        yield url
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)


def _first_name(command: list[str]) -> str:
    return command[command.index("--lora-modules") + 1].partition("=")[0]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- what vLLM refuses -----------------------------------------------------------------------------------------------


def refused_adapters(folder: Path) -> Iterator[tuple[str, Path]]:
    """Give adapters of SmolLM2 as slimtune saves them, each of a kind that vLLM refuses."""
    methods = {f"method {n}": {"name": n, **NEEDED.get(n, {})} for n in list_methods() if n != "lora"}
    for label, settings in {**{k: {"name": "lora", **v} for k, v in REFUSED.items()}, **methods}.items():
        recipe = Recipe.from_dict(
            {"model": {"name": BASE}, "data": {"train": "none"}, "output_dir": "none", "method": settings}
        )
        model = AutoModelForCausalLM.from_pretrained(
            get_or_make_hf_folder_and_seconds(resolve_model_source(BASE).path)[0], dtype=torch.bfloat16
        )
        config: Any = recipe.method_config()
        model = get_peft_model(model, config)
        model.active_peft_config.base_model_name_or_path = BASE
        at = folder / label.replace(" ", "-")
        model.save_pretrained(at)
        if label == "LoftQ":  # such a start is made from a quantized base; what its file says of itself is enough here
            changed(at / CONFIG_FILE, init_lora_weights="loftq")
        yield label, at


def changed(config: Path, **fields: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def our_words(adapter: Path, folder: Path) -> str | None:
    """Export an adapter; return why it is refused, None where it is written."""
    try:
        folder.mkdir()
        write_vllm_adapter(load_run_for_export(adapter), adapter, folder)
    except SlimtuneError as error:
        return error.message.partition(": ")[2]
    return None


def their_words(url: str, adapter: Path) -> str | None:
    """Offer an adapter to the server; return why it does not take it, None where it does."""
    body = json.dumps({"lora_name": adapter.name, "lora_path": str(adapter)}).encode()
    asked = urllib.request.Request(f"{url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"})
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=120).close()
    except urllib.error.HTTPError as error:
        words = json.loads(error.read())["error"]["message"]
        return words.partition("with error '")[2].partition("', please check")[0] or words
    return None


# --- printing --------------------------------------------------------------------------------------------------------


def row(name: str, facts: dict[str, Any], v: EngineVerdict) -> str:
    rank = f"{facts['rank']}{' (scales folded)' if facts['folded'] else ''}"
    said = "holds" if v.passed else f"FAILS: {v.reason}"
    numbers = f"{v.max_difference:.2g} | {v.mean_difference:.2g} | {v.kl:.1g} | {v.effect:.2g}"
    equal = f"{v.prompts_equal}/{v.prompts} | {v.positions} | {numbers} | {v.answers_equal}/{v.answers}"
    return f"| {name} | {rank} | {equal} | {said} |"


HEAD = (
    "| run | rank | prompts equal | positions | largest d | mean d | KL | effect | greedy equal | gate |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="runs to take; none: six short ones are made")
    parser.add_argument("--keep", type=Path, help="folder for runs, exports and the server's log, kept")
    parser.add_argument("--no-refusals", action="store_true", help="leave out what vLLM refuses")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="verify-vllm-") as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="exports-", dir=folder) as exports:
            return verify(args.runs, folder, Path(exports), refusals=not args.no_refusals)


def verify(given: list[Path], folder: Path, exports: Path, refusals: bool) -> int:
    current = subprocess.run([str(PYTHON), str(FACTS), "--check"], capture_output=True, text=True)
    print(
        "vllm_rules.json is what this vLLM says" if current.returncode == 0 else current.stderr.splitlines()[-1],
        flush=True,
    )
    runs = {p.name: p for p in given} or {n: tuned(n, s, folder) for n, s in RUNS.items()}
    facts = {}
    for name, run in runs.items():
        (exports / name).mkdir()
        written = write_vllm_adapter(load_run_for_export(run), run, exports / name, dtype="float32")
        facts[name] = to_json_dict(written.facts)
        print(f"{name}: {written.commands[0]}", flush=True)
    port = free_port()
    command = cpu_command(list(facts.values()), port)
    print(f"\nstarted as: {shlex.join(command)}", flush=True)
    failed = []
    with serving(command, port, folder / "vllm.log") as url:
        print(f"\n{HEAD}", flush=True)
        for name, run in runs.items():
            verdict = judged(run, url, facts[name])
            print(row(name, facts[name], verdict), flush=True)
            failed += [] if verdict.passed else [name]
        if "patterns" in runs:
            wrong = exports / "control"
            shutil.copytree(runs["patterns"] / "adapter", wrong)
            changed(wrong / CONFIG_FILE, rank_pattern={}, alpha_pattern={})
            if refused := their_words(url, wrong):
                raise RunError(f"vLLM does not take the control: {refused}")
            verdict = judged(runs["patterns"], url, facts["patterns"] | {"name": "control"})
            print(row("control", facts["patterns"] | {"folded": False}, verdict), flush=True)
            failed += ["control"] if verdict.passed else []
        if refusals:
            print("\n| adapter | slimtune | vLLM |\n| --- | --- | --- |", flush=True)
            for label, adapter in refused_adapters(exports / "refused"):
                ours = our_words(adapter, exports / f"out-{adapter.name}")
                theirs = their_words(url, adapter)
                print(f"| {label} | {ours or 'TAKES IT'} | {theirs or 'takes it'} |".replace("\n", " "), flush=True)
                failed += [label] if theirs and not ours else []
    failed += ["vllm_rules.json"] if current.returncode else []
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
