"""Answers of `slimtune serve` that a grammar binds: are all valid, and how fast are they beside free ones?

    python benchmarks/bound_answers.py RUN [--engine llama.cpp] [--answers 1000] [--clients 8] [--round 40] [--seed 0]

Clients ask the base and the run for JSON of several schemas, for texts of regular expressions and for choices, greedy
and sampled, whole and streamed. A bound round and a free one run in turns: a free answer has the prompt of a bound
one, and may have as many tokens. A bound answer must parse and be valid for its schema (jsonschema), or match its
expression (re.fullmatch); one that `max_tokens` cuts off is counted apart. Speeds are tokens of answers for each second
of a round, and for each second of the server's processor time, which other work on the machine changes less; ratios are
those of a pair of rounds.

The exit code is 1 if an answer was invalid or cut off.
"""

import argparse
import contextlib
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jsonschema
import openai
import psutil

MAX_TOKENS = 400
"""More than any of these answers can have."""


def make_object(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no others."""
    required = [*properties]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


NAME = {"type": "string", "minLength": 1, "maxLength": 24}
LEAF = {"$ref": "#/$defs/leaf"}
SCHEMAS = {
    "Write a person from a novel as JSON: name, age, whether alive.": make_object(
        name=NAME, age={"type": "integer", "minimum": 0, "maximum": 120}, alive={"type": "boolean"}
    ),
    "Sort the mail 'My parcel is broken, and I want my money back!' as JSON.": make_object(
        topic={"enum": ["delivery", "refund", "question", "other"]},
        urgent={"type": "boolean"},
        # jsonschema divides floats: 0.14 is no multiple of 0.01 to it.
        score={"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    ),
    "List up to three colours of the rainbow as a JSON array.": {
        "type": "array", "items": {"enum": ["red", "orange", "yellow", "green", "blue"]}, "minItems": 1, "maxItems": 3,
    },
    "Book a table for four on Friday, as JSON.": make_object(
        table=make_object(seats={"type": "integer", "minimum": 1, "maximum": 12}, outside={"type": "boolean"}),
        day={"type": "string", "pattern": "^(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day$"},
        note={"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 16}]},
    ),
    "A tree of categories as JSON.": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": make_object(label=NAME, children={"type": "array", "items": LEAF, "maxItems": 2}),
            "leaf": make_object(label=NAME),
        },
    },
}  # fmt: skip
REGEXES = {
    "When was the battle of Hastings? A date.": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "A phone number in Berlin.": r"\+49 30 \d{3,4} \d{4}",
    "A sentence about the sea.": r"The sea [a-z]{2,9}( [a-z]{2,9}){2,6}\.",
}
CHOICES = {"Is 'I love it' positive, negative or neutral?": ["positive", "negative", "neutral"]}


@dataclass
class Case:
    """A bound answer that is asked for, and what came."""

    prompt: str
    fields: dict[str, Any]  # of the request, that bind the answer
    kind: str
    expected: Any
    temperature: float
    seed: int
    streams: bool
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None


def make_cases(seed: int) -> Iterator[Case]:
    """Yield cases without end."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(["schema"] * 3 + ["regex"] * 2 + ["choice"])
        prompt, expected = rng.choice([*{"schema": SCHEMAS, "regex": REGEXES, "choice": CHOICES}[kind].items()])
        if kind == "schema":
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": expected}}
            fields: dict[str, Any] = {"response_format": form}
        else:
            fields = {"extra_body": {"structured_outputs": {kind: expected}}}
        yield Case(prompt, fields, kind, expected, rng.choice([0, 0.7, 1.5]), rng.getrandbits(30), rng.random() < 0.3)


def ask(client: openai.OpenAI, model: str, case: Case, max_tokens: int, fields: dict[str, Any]) -> tuple[str, int, Any]:
    """Return text, tokens and finish reason of an answer."""
    request = {"model": model, "messages": [{"role": "user", "content": case.prompt}], "max_tokens": max_tokens}
    request |= {"temperature": case.temperature, "seed": case.seed, **fields}
    if not case.streams:
        answer = client.chat.completions.create(**request)
        return answer.choices[0].message.content, answer.usage.completion_tokens, answer.choices[0].finish_reason
    text, tokens, reason = "", 0, None
    for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens, reason


def is_valid(case: Case) -> bool:
    """Return whether a bound answer is what its grammar allows."""
    if case.kind == "regex":
        return re.fullmatch(case.expected, case.text) is not None
    if case.kind == "choice":
        return case.text in case.expected
    try:
        jsonschema.validate(json.loads(case.text), case.expected)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@contextlib.contextmanager
def start_server(run: str, engine: str) -> Iterator[tuple[openai.OpenAI, psutil.Process]]:
    """Yield a client of a server of its own, and its process."""
    command = [sys.executable, "-m", "slimtune", "serve", run, "--port", "0", "--engine", engine]
    command += ["--max-length", "1024", *(["--no-verify"] if engine != "torch" else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout or () if line.startswith("serving at "))
        client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0, timeout=600)
        yield client, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--engine", choices=["torch", "llama.cpp"], default="torch")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--round", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source, done, rounds = make_cases(args.seed), [], []
    with start_server(args.run, args.engine) as (client, server), ThreadPoolExecutor(args.clients) as pool:
        models = [model.id for model in client.models.list()]

        def ask_bound(numbered: tuple[int, Case]) -> int:
            number, case = numbered
            model = models[number // args.round % len(models)]
            case.text, case.tokens, case.finish_reason = ask(client, model, case, MAX_TOKENS, case.fields)
            return case.tokens

        def ask_free(numbered: tuple[int, Case]) -> int:
            number, case = numbered
            return ask(client, models[number // args.round % len(models)], case, max(1, case.tokens), {})[1]

        def measure(work: Any, cases: list[tuple[int, Case]]) -> tuple[float, float]:
            started, before = time.perf_counter(), sum(server.cpu_times())
            tokens = sum(pool.map(work, cases))
            return tokens / (time.perf_counter() - started), tokens / (sum(server.cpu_times()) - before)

        warm = [*enumerate(itertools.islice(make_cases(args.seed + 1), 2 * args.clients))]
        measure(ask_bound, warm)
        with contextlib.suppress(KeyboardInterrupt):  # what was measured until then counts
            while len(done) < args.answers:
                cases = [*enumerate(itertools.islice(source, min(args.round, args.answers - len(done))), len(done))]
                rounds.append((measure(ask_bound, cases), measure(ask_free, cases)))
                done += [case for _, case in cases]
                bound, free = rounds[-1]
                print(
                    f"{len(done)} answers: {bound[0]:.1f} tokens/s bound, {free[0]:.1f} free; "
                    f"{bound[1]:.1f} and {free[1]:.1f} for a second of processor time", file=sys.stderr, flush=True,
                )  # fmt: skip
    cut = [case for case in done if case.finish_reason != "stop"]
    wrong = [case for case in done if case.finish_reason == "stop" and not is_valid(case)]
    for case in [*cut, *wrong][:10]:
        print(f"{case.finish_reason}: {case.expected} → {case.text!r}")
    print(f"{args.engine}: {len(done)} bound answers, {len(done) - len(cut) - len(wrong)} valid, {len(cut)} cut off")
    for index, unit in enumerate(("second", "second of the server's processor time")):
        bound, free = (statistics.median(speed[index] for speed in speeds) for speeds in zip(*rounds, strict=True))
        ratios = sorted(bound[index] / free[index] for bound, free in rounds)
        print(
            f"tokens for each {unit}: {bound:.1f} bound, {free:.1f} free; ratio of {len(rounds)} pairs of rounds: "
            f"median {statistics.median(ratios):.3f}, "
            f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f} in the middle half"
        )
    return int(bool(cut or wrong))


if __name__ == "__main__":
    sys.exit(main())
