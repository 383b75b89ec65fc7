"""GRPO on verifiable tasks that SmolLM2-135M solves in 5 to 50 % of its tries: gains on held-out prompts, and probes.

    python benchmarks/grpo_tasks.py [TASK …] [--steps 20] --out grpo_tasks.jsonl
    python benchmarks/grpo_tasks.py --table grpo_tasks.jsonl

    sums          of two numbers from 1 to 9      base 0.13
    differences   of two numbers from 1 to 12     base 0.10 of 80 answers
    products      of two numbers from 1 to 9      base 0.21 of 80 answers

The reward is numeric-match. More are in `TASKS`: the larger of two numbers (base 0.30 of 80 answers; a probe fires
there, because the prompt itself ends with the right number in half of the rows), and orders in a form of JSON.

Each task trains with 4 prompts of 8 answers in a step, in float32, all else default, and is evaluated on prompts that
it never saw: 8 answers to each by the base and by the tuned model, with intervals over prompts. A task that is in the
file is not run again. A line of JSON has what `slimtune eval --json` says, the probes against reward hacking included.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAMES = "Anna Tom Maria Peter Lucy James Emma David Sarah Paul".split()  # noqa: SIM905
GOODS = "apples pears plates lamps books chairs pencils cups".split()  # noqa: SIM905
ORDER_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "item": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["name", "item", "count"],
    "additionalProperties": False,
}


def make_sums() -> Iterator[Row]:
    for a, b in itertools.product(range(1, 10), repeat=2):
        yield {"prompt": f"What is {a} + {b}? Answer with the number alone.", "answer": a + b}


def make_larger() -> Iterator[Row]:
    for a, b in itertools.permutations(range(1, 10), 2):
        yield {"prompt": f"Which number is larger, {a} or {b}? Answer with the number alone.", "answer": max(a, b)}


def make_differences() -> Iterator[Row]:
    for a, b in itertools.combinations(range(1, 13), 2):
        yield {"prompt": f"What is {b} - {a}? Answer with the number alone.", "answer": b - a}


def make_products() -> Iterator[Row]:
    for a, b in itertools.product(range(1, 10), repeat=2):
        yield {"prompt": f"What is {a} times {b}? Answer with the number alone.", "answer": a * b}


def make_orders() -> Iterator[Row]:
    draw = random.Random(0)
    for name, goods in itertools.product(NAMES, GOODS):
        order = {"name": name, "item": goods, "count": draw.randint(2, 9)}
        prompt = (
            f"{name} orders {order['count']} {goods}. Answer with JSON alone, in this form: "
            '{"name": "Ben", "item": "forks", "count": 12}'
        )
        yield {"prompt": prompt, "answer": json.dumps(order)}


TASKS = {
    "sums": (make_sums, "numeric-match", 16),
    "larger": (make_larger, "numeric-match", 16),
    "products": (make_products, "numeric-match", 16),
    "differences": (make_differences, "numeric-match", 16),
    "orders": (make_orders, "json-schema:order.json", 40),
}
"""What makes the rows, the reward, and the longest answer in tokens."""
MEASURED = ("sums", "differences", "products")


def run_task(name: str, base: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate a task; return what `eval` says of it."""
    make_rows, reward, longest = TASKS[name]
    rows = [*make_rows()]
    random.Random(1).shuffle(rows)
    held_out = len(rows) * 3 // 10
    for part, some in (("held_out", rows[:held_out]), ("train", rows[held_out:])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "order.json").write_text(json.dumps(ORDER_SCHEMA))
    started = time.perf_counter()
    words = f"--task grpo --reward {reward} --set task.max_completion_length={longest} --max-steps {steps}"
    call(
        folder, "train", "--model", base, "--dtype", "float32", "--data", "train.jsonl", "--batch-size", "4",
        "--out", "run", *words.split(),
    )  # fmt: skip
    trained = time.perf_counter() - started
    result = json.loads(call(folder, "eval", "run", "--data", "held_out.jsonl", "--json", expected=(0, 1)))
    seconds = {"train": trained, "eval": time.perf_counter() - started - trained}
    return {"task": name, "base": base, "steps": steps, "seconds": seconds, "eval": result}


def call(folder: Path, *command: str, expected: tuple[int, ...] = (0,)) -> str:
    """Run slimtune in a folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "slimtune", *command], stdout=subprocess.PIPE, text=True, check=False, cwd=folder
    )
    assert done.returncode in expected, done.stdout
    return done.stdout


def format_estimate(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_ci95"]
    return f"{found[name]:.3f} ({low:.3f} to {high:.3f})"


def format_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each task."""
    lines = [
        "| task | base | tuned | gain | of the way to 1 | best of 8 | tokens | forgotten | probes above the base |",
        "| --- | --- | --- | --- | ---: | --- | --- | --- | --- |",
    ]
    for result in sorted(results, key=lambda run: run["task"]):
        found = result["eval"]
        fired = [probe["name"] for probe in found["probes"] if probe["gain_ci95"][0] > 0]
        cells = (
            result["task"],
            format_estimate(found, "base_reward"),
            format_estimate(found, "tuned_reward"),
            format_estimate(found, "reward_gain"),
            f"{found['reward_gain'] / (1 - found['base_reward']):.2f}",
            f"{found['base_best_reward']:.3f} → {found['tuned_best_reward']:.3f}",
            f"{found['base_length']:.0f} → {found['tuned_length']:.0f}",
            format_estimate(found["forgetting"], "change"),
            ", ".join(fired) or f"none of {len(found['probes'])}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], help="default: the three above")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("grpo_tasks.jsonl"))
    parser.add_argument("--table", type=Path, help="print the results of a file")
    args = parser.parse_args()
    for name in () if args.table else args.tasks or MEASURED:
        if all((r["task"], r["base"], r["steps"]) != (name, args.base, args.steps) for r in read_results(args.out)):
            with tempfile.TemporaryDirectory() as scratch:
                result = run_task(name, args.base, args.steps, Path(scratch))
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print(format_table(read_results(args.table or args.out)))


if __name__ == "__main__":
    main()
