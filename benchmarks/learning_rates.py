"""Held-out loss of methods over learning rates, run lengths and data sets: what the default rates are chosen by.

    python benchmarks/make_data_sets.py --out SETS
    python benchmarks/learning_rates.py SETS --out rates.jsonl --methods lora lora,r=64 miss --steps 12 48

One line of JSON for each run; a run whose line is in the file is not done again. The rates of a method train at once
on one base in memory. `loss` is the loss on the same held-out rows after the last step. With `--rows 96` the first 96
training rows come again and again, and `kept` is the lowest loss after an epoch, that of the adapter that a run keeps.
"""

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from make_data_sets import take_rows

BATCH_SIZE = 8
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def parse_method(text: str) -> dict[str, Any]:
    """Return the method section of a recipe from `name,setting=value,…`."""
    name, *settings = text.split(",")
    return {"name": name, **{k: json.loads(v) for k, _, v in (s.partition("=") for s in settings)}}


def build_tree(
    data: dict[str, Any], method: dict[str, Any], steps: int, rate: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the recipe of one run as a plain tree."""
    return {
        "model": {"name": args.model, "dtype": args.dtype},
        "data": data,
        "method": method,
        "train": {
            "max_steps": steps,
            "batch_size": BATCH_SIZE,
            "learning_rate": rate,
            "eval_steps": math.ceil(args.rows / BATCH_SIZE) if args.rows else steps,
            "max_tokens_per_micro_batch": 2048,
        },
    }


def run_rates(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train the recipes at once; return the last and the lowest validation loss of each."""
    from slimtune.core.config import Recipe
    from slimtune.core.training.train import InterruptedAfterCheckpoint, TerminatedAfterCheckpoint
    from slimtune.experiments.simultaneous_runs import train_recipes_together

    with tempfile.TemporaryDirectory() as folder:
        recipes = [Recipe.from_dict({**t, "output_dir": f"{folder}/{i}"}) for i, t in enumerate(trees)]
        results = train_recipes_together(recipes)
        found = []
        for i, result in enumerate(results):
            if isinstance(result, InterruptedAfterCheckpoint | TerminatedAfterCheckpoint):
                raise SystemExit(str(result))
            if isinstance(result, Exception):
                found.append({"error": str(result)[:200]})
                continue
            lines = map(json.loads, Path(folder, str(i), "metrics.jsonl").read_text().splitlines())
            losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
            found.append({"loss": losses[-1], "kept": min(losses)})
    return found


def format_table(runs: list[dict[str, Any]]) -> str:
    """Return the losses as Markdown, the lowest of a row in bold, and in parentheses a lower one that a run keeps."""
    rates = sorted({r["rate"] for r in runs})
    lines = [
        "| data | method | training rows | steps |" + "".join(f" {rate:g} |" for rate in rates),
        "|---|---|---|---|" + "---|" * len(rates),
    ]
    for key in dict.fromkeys(map(run_key, runs)):
        found = {r["rate"]: (r["loss"], r.get("kept", r["loss"])) for r in runs if run_key(r) == key and "loss" in r}
        best = f"{min((loss for loss, _ in found.values()), default=0):.3f}"
        cells = []
        for loss, kept in (found.get(rate, (None, None)) for rate in rates):
            cell = "" if loss is None else f"{loss:.3f}"
            cells.append((f"**{cell}**" if cell == best else cell) + (f" ({kept:.3f})" if kept != loss else ""))
        lines.append("| " + " | ".join([*(str(k or "all") for k in key), *cells]) + " |")
    return "\n".join(lines)


def run_key(run: dict[str, Any]) -> tuple[str, str, int | None, int]:
    """Return what a run has in common with those of other rates."""
    return run["data"], run["method"], run.get("rows"), run["steps"]


def main() -> None:
    """Append a line for each run that has none yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--rows", type=int, help="training rows; default: all, of which a step takes others each time")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--data", nargs="+", help="names of sets; default: all")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--table", action="store_true", help="print the losses as Markdown and train nothing")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    if args.table:
        print(format_table([json.loads(line) for line in lines]))
        return
    done = {(*run_key(r), r["rate"]) for r in map(json.loads, lines)}
    for steps, text in itertools.product(args.steps, args.methods):
        for folder in sorted(p.parent for p in args.sets.glob("*/data.json")):
            if args.data and folder.name not in args.data:
                continue
            run = {"data": folder.name, "method": text, "rows": args.rows, "steps": steps}
            rates = [r for r in args.rates if (*run_key(run), r) not in done]
            with tempfile.TemporaryDirectory() as taken:
                data = json.loads((folder / "data.json").read_text())
                data = take_rows(data, args.rows, Path(taken)) if args.rows else data
                trees = [build_tree(data, parse_method(text), steps, rate, args) for rate in rates]
                results = run_rates(trees) if trees else []
            for rate, found in zip(rates, results, strict=True):
                line = {**run, "rate": rate, **found}
                with args.out.open("a") as out:
                    print(json.dumps(line), file=out)
                print(line, flush=True)


if __name__ == "__main__":
    main()
