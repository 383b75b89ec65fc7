"""Memory of a training run on a CPU, step by step, for several methods.

    python benchmarks/flat_memory.py [--steps 200] [--methods lora bottleneck …] [--unlimited] [--picture FILE]

Each run is a process of its own, `slimtune train` on the demo's rows. They have many lengths, so each micro-batch has
shapes of its own; what oneDNN and torch keep of older shapes shows as growth. `--unlimited` gives their caches the
1,024 entries that they have without slimtune. Exit code 1: the last step has 5 % more than step 10, or lies outside of
what the plan said.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = Path(__file__).parents[1] / "examples/devils-dictionary/train.jsonl"
METHODS = ("lora", "bottleneck", "prefix_tuning", "prompt_tuning", "ia3")
MOST_GROWTH = 1.05


def train(method: str, steps: int, unlimited: bool) -> tuple[list[int], dict[str, float]]:
    """Run a training; return the bytes after each step, and the plan's range of them."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "slimtune", "train", "--model", "smollm2-135m", "--data", str(ROWS)]
        command += ["--method", method, "--max-steps", str(steps), "--out", str(run), "--batch-size", "8"]
        command += ["--set", "data.validation_fraction=0"]
        caches = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "1024") if unlimited else {}
        done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"slimtune train failed:\n{done.stderr[-3000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        plan = json.loads((run / "plan.json").read_text())["plan"]
        return [r["memory_bytes"] for r in rows if "train_loss" in r], plan["need_bytes"]


def draw(found: dict[str, list[int]], file: Path) -> None:
    """Write a picture of the memory of each run."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for method, memory in found.items():
        axes.plot(range(1, len(memory) + 1), [m / 2**20 for m in memory], label=method)
    top = 1.15 * max(map(max, found.values())) / 2**20
    axes.set(xlabel="step", ylabel="resident memory, MiB", ylim=(0, top))
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the methods, print a table, and exit with 1 if a run grew or its plan was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--unlimited", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    failed, found = False, {}
    print(f"{'method':<16}{'step 1':>9}{'step 10':>9}{'last':>9}{'growth':>8}{'planned, MiB':>18}")
    for method in options.methods:
        memory, planned = train(method, options.steps, options.unlimited)
        found[method] = memory
        growth = memory[-1] / memory[9]
        failed |= growth > MOST_GROWTH or not planned["low"] <= memory[-1] <= planned["high"]
        first, tenth, last, low, high = (b / 2**20 for b in (memory[0], memory[9], memory[-1], *planned.values()))
        print(f"{method:<16}{first:>9.0f}{tenth:>9.0f}{last:>9.0f}{growth:>8.3f}{low:>10.0f} to {high:.0f}", flush=True)
    if options.picture:
        draw(found, options.picture)
    sys.exit(failed)


if __name__ == "__main__":
    main()
