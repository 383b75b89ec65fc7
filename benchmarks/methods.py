"""Every method on real text: a short run on The Devil's Dictionary, then its held-out loss beside the base's.

    python benchmarks/methods.py [METHOD ...] [--steps 12] [--model smollm2-135m] [--out runs/methods]

Each method trains with its own defaults (what `slimtune train --method NAME` would take, learning rate included) on the
same rows: 8 a step, about 78 tokens a row; at 12 steps about 7,500 tokens, 15,000 at most. Each runs in a process of
its own, so the peak memory is its own. What is done already is not done again: stop it, and start it again. The table
is written to docs/methods/comparison.md once every method is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from slimtune.contract.registry import built_in

HERE = Path(__file__).parents[1]
ROWS = HERE / "examples/devils-dictionary"
PAGE = HERE / "docs/methods/comparison.md"
COMMAND = "python benchmarks/methods.py"
MOST_TOKENS = 15_000
NEEDED = {
    "bitfit": {"new_biases": True},  # Llama has none
    "trainable_tokens": {"token_indices": [1, 2, 198, 520, 4093, 9690]},  # what SmolLM2's chat template is made of
}
"""Settings of methods whose defaults do nothing on such a base."""


def train_and_measure(method: str, model: str, steps: int, out: Path) -> None:
    from slimtune.evaluate.held_out import evaluate
    from slimtune.recipe import Recipe
    from slimtune.train.run import train

    recipe = Recipe.from_dict(
        {
            "model": model,
            "data": {"train": str(ROWS / "train.jsonl"), "test": str(ROWS / "test.jsonl"), "validation_fraction": 0},
            "method": {"name": method, **NEEDED.get(method, {})},
            "train": {"max_steps": steps, "batch_size": 8, "save_every": steps},
            "out": str(out),
        }
    )
    if not (out / "result.json").is_file():
        train(recipe, resume=out.is_dir())
    evaluate(out, split="test")


def figures(out: Path) -> dict[str, float]:
    result, held = (json.loads((out / f"{n}.json").read_text()) for n in ("result", "eval-test"))
    assert result["trained_tokens"] <= MOST_TOKENS, result["trained_tokens"]
    return {**result, **held}


def page(rows: dict[str, dict], model: str) -> str:
    some = next(iter(rows.values()))
    lines = [
        "# The methods side by side",
        "",
        f"Each method, {some['steps']} steps of 8 rows ({some['trained_tokens']:,} tokens) of The Devil's Dictionary",
        f"on `{model}` ({some['dtype']}, {some['device']}), with its own defaults; then {some['rows']} held-out rows",
        f"({some['tokens']:,} supervised tokens), base {some['base_loss']:.3f} nats per token. Gain: how much lower",
        "the loss is, with its 95 % interval. A short run on one small base: it shows that each method learns and what",
        "it costs, not which is best for another model, length or learning rate. Tokens a second hold for this machine",
        "and beside one another.",
        "",
        f"Made by `{COMMAND}`.",
        "",
        "| method | held-out loss | gain [95 %] | trained | adapter | tokens/s | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in sorted(rows.items(), key=lambda item: item[1]["tuned_loss"]):
        low, high = r["gain_ci95"]
        lines.append(
            f"| [{name}]({name}.md) | {r['tuned_loss']:.3f} | {r['gain']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {100 * r['trainable_params'] / r['total_params']:.3f} % | {r['adapter_bytes'] / 1e6:.2f} MB "
            f"| {r['tokens_per_second']:.0f} | {r['peak_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="which; all, if none is named")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE / "runs/methods")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        (method,) = args.methods
        train_and_measure(method, args.model, args.steps, args.out / method)
        return
    failed = []
    for method in args.methods or built_in():
        if not (args.out / method / "eval-test.json").is_file():
            command = [sys.executable, __file__, method, "--one", "--steps", str(args.steps)]
            done = subprocess.run([*command, "--model", args.model, "--out", str(args.out)])
            failed += [method] if done.returncode else []
        if method not in failed:
            r = figures(args.out / method)
            print(f"{method:18} {r['base_loss']:.3f} -> {r['tuned_loss']:.3f}  gain {r['gain']:.3f} {r['gain_ci95']}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    there = {m: figures(args.out / m) for m in built_in() if (args.out / m / "eval-test.json").is_file()}
    print(page(there, args.model))
    if set(there) == set(built_in()):
        PAGE.write_text(page(there, args.model))


if __name__ == "__main__":
    main()
