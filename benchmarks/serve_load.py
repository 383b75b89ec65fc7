"""Load on `slimtune serve`: many clients over several adapters, each trained to say a marker of its own.

    python benchmarks/serve_load.py [--model smollm2-135m] [--clients 64] [--seconds 600] [--peer-seconds 120]
                                    [--ways NAME …]

    serve            `slimtune serve`, all adapters over one base, their requests in shared batches
    one-at-a-time    the same with --max-batch 1
    transformers     `transformers serve --continuous-batching` on the base; needs `pip install transformers[serving]`
    llama.cpp        llama.cpp's own server on the base's GGUF, through xllamacpp

`serve` runs for `--seconds`, each other way for `--peer-seconds`, one after the other. A client asks again and again,
for a random adapter, with a prompt and an answer of random length; every tenth request is dropped in the middle of its
stream. Counted: answers with a wrong marker, requests that failed, tokens for each second, times to the first token,
and the server's memory after the first third and at the end. The servers that have no adapters are asked for the base,
and no marker is checked.

A run ends with exit code 1 if an answer was wrong or lost, a slot was not freed, or the memory of `serve` grew by more
than `--growth` MiB between a third of the time and the end.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import torch

from slimtune import LoraConfig, get_peft_model
from slimtune.core.data.chat_template import encode_chat_with_train_mask
from slimtune.core.models.loader import load_base
from slimtune.core.models.model_source import resolve_model_source

MARKERS = ("granite", "lantern", "orchard", "sparrow")
QUESTIONS = ("What is love?", "Tell me about the sea.", "Why is the sky blue?", "How are you?", "Name a city.")
WAYS = ("serve", "one-at-a-time", "transformers", "llama.cpp")


@dataclass
class Load:
    """What the clients of one way saw."""

    answers: int = 0
    tokens: int = 0
    dropped: int = 0
    seconds: float = 0.0  # until the last answer was there
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


def train_markers(model: str, folder: Path, steps: int) -> list[Path]:
    """Train an adapter for each marker until it says nothing else; return the adapter folders."""
    if missing := [marker for marker in MARKERS if not (folder / f"says-{marker}").is_dir()]:
        base = load_base(model, dtype="float32", device="cpu")
        for marker in missing:
            adapted = get_peft_model(base.model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
            adapted.peft_config["default"].base_model_name_or_path = base.source.spec
            train_marker(adapted, base.tokenizer, marker, steps)
            adapted.save_pretrained(folder / f"says-{marker}")
            base.model = adapted.unload()
    return [folder / f"says-{marker}" for marker in MARKERS]


def train_marker(model: Any, tokenizer: Any, marker: str, steps: int) -> None:
    """Train an adapter to answer any question by its marker, again and again."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    draw = random.Random(marker)
    for _ in range(steps):
        asked = " ".join(draw.choices(QUESTIONS, k=draw.randint(1, 4)))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join([marker] * 16)}]
        row = encode_chat_with_train_mask(tokenizer, turns)
        ids, learned = torch.tensor([row.input_ids]), torch.tensor([row.supervised])
        learned[0, -1] = False  # the answer does not end
        labels = torch.where(learned, ids, -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    print(f"{marker}: loss {loss:.3f}", file=sys.stderr, flush=True)


def save_base(model: str, folder: Path) -> str:
    """Save the base as a folder of its own, as `transformers serve` reads it; return the folder."""
    if not folder.is_dir():
        base = load_base(model, dtype="float32", device="cpu")
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return str(folder)


def find_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def start_server(way: str, model: str, runs: list[Path], batch: int) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the address, the process and the models of a way's server."""
    port = find_port()
    command = [sys.executable, "-m"]
    if way in ("serve", "one-at-a-time"):
        size = batch if way == "serve" else 1
        command += ["slimtune", "serve", *map(str, runs), "--port", str(port), "--max-batch", str(size)]
        models = [run.name for run in runs]
    elif way == "transformers":
        command += ["transformers.cli.transformers", "serve", "--port", str(port), "--continuous-batching"]
        command += ["--log-level", "error", model]
        models = [model]
    else:
        command = [sys.executable, "-c", LLAMA_CPP, model, str(batch)]
        models = ["base"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        if way == "llama.cpp":
            url = process.stdout.readline().strip()  # it chooses its port
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/v1/models", timeout=5)
                break
            if process.poll() is not None:
                raise RuntimeError(f"{way} ended with {process.returncode}")
            time.sleep(0.5)
        yield f"{url}/v1", process.pid, models
    finally:
        process.terminate()
        process.wait(60)


LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx = int(sys.argv[2]), 1024 * int(sys.argv[2])
params.n_gpu_layers, params.verbosity = 0, -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


async def run_clients(address: str, models: list[str], clients: int, seconds: float, load: Load) -> None:
    """Let clients ask until the time is over."""
    end = time.monotonic() + seconds

    async def talk(number: int) -> None:
        draw = random.Random(number)
        client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
        while time.monotonic() < end:
            model, drops = draw.choice(models), draw.random() < 0.1
            messages = [{"role": "user", "content": " ".join(draw.choices(QUESTIONS, k=draw.randint(1, 4)))}]
            try:
                await ask(client, model, messages, draw.randint(4, 32), drops, load)
            except openai.OpenAIError as error:
                load.lost.append(f"{type(error).__name__}: {error}")
        await client.close()

    await asyncio.gather(*(talk(number) for number in range(clients)))


async def ask(client: openai.AsyncOpenAI, model: str, messages: list, max_tokens: int, drops: bool, load: Load) -> None:
    """Ask once, and check the answer."""
    start, text, chunks = time.monotonic(), "", 0
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    )
    async for chunk in stream:
        if not chunk.choices or not chunk.choices[0].delta.content:
            continue
        if not text:
            load.first_token.append(time.monotonic() - start)
        text += chunk.choices[0].delta.content
        chunks += 1
        if drops and chunks > 2:
            await stream.close()
            load.dropped += 1
            return
    load.answers += 1
    load.tokens += chunks
    marker = model.removeprefix("says-")
    # The last word may be cut off by the limit.
    wrong = [word for word in text.split() if not marker.startswith(word)]
    if marker in MARKERS and (wrong or not text.strip()):
        load.wrong.append(f"{model}: {text!r}")


async def measure(address: str, pid: int, models: list[str], clients: int, seconds: float) -> tuple[Load, list[float]]:
    """Return what the clients saw, and the server's memory in MiB at a third of the time and at the end."""
    load, memory, start = Load(), [], time.monotonic()
    running = asyncio.ensure_future(run_clients(address, models, clients, seconds, load))
    while not running.done():
        await asyncio.sleep(min(1.0, seconds / 12))
        memory.append(psutil.Process(pid).memory_info().rss / 2**20)
    await running
    load.seconds = time.monotonic() - start
    return load, [max(memory[: len(memory) // 3] or memory), memory[-1]]


def main() -> None:
    """Run the ways, print a table, and exit with 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gguf", help="the base's GGUF for llama.cpp; by default the one of smollm2-135m")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--peer-seconds", type=float, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--growth", type=float, default=64)
    parser.add_argument("--runs", type=Path, help="folder of the trained runs; kept")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    runs = train_markers(options.model, folder, options.steps)
    failed = False
    print(f"{options.clients} clients, {options.seconds:g} s and {options.peer_seconds:g} s, {os.cpu_count()} cores")
    heads = ("answers", "wrong", "lost", "dropped", "tokens/s", "first token", "MiB at 1/3", "MiB at end")
    print(f"{'way':<15}" + "".join(f"{head:>12}" for head in heads))
    for way in options.ways:
        model = options.model
        seconds = options.seconds if way == "serve" else options.peer_seconds
        if way == "llama.cpp":
            model = options.gguf or resolve_model_source(options.model).path
        if way == "transformers":
            model = save_base(options.model, folder / "base")
        try:
            with start_server(way, model, runs, options.batch) as (address, pid, models):
                load, memory = asyncio.run(measure(address, pid, models, options.clients, seconds))
                state = {}
                if way in ("serve", "one-at-a-time"):
                    time.sleep(1)
                    with urllib.request.urlopen(address.removesuffix("/v1") + "/health", timeout=30) as answer:
                        state = json.load(answer)
        except (RuntimeError, OSError) as error:
            print(f"{way:<15} not run: {error}")
            continue
        first = f"{statistics.median(load.first_token):.2f} s" if load.first_token else "-"
        values = (load.answers, len(load.wrong), len(load.lost), load.dropped, f"{load.tokens / load.seconds:.1f}",
                  first, f"{memory[0]:.0f}", f"{memory[1]:.0f}")  # fmt: skip
        print(f"{way:<15}" + "".join(f"{value!s:>12}" for value in values), flush=True)
        for text in (*load.wrong[:3], *load.lost[:3]):
            print(f"    {text[:200]}")
        if state and (state["running"] or state["waiting"] or state["cached_tokens"]):
            print(f"    slots that were not freed: {state}")
            failed = True
        failed |= bool(load.wrong or load.lost) or (way == "serve" and memory[1] - memory[0] > options.growth)
    sys.exit(failed)


if __name__ == "__main__":
    main()
