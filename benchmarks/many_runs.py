"""N low-rank runs at once in one process, beside the same runs one after the other: time, memory and losses.

    python benchmarks/many_runs.py [--runs 1 2 4 8 16] [--steps 10] [--batch-size 2] [--rounds 3] [--model smollm2-135m]

Each way is a process of its own and the other waits; a round runs both, in turns. The runs differ in rate and seed and
have short rows. Seconds are those of the training steps alone (`train_seconds`, summed over the runs), medians over
rounds; peak memory is the process's. The last training losses of both ways have to agree to 1e-5 a step in float32:
at the first step they differ by rounding (4e-6 was seen), and Adam's first updates have the size of the rate, whatever
the size of the gradient, so rounding grows with each step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def write_recipes(folder: Path, runs: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the recipes of N runs, whose rows are short questions and answers."""
    texts = [(f"Add {i} and {i + 3}.", str(2 * i + 3)) for i in range(128)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in texts]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        {
            "model": {"name": args.model, "dtype": args.dtype},
            "data": {"train": str(data), "validation_fraction": 0},
            "method": {"name": "lora", "r": 16},
            "train": {
                "max_steps": args.steps,
                "batch_size": args.batch_size,
                "learning_rate": 1e-4 * (1 + n),
                "seed": n,
                "max_tokens_per_micro_batch": 1024,
                "save_steps": args.steps,
            },
            "output_dir": str(folder / f"run-{n}"),
        }
        for n in range(runs)
    ]


def measure(way: str, trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Train the recipes in this process, at once or one after the other; return seconds, peak bytes and last losses."""
    from slimtune.config import Recipe
    from slimtune.training.together import train_together
    from slimtune.training.train import train

    recipes = [Recipe.from_dict(tree) for tree in trees]
    results: Any = train_together(recipes) if way == "together" else [train(recipe) for recipe in recipes]
    return {
        "seconds": sum(r["train_seconds"] for r in results),
        "peak_bytes": max(r["peak_bytes"] for r in results),
        "losses": [r["train_loss"] for r in results],
    }


def run_process(way: str, runs: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure` returns in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trees = write_recipes(Path(folder), runs, args)
        command = [sys.executable, __file__, "--child", way]
        done = subprocess.run(command, input=json.dumps(trees), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one line for each number of runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, json.load(sys.stdin))))
        return
    print("runs  together s  alone s  times faster  together GiB  alone GiB  largest difference of losses")
    for runs in args.runs:
        ways: dict[str, list[dict[str, Any]]] = {"together": [], "alone": []}
        for round_number in range(args.rounds):
            for way in sorted(ways, reverse=round_number % 2 == 1):
                ways[way].append(run_process(way, runs, args))
        seconds = {way: statistics.median(m["seconds"] for m in found) for way, found in ways.items()}
        gib = {way: max(m["peak_bytes"] for m in found) / 2**30 for way, found in ways.items()}
        pairs = zip(ways["together"][0]["losses"], ways["alone"][0]["losses"], strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        faster = seconds["alone"] / seconds["together"]
        print(
            f"{runs:4}  {seconds['together']:10.2f}  {seconds['alone']:7.2f}  {faster:12.2f}  {gib['together']:12.2f}"
            f"  {gib['alone']:9.2f}  {difference:.1e}",
            flush=True,
        )
        if args.dtype == "float32" and difference > 1e-5 * args.steps:
            raise SystemExit("the losses of the two ways differ")


if __name__ == "__main__":
    main()
