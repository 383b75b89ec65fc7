"""N low-rank runs at once in one process, beside the same runs one after the other, and beside HF PEFT in a loop.

    python benchmarks/many_runs.py [--runs 1 2 4 8 16] [--steps 10] [--batch-size 2] [--rounds 3] [--model smollm2-135m]

Each way is a process of its own and the others wait; a round runs all, in turns. PEFT's way is a plain loop without a
Trainer: the same base in memory once, the same rows, padded, a new adapter and AdamW for each run. The runs differ in
rate and seed and have short rows. Seconds are those of the training steps alone (`train_seconds`, summed over the
runs), medians over rounds; peak memory is the process's. The last training losses of slimtune's two ways have to agree
to 1e-5 a step in float32: at the first step they differ by rounding (4e-6 was seen), and Adam's first updates have the
size of the rate, whatever the size of the gradient, so rounding grows with each step. `products allow`: how many times
faster the layers' frozen products alone are at once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
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
    from slimtune.core.config import Recipe
    from slimtune.core.training.train import train
    from slimtune.experiments.simultaneous_runs import train_recipes_together

    recipes = [Recipe.from_dict(tree) for tree in trees]
    if way == "peft":
        return measure_peft(recipes)
    if way == "products":
        return measure_products(trees)
    results: Any = train_recipes_together(recipes) if way == "together" else [train(recipe) for recipe in recipes]
    return {
        "seconds": sum(r.train_seconds for r in results),
        "peak_bytes": max(r.peak_bytes for r in results),
        "losses": [r.train_loss for r in results],
    }


def measure_peft(recipes: list[Any]) -> dict[str, Any]:
    """Train the recipes with HF PEFT in a loop; return what `measure` returns."""
    import peft
    import torch

    from slimtune.core.data.collator import Collator
    from slimtune.core.foundation.device import count_peak_memory, disable_malloc_trim
    from slimtune.core.training.base_model import load_base_model
    from slimtune.core.training.datasets import tokenize_recipe_datasets

    disable_malloc_trim()  # as slimtune does
    base = load_base_model(recipes[0].model, recipes[0].data.chat_template, None)
    rows = list(tokenize_recipe_datasets(recipes[0], base.tokenizer).train)
    collator, found = Collator(base.tokenizer.pad_token_id, packing=False), {"seconds": 0.0, "losses": []}
    for recipe in recipes:
        settings = recipe.train
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(base.model, config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, fused=True)
        started = time.perf_counter()
        for at in range(0, settings.max_steps * settings.batch_size, settings.batch_size):
            some = [rows[i] for i in order[at : at + settings.batch_size]]
            batch = collator(some)
            labels = torch.full_like(batch["input_ids"], -100)
            for i, row in enumerate(some):
                labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
            loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found["seconds"] += time.perf_counter() - started
        found["losses"].append(loss.item())
        model.unload()
    return {**found, "peak_bytes": count_peak_memory(torch.device("cpu"))}


def measure_products(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many times faster the frozen products of all runs are at once than one after the other.

    They are those of the layers, forward and backward, without adapters, norms, attention, head and optimizer: no way
    of running them at once can gain more on these parts.
    """
    import torch
    import torch.nn.functional as F

    from slimtune.core.config import Recipe
    from slimtune.core.training.base_model import load_base_model
    from slimtune.core.training.datasets import tokenize_recipe_datasets

    recipe = Recipe.from_dict(trees[0])
    base = load_base_model(recipe.model, recipe.data.chat_template, None)
    rows = tokenize_recipe_datasets(recipe, base.tokenizer).train
    tokens = round(sum(len(row["input_ids"]) for row in rows) / len(rows) * recipe.train.batch_size)
    head = base.model.get_output_embeddings()
    weights = [m.weight for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]

    @torch.no_grad()
    def seconds(count: int) -> float:
        given = {n: torch.randn(count, n).to(base.dtype) for n in {n for w in weights for n in w.shape}}
        started = time.perf_counter()
        for weight in weights:
            F.linear(given[weight.shape[1]], weight)
            given[weight.shape[0]] @ weight
        return time.perf_counter() - started

    pairs = [(seconds(tokens), seconds(tokens * len(trees))) for _ in range(8)]
    return {"faster": len(trees) / statistics.median(many / one for one, many in pairs[1:])}


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
    print(
        "runs   at once: s, GiB   one by one: s, GiB, ratio   PEFT: s, GiB, ratio   largest difference of losses"
        "   products allow"
    )
    for runs in args.runs:
        ways: dict[str, list[dict[str, Any]]] = {"together": [], "alone": [], "peft": []}
        names = list(ways)
        for number in range(args.rounds):
            for way in names[number % 3 :] + names[: number % 3]:
                ways[way].append(run_process(way, runs, args))
        seconds = {way: statistics.median(m["seconds"] for m in found) for way, found in ways.items()}
        gib = {way: max(m["peak_bytes"] for m in found) / 2**30 for way, found in ways.items()}
        pairs = zip(ways["together"][0]["losses"], ways["alone"][0]["losses"], strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        print(
            f"{runs:4}   {seconds['together']:8.2f} {gib['together']:5.2f}",
            *(
                f"   {seconds[w]:10.2f} {gib[w]:5.2f} {seconds[w] / seconds['together']:5.2f}"
                for w in ("alone", "peft")
            ),
            f"   {difference:.1e}   {run_process('products', runs, args)['faster']:.2f}",
            flush=True,
        )
        if args.dtype == "float32" and difference > 1e-5 * args.steps:
            raise SystemExit("the losses of the two ways differ")


if __name__ == "__main__":
    main()
