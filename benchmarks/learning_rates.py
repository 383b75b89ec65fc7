"""Held-out loss of methods over learning rates, run lengths and data sets: what the default rates are chosen by.

    python benchmarks/make_data_sets.py --out SETS
    python benchmarks/learning_rates.py SETS --out rates.jsonl --methods lora lora,r=64 miss --steps 12 48

One line of JSON for each run; a run whose line is in the file is not done again. The rates of a method train at once
on one base in memory. `loss` is the loss on the same held-out rows after the last step.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def parse_method(text: str) -> dict[str, Any]:
    """Return the method section of a recipe from `name,setting=value,…`."""
    name, *settings = text.split(",")
    return {"name": name, **{k: json.loads(v) for k, _, v in (s.partition("=") for s in settings)}}


def build_tree(data: Path, method: dict[str, Any], steps: int, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of one run as a plain tree."""
    return {
        "model": {"name": args.model, "dtype": args.dtype},
        "data": json.loads((data / "data.json").read_text()),
        "method": method,
        "train": {
            "max_steps": steps,
            "batch_size": 8,
            "learning_rate": rate,
            "eval_steps": steps,
            "max_tokens_per_micro_batch": 2048,
        },
    }


def run_rates(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train the recipes at once; return the last validation loss of each."""
    from slimtune.config import Recipe
    from slimtune.training.together import train_together

    with tempfile.TemporaryDirectory() as folder:
        recipes = [Recipe.from_dict({**t, "output_dir": f"{folder}/{i}"}) for i, t in enumerate(trees)]
        results = train_together(recipes)
        found = []
        for i, result in enumerate(results):
            if isinstance(result, Exception):
                found.append({"error": str(result)[:200]})
                continue
            lines = map(json.loads, Path(folder, str(i), "metrics.jsonl").read_text().splitlines())
            losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
            found.append({"loss": losses[-1]})
    return found


def format_table(runs: list[dict[str, Any]]) -> str:
    """Return the losses as Markdown, the lowest of a row in bold."""
    rates = sorted({r["rate"] for r in runs})
    lines = [
        "| rows | method | steps |" + "".join(f" {rate:g} |" for rate in rates),
        "|---|---|---|" + "---|" * len(rates),
    ]
    for key in dict.fromkeys((r["data"], r["method"], r["steps"]) for r in runs):
        losses = {r["rate"]: r["loss"] for r in runs if (r["data"], r["method"], r["steps"]) == key and "loss" in r}
        cells = [f"{losses[r]:.3f}" if r in losses else "" for r in rates]
        best = f"{min(losses.values(), default=0):.3f}"
        cells = [f"**{c}**" if c == best else c for c in cells]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Append a line for each run that has none yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 48])
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
    done = {(r["data"], r["method"], r["steps"], r["rate"]) for r in map(json.loads, lines)}
    for steps in args.steps:
        for text in args.methods:
            for data in sorted(p.parent for p in args.sets.glob("*/data.json")):
                if args.data and data.name not in args.data:
                    continue
                rates = [r for r in args.rates if (data.name, text, steps, r) not in done]
                method = parse_method(text)
                trees = [build_tree(data, method, steps, rate, args) for rate in rates]
                for rate, found in zip(rates, run_rates(trees) if trees else [], strict=True):
                    line = {"data": data.name, "method": text, "steps": steps, "rate": rate, **found}
                    with args.out.open("a") as out:
                        print(json.dumps(line), file=out)
                    print(line, flush=True)


if __name__ == "__main__":
    main()
