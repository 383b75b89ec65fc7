"""A run with tuned settings beside the default recipe, on test rows that neither the search nor the training saw.

    python benchmarks/make_data_sets.py --out SETS
    python benchmarks/tuned.py SETS --out FOLDER [--method lora] [--rows 96] [--trials 12] [--over PATH=RANGE …]

For each data set: `slimtune train` with the defaults, `slimtune tune` of the same recipe, `slimtune train` of the best
recipe, and `slimtune eval` of both on the test rows. The difference is default minus tuned, in nats a token, with its
95 % interval over rows. What is finished is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from make_data_sets import take_rows

from slimtune.evaluation.statistics import format_interval, paired_bootstrap

OVER = ("train.learning_rate=log:3e-4..1e-2", "train.epochs=3,5,8,12", "method.r=8,16,32")


def run_slimtune(*words: object, check: bool = True) -> None:
    """Run a command; its errors are shown."""
    subprocess.run([sys.executable, "-m", "slimtune", *map(str, words)], check=check, stdout=subprocess.DEVNULL)


def write_recipe(data_set: Path, folder: Path, args: argparse.Namespace) -> Path:
    """Write the default recipe for a data set, of at most `--rows` training rows; the others are test rows."""
    data = take_rows(json.loads((data_set / "data.json").read_text()), args.rows, folder.absolute())
    recipe = {"model": args.model, "data": data, "method": {"name": args.method}}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**recipe, "output_dir": str(folder / "default")}), encoding="utf-8")
    return file


def measure_run(run: Path, recipe: Path) -> list[dict[str, Any]]:
    """Train a recipe and evaluate it, unless that is done; return the losses of each test row."""
    scores = run / "scores-test.json"
    if not scores.is_file():
        if not (run / "result.json").is_file():
            run_slimtune("train", recipe, "--out", run, *(["--resume"] if run.exists() else []))
        # Its exit code is 1 if the run forgot much general text, too.
        run_slimtune("eval", run, "--split", "test", "--generate", 0, check=False)
    return json.loads(scores.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--at-once", type=int, default=4, help="trials that train together")
    parser.add_argument("--over", nargs="+", default=list(OVER))
    args = parser.parse_args()
    print("| data set | best settings | default | tuned | difference [95 %] |\n| --- | --- | ---: | ---: | ---: |")
    for data_set in sorted(p.parent for p in args.sets.glob("*/data.json")):
        folder = args.out / data_set.name
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.yaml"
        if not recipe.is_file():
            write_recipe(data_set, folder, args)
        default = measure_run(folder / "default", recipe)
        over = [word for text in args.over for word in ("--over", text)]
        run_slimtune(
            "tune", recipe, *over, "--trials", args.trials, "--at-once", args.at_once, "--out", folder / "search"
        )
        best = json.loads((folder / "search" / "tune.json").read_text())["best"]["values"]
        tuned = measure_run(folder / "tuned", folder / "search" / "best.yaml")
        losses = ([row["tuned"] for row in rows] for rows in (default, tuned))
        first, second, difference = paired_bootstrap(*losses, [row["tokens"] for row in default])
        settings = ", ".join(f"{path.partition('.')[2]} {value}" for path, value in best.items())
        figures = f"{first.value:.4f} | {second.value:.4f} | {difference.value:.4f}"
        print(f"| {data_set.name} | {settings} | {figures} [{format_interval(*difference.ci95)}] |", flush=True)


if __name__ == "__main__":
    main()
