"""Attack `slimtune serve` while honest clients use it: `make fuzz` runs a short part, `--long` ten minutes.

A server in a process of its own gets damaged requests, broken HTTP, connections that hang and streams that are cut off.
With the torch engine, errors are also raised in its thread, in passes that an attacker's answer takes part in. Beside
them honest clients ask what was asked before, of each model alone. What must hold:

    wrong     no honest answer has another text, or log-probabilities that differ by more than the batch explains;
              none that a grammar binds is invalid
    lost      every honest request is answered, none with an error
    hang      every request, the attackers' too, ends within a minute
    health    `/health` says "ok" at each moment, and in the end that nothing runs or waits
    reply     what attackers get is HTTP: an answer, or OpenAI's error object, and 500 only where an error was raised

A case depends on its number and `--seed` alone, but not on which requests it meets. The exit code is 1 if one falls.
"""

import argparse
import collections
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mutations import NASTY_VALUES, dump_json, mutate_bytes, mutate_json

sys.path.append(str(Path(__file__).parents[1]))

HONEST, ATTACKERS, REFERENCES = 32, 12, 48
LIMIT_S = 60
MARKED = range(0xBAD << 40, (0xBAD << 40) + 2**31)
"""Seeds of attackers: errors are raised only in passes with such a row."""
HEADERS = {"Content-Type": "application/json"}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
BOUND: list[tuple[dict[str, Any], str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        r'\{\s*"ok"\s*:\s*(true|false)\s*,\s*"n"\s*:\s*\d\d?\s*\}',
    ),
    ({"structured_outputs": {"regex": "[ab]{3,9}(c|dd)"}}, "[ab]{3,9}(c|dd)"),
    ({"structured_outputs": {"choice": ["yes", "no", "é"]}}, "yes|no|é"),
]
"""Fields that bind an answer, and what it matches then."""
CHAIN = {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}}
HOSTILE: list[dict[str, Any]] = [
    *({"structured_outputs": {"regex": regex}} for regex in (
        "((a{1000}){1000}){1000}", "x*(a|b)*a(a|b){500}", "(?:a?){5000}a{5000}", "(" * 9000, r"(a)\1", "[", r"[^\s\S]",
        "a" * 190_000, r"\p{L}{1,3000}", "(.*a.*){20}(.*b.*){20}", "\ud800", "",
    )),
    *({"structured_outputs": {"json": schema}} for schema in (
        CHAIN, {"$ref": "#"}, {"$ref": "http://127.0.0.1:9/x"}, {"not": {}}, {"foo": 1}, {"enum": []},
        {"type": "string", "pattern": "(.*a.{30}b|.*c.{40}d)"}, {"type": "array", "items": {"$ref": "#"}},
        {"enum": [f"value {i}" for i in range(9000)]}, {"type": "string", "minLength": 100_000_000},
        {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}, {},
    )),
    {"response_format": {"type": "json_object"}},
]  # fmt: skip
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


# --- the server, in a process of its own ------------------------------------------------------------------------------


def write_runs(folder: Path) -> list[Path]:
    """Write a tiny base as GGUF, and three runs in fp32 whose adapters have strong effects."""
    import torch
    from hand_run import save_adapter_of, write_rows
    from kinds import sound_gguf

    import slimtune
    from slimtune.core.config import Recipe
    from slimtune.core.training.run_dir import RunDir

    (base := folder / "base.gguf").write_bytes(sound_gguf())
    layers = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]

    def make(number: int) -> Path:
        def change(model: Any) -> None:
            draws = torch.Generator().manual_seed(number)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data.copy_(torch.randn(parameter.shape, generator=draws) * 0.6)

        config = slimtune.LoraConfig(r=4, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM")
        out, rows = folder / f"run-{number}", write_rows(folder / "rows.jsonl")
        values = {"model": {"name": str(base), "dtype": "float32", "device": "cpu"}, "data": {"train": str(rows)}}
        run = RunDir.create(out, Recipe.from_dict({**values, "method": {"name": "lora"}, "output_dir": str(out)}))
        save_adapter_of(base, run.adapter, config, change)
        return out

    return [make(number) for number in range(3)]


def raise_errors(queue: Any, seed: int, share: float) -> None:
    """Raise errors at a share of the calls that work for an attacker's answer, before or after the work."""
    from slimtune.generation.incremental_detokenizer import IncrementalDetokenizer
    from slimtune.generation.model_runner import CachedBatch

    rng = random.Random(seed)

    def is_attacked(rows: Any) -> bool:
        answers = [queue._running.get(row) for row in rows]
        return any(answer is not None and answer.params.seed in MARKED for answer in answers)

    def patch(owner: Any, name: str, find_rows: Any) -> None:
        work = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            fails = is_attacked(find_rows(*args, **kwargs)) and rng.random() < share
            kind, late = rng.choice([RuntimeError, MemoryError, TypeError]), rng.random() < 0.5
            if fails and not late:
                raise kind(f"raised in {name}")
            done = work(*args, **kwargs)
            if fails:
                raise kind(f"raised after {name}")
            return done

        setattr(owner, name, run)

    patch(CachedBatch, "join", lambda mine, other: [*mine.rows, *other.rows])
    patch(CachedBatch, "keep", lambda batch, _: batch.rows)
    patch(CachedBatch, "_select", lambda batch, *_: batch.rows)
    patch(CachedBatch, "repeat", lambda batch, rows: [*batch.rows, *rows])
    patch(queue.runner, "decode", lambda batch: batch.rows)
    patch(queue.runner, "prefill", lambda row, *_: [row])
    patch(queue, "_add_tokens", lambda batch, _: batch.rows)
    patch(queue, "_keep", lambda batch, _: batch.rows)
    make_piece = queue._make_piece

    def make_or_fail(answer: Any, *args: Any) -> Any:
        if answer.params.seed in MARKED and rng.random() < share:
            raise RuntimeError("raised in _make_piece")
        answer.stream.is_attacked = answer.params.seed in MARKED
        return make_piece(answer, *args)

    queue._make_piece = make_or_fail
    decode = IncrementalDetokenizer._decode

    def decode_or_fail(stream: Any, ids: list[int]) -> str:
        if getattr(stream, "is_attacked", False) and rng.random() < share:
            raise ValueError("raised in the tokenizer")
        return decode(stream, ids)

    IncrementalDetokenizer._decode = decode_or_fail


def serve(folder: Path, engine: Any, seed: int, share: float) -> None:
    """Serve until Ctrl-C; the first line printed is the port, `attack` on stdin begins the errors."""
    import logging

    from slimtune.serving.model_server import ModelServer, ServeSettings

    logging.disable(logging.ERROR)  # thousands of errors that are raised on purpose; a thread that ends is critical
    settings = ServeSettings(port=0, engine=engine, max_length=256, timeout=LIMIT_S, max_batch=16, verify=False)
    server = ModelServer([str(run) for run in write_runs(folder)], settings)

    def attack() -> None:
        sys.stdin.readline()
        if engine == "torch":
            raise_errors(server.queue, seed, share)

    threading.Thread(target=attack, daemon=True).start()
    print(server.url.rpartition(":")[2].removesuffix("/v1"), flush=True)
    server.run()


# --- clients ----------------------------------------------------------------------------------------------------------


class Fuzz:
    """What the clients share."""

    def __init__(self, port: int, seed: int, tolerance: float) -> None:
        self.port, self.seed, self.tolerance = port, seed, tolerance
        self.count: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.references: list[tuple[str, dict[str, Any], Any]] = []
        self.lock, self.is_over = threading.Lock(), threading.Event()

    def add(self, what: str, problem: str = "") -> None:
        with self.lock:
            self.count[what] += 1
            if problem:
                self.problems.append(f"{what}: {problem[:300]}")

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, body, HEADERS)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def read_answer(status: int, content: bytes, streams: bool) -> tuple[str, list[float]]:
    """Return text and log-probabilities of an honest answer; raise ValueError for anything else."""
    if status != 200:
        raise ValueError(f"{status} {content[:200]!r}")
    if streams:
        lines = content.decode().strip().split("\n\n")
        if lines.pop() != "data: [DONE]":
            raise ValueError(f"a stream ends with {content[-200:]!r}")
        choices = [choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]
    else:
        choices = json.loads(content)["choices"]
    text, values = "", []
    for choice in choices:
        message = choice.get("message") or choice.get("delta") or choice
        text += message.get("content") or message.get("text") or ""
        found = choice.get("logprobs") or {}
        values += found.get("token_logprobs") or [entry["logprob"] for entry in found.get("content") or ()]
    return text, values


def make_references(fuzz: Fuzz) -> None:
    """Ask each model alone; keep answers whose likeliest tokens are clear, whatever the rounding of a batch."""
    rng = random.Random(fuzz.seed)
    _, listed = fuzz.request("GET", "/v1/models")
    models = [model["id"] for model in json.loads(listed)["data"]]
    for _ in range(40 * REFERENCES):
        kind, text = rng.choice(list(PATHS)), "".join(rng.choice("abcdefg hijkl") for _ in range(rng.randint(1, 60)))
        text = text.strip() or "x"
        body = {"model": rng.choice(models), "max_tokens": rng.randint(1, 24), "temperature": 0}
        body |= (
            {"prompt": text, "logprobs": 2}
            if kind == "completions"
            else {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 2}
        )
        status, content = fuzz.request("POST", PATHS[kind], json.dumps(body).encode())
        if status == 500 and b"log-probability" in content:  # llama.cpp, inside a character
            continue
        found = read_answer(status, content, False)
        shown = json.loads(content)["choices"][0]["logprobs"]
        tops = shown.get("top_logprobs") or [
            {str(i): e["logprob"] for i, e in enumerate(entry["top_logprobs"])} for entry in shown["content"]
        ]
        gaps = [max(t.values()) - min(t.values()) for t in tops if len(t) == 2]
        if len(gaps) == len(tops) and min(gaps) > 20 * fuzz.tolerance:
            fuzz.references.append((PATHS[kind], body, found))
        if len(fuzz.references) == REFERENCES:
            return
    raise SystemExit(f"only {len(fuzz.references)} clear answers were found")


def be_honest(fuzz: Fuzz, number: int) -> None:
    """Ask for known answers until the attack is over."""
    rng = random.Random(f"{fuzz.seed}/honest/{number}")
    while not fuzz.is_over.is_set():
        if rng.random() < 0.25:
            ask_bound(fuzz, rng)
            continue
        path, body, (text, values) = rng.choice(fuzz.references)
        streams = rng.random() < 0.5
        try:
            status, content = fuzz.request("POST", path, json.dumps({**body, "stream": streams}).encode())
            found_text, found_values = read_answer(status, content, streams)
        except TimeoutError:
            fuzz.add("hang", f"honest {body}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            fuzz.add("lost", f"{type(error).__name__}: {error}")
        else:
            off = max((abs(a - b) for a, b in zip(values, found_values, strict=False)), default=0)
            is_right = found_text == text and len(values) == len(found_values) and off <= fuzz.tolerance
            fuzz.add("right" if is_right else "wrong", "" if is_right else f"{found_text!r}, not {text!r}; {off}")


def ask_bound(fuzz: Fuzz, rng: random.Random) -> None:
    """Ask for an answer that a grammar binds, and check it."""
    path, body, _ = rng.choice(fuzz.references)
    fields, expected = rng.choice(BOUND if path == PATHS["completions"] else BOUND[1:])
    count = 190 if "response_format" in fields else 20  # a chat's prompt leaves no room for white space in JSON
    body = {**body, **fields, "max_tokens": count, "stream": rng.random() < 0.5, "seed": rng.getrandbits(20)}
    body["temperature"] = rng.choice([0, 0.7, 1.5])
    body = {name: value for name, value in body.items() if "logprobs" not in name}
    try:
        text, _ = read_answer(*fuzz.request("POST", path, json.dumps(body).encode()), body["stream"])
    except TimeoutError:
        fuzz.add("hang", f"bound {body}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        fuzz.add("lost", f"{type(error).__name__}: {error}")
    else:
        is_right = re.fullmatch(expected, text) is not None
        fuzz.add("bound right" if is_right else "wrong", "" if is_right else f"{text!r} does not match {expected}")


def watch_health(fuzz: Fuzz) -> None:
    """Ask for the server's health without a pause."""
    while not fuzz.is_over.wait(0.2):
        try:
            status, content = fuzz.request("GET", "/health")
            is_ok = status == 200 and json.loads(content)["status"] == "ok"
            fuzz.add("healthy" if is_ok else "health", "" if is_ok else f"{status} {content!r}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            fuzz.add("health", repr(error))


# --- attacks ----------------------------------------------------------------------------------------------------------


def make_request(fuzz: Fuzz, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a valid request that is marked as an attacker's."""
    path, body, _ = rng.choice(fuzz.references)
    body = {**body, "max_tokens": rng.randint(1, 60), "seed": MARKED[rng.getrandbits(30)]}
    body |= {"temperature": rng.choice([0, 0.7, 1.9, 1e-40, 5e-324, 1e-5]), "top_p": rng.choice([1, 0.3, 1e-9])}
    body |= {"n": rng.choice([1, 1, 2, 4]), "stream": rng.random() < 0.5, "stop": rng.choice([None, "a", ["e", "zz"]])}
    if rng.random() < 0.4:
        fields = rng.choice([rng.choice(BOUND)[0], rng.choice(HOSTILE)])
        body |= {**fields, "max_tokens": rng.randint(1, 150)}
    return path, body


def make_raw_request(path: str, content: bytes, host: str = "localhost", more: str = "") -> tuple[bytes, bytes]:
    """Return the header and the body of a request, as bytes."""
    length = f"Content-Length: {len(content)}"
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{length}\r\n{more}\r\n"
    return head.encode(), content


def check_reply(fuzz: Fuzz, status: int, content: bytes, may_fail: bool) -> None:
    """Count a reply to an attacker; it is an answer, or OpenAI's error object."""
    if status in (200, 503) and content == b"Service Unavailable":
        fuzz.add("reply", "503 of uvicorn: the connections are full")
        return
    if content.startswith(b"data: "):
        content = content.strip().rpartition(b"\n\n")[2].removeprefix(b"data: ")
        if content == b"[DONE]":
            fuzz.add("answered")
            return
        status = 500  # unless the last event is an error that says otherwise, below
    try:
        answer = json.loads(content)
        if "error" in answer:
            error = answer["error"]
            is_known = isinstance(error["message"], str) and {"type", "param", "code"} <= set(error)
            failed = error["code"] in ("internal_error", "engine_failed") or status not in (
                400, 401, 403, 404, 405, 408, 411, 413, 415, 429, 499, 500, 501, 503, 504,
            )  # fmt: skip
            is_right = is_known and (may_fail or not failed)
        else:
            is_right = status == 200 and bool(answer["choices"])
    except (ValueError, KeyError, TypeError):
        # Requests that are no HTTP are answered by h11, in a line of text.
        is_right = status in (400, 408, 431)
    kind = "answered" if status == 200 else "refused"
    fuzz.add(kind if is_right else "reply", "" if is_right else f"{status} {content[:200]!r}")


def send_damaged_json(fuzz: Fuzz, rng: random.Random) -> None:
    path, body = make_request(fuzz, rng)
    body["seed"] = rng.getrandbits(20)
    for _ in range(rng.choice([1, 1, 2, 3])):
        body = mutate_json(rng, body) if isinstance(body, dict) else body
        if isinstance(body, dict) and rng.random() < 0.3:
            body[rng.choice([*body, "top_k", "tools", "logit_bias", "user", "suffix"])] = rng.choice(NASTY_VALUES)
    sys.set_int_max_str_digits(0)
    content = dump_json(rng, body).encode("utf-8", "surrogatepass")
    content = mutate_bytes(rng, content) if rng.random() < 0.2 else content
    check_reply(fuzz, *fuzz.request("POST", path, content), may_fail=False)


def send_valid(fuzz: Fuzz, rng: random.Random) -> None:
    path, body = make_request(fuzz, rng)
    check_reply(fuzz, *fuzz.request("POST", path, json.dumps(body).encode()), may_fail=True)


def cut_off(fuzz: Fuzz, rng: random.Random) -> None:
    """Go away in the middle of an answer or of a request, politely or by a reset."""
    path, body = make_request(fuzz, rng)
    content = json.dumps({**body, "stream": True, "max_tokens": 120}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    data = head.encode() + b"\r\n\r\n" + content
    with socket.create_connection(("127.0.0.1", fuzz.port), timeout=LIMIT_S) as client:
        client.sendall(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        if rng.random() < 0.7:
            client.settimeout(rng.choice([0.01, 0.1, 0.5]))
            with contextlib.suppress(TimeoutError):
                client.recv(rng.choice([1, 300, 4000]))
        if rng.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    fuzz.add("cut off")


def send_damaged_http(fuzz: Fuzz, rng: random.Random) -> None:
    path, body = make_request(fuzz, rng)
    content = json.dumps({**body, "stream": False, "seed": rng.getrandbits(20)}).encode()
    host = rng.choice(["localhost", "127.0.0.1:80", "[::1]", "[::1]evil", "evil.example", "", "localhost:x"])
    head, content = make_raw_request(path, content, host, "Connection: close\r\n")
    data = mutate_bytes(rng, head + content, 0, len(head))
    with socket.create_connection(("127.0.0.1", fuzz.port), timeout=LIMIT_S) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)  # where the damage leaves the request incomplete, nothing follows
        reply = b""
        while part := client.recv(1 << 16):
            reply += part
    if reply:
        status = int(reply.split(b" ", 2)[1])
        check_reply(fuzz, status, reply.partition(b"\r\n\r\n")[2], may_fail=False)
    else:
        fuzz.add("refused")


def hold_connection(fuzz: Fuzz, rng: random.Random) -> None:
    """Open connections that send nothing, or half a request, and leave them open."""
    path, body = make_request(fuzz, rng)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    data = rng.choice([b"", head[: rng.randrange(len(head))].encode(), head.encode() + b"\r\n\r\n" + content[:9]])
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", fuzz.port), timeout=LIMIT_S)
        client.sendall(data)
        held.append(client)
    while len(held) > 600:
        held.popleft().close()
    fuzz.add("held open")


held: collections.deque[socket.socket] = collections.deque()
ATTACKS = {send_damaged_json: 50, send_valid: 25, cut_off: 12, send_damaged_http: 12, hold_connection: 1}


def attack(fuzz: Fuzz, numbers: Any) -> None:
    """Run cases until there are no more."""
    for number in numbers:
        rng = random.Random(f"{fuzz.seed}/server/{number}")
        (work,) = rng.choices(list(ATTACKS), list(ATTACKS.values()))
        try:
            work(fuzz, rng)
        except TimeoutError:
            fuzz.add("hang", f"case {number}, {work.__name__}")
        except (ConnectionError, http.client.HTTPException) as error:
            if work is send_damaged_json or work is send_valid:
                fuzz.add("reply", f"case {number}, {work.__name__}: {error!r}")
            else:
                fuzz.add("refused")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=0, help="go on for so long at least, with further cases")
    parser.add_argument("--long", action="store_true", help="10,000 cases and 600 seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["torch", "llama.cpp"], default="torch")
    parser.add_argument("--share", type=float, default=0.02, help="of an attacker's steps that raise an error")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.engine, args.seed, args.share)
        return 0
    cases, seconds = (10_000, 600) if args.long else (args.cases, args.seconds)
    with tempfile.TemporaryDirectory(prefix="fuzz-server-") as folder:
        command = [sys.executable, __file__, "--serve", folder, "--engine", args.engine, "--seed", str(args.seed)]
        server = subprocess.Popen([*command, "--share", str(args.share)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            return run(server, cases, seconds, args.seed, args.engine)
        finally:
            server.kill()
            server.wait()


def run(server: subprocess.Popen[bytes], cases: int, seconds: float, seed: int, engine: str) -> int:
    """Attack a server that starts, print what happened, and return the exit code."""
    assert server.stdin is not None
    assert server.stdout is not None
    fuzz = Fuzz(int(server.stdout.readline()), seed, 1e-4 if engine == "torch" else 0.02)
    make_references(fuzz)
    server.stdin.write(b"attack\n")
    server.stdin.flush()
    started, lock = time.monotonic(), threading.Lock()

    def number_cases() -> Any:
        number = 0
        while not fuzz.is_over.is_set() and (number < cases or time.monotonic() - started < seconds):
            yield number
            number += 1

    source = number_cases()

    def take_numbers() -> Any:
        while True:
            with lock:
                number = next(source, None)
            if number is None:
                return
            yield number

    attackers = [threading.Thread(target=attack, args=(fuzz, take_numbers())) for _ in range(ATTACKERS)]
    others = [threading.Thread(target=be_honest, args=(fuzz, number)) for number in range(HONEST)]
    others.append(threading.Thread(target=watch_health, args=(fuzz,)))
    for thread in [*others, *attackers]:
        thread.start()
    try:
        for thread in attackers:
            while thread.is_alive():
                thread.join(60)
                print(f"{time.monotonic() - started:.0f} s: {dict(fuzz.count)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # what was done until now counts
        fuzz.is_over.set()
        for thread in attackers:
            thread.join()
    fuzz.is_over.set()
    for thread in others:
        thread.join()
    while held:
        held.popleft().close()
    for _ in range(100):
        idle = json.loads(fuzz.request("GET", "/health")[1])
        if idle == {"status": "ok", "running": 0, "waiting": 0, "cached_tokens": 0}:
            break
        time.sleep(0.1)
    else:
        fuzz.add("health", f"in the end: {idle}")
    took = time.monotonic() - started
    server.send_signal(signal.SIGINT)
    if (code := server.wait(LIMIT_S)) != 0:
        fuzz.add("health", f"the server ended with exit code {code}")
    attacks = sum(fuzz.count[kind] for kind in ("answered", "refused", "cut off", "held open"))
    print(f"{engine}: {attacks} attacks in {took:.0f} s, {dict(fuzz.count)}")
    for problem in fuzz.problems[:40]:
        print(problem)
    return 1 if fuzz.problems else 0


if __name__ == "__main__":
    sys.exit(main())
