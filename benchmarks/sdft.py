"""Does self-distillation (sdft) forget less than sft for the same gain? Both at several strengths of their adapters.

    python benchmarks/first_run_jobs.py --texts texts --out JOBS
    python benchmarks/sdft.py JOBS/shop-answers JOBS/json-orders JOBS/clinic-answers --out sdft.jsonl
    python benchmarks/sdft.py --table sdft.jsonl

Both tasks train on the same rows with their defaults and without a budget of forgetting. The answers that sdft
samples have at most `--longest` tokens, a few more than those of the rows: the base goes on until it is stopped. Of
each run a line of JSON has the loss and the accuracy of the held-out answers, and forgetting: the rise of the loss on
the kind of general text where it rises most; of sft for strengths from 0 to 1. The table compares sdft with sft at
the strength that gives sft the same gain, interpolated, so that a run is not called better because it learned less.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from first_runs import list_job_flags
from forgetting import measure_strengths

from slimtune.core.training.datasets import load_eval_dataset_and_stats
from slimtune.core.training.trained_model import load_run

STRENGTHS = {"sft": (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)}
"""Of which the loss is measured; of other tasks than sft the whole strength alone."""


def run_job(job: Path, base: str, task: list[str]) -> dict[str, Any]:
    """Train on a job's rows with a task; return what its adapter gains and forgets at each strength."""
    flags = json.loads((job / "flags.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        run = f"{scratch}/run"
        command = ["train", "--model", base, "--data", str(job / f"train.{flags['file']}"), "--out", run]
        started = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                "-m",
                "slimtune",
                *command,
                *list_job_flags(flags, task),
                "--forgetting-budget",
                "null",
                *task,
            ],
            check=True,
        )
        seconds = time.perf_counter() - started
        trained = load_run(run)
        assert trained.recipe is not None
        read = trained.recipe.data, trained.recipe.objective(), trained.base.tokenizer
        rows, _ = load_eval_dataset_and_stats(job / f"held_out.{flags['file']}", *read)
        started = time.perf_counter()
        strengths = [s._asdict() for s in measure_strengths(trained, rows, STRENGTHS.get(task[1], (0.0, 1.0)))]
    spent = {"seconds": seconds, "seconds_of_measuring": time.perf_counter() - started}
    return {"job": job.name, "base": base, "task": task, "rows": len(rows), **spent, "strengths": strengths}


def get_forgetting_at_loss(strengths: list[dict[str, float]], loss: float) -> float | None:
    """Return the forgetting at the first strength that reaches a held-out loss, interpolated; None: none reaches it."""
    for a, b in itertools.pairwise(strengths):
        if b["loss"] <= loss:
            return float(np.interp(-loss, [-a["loss"], -b["loss"]], [a["forgetting"], b["forgetting"]]))
    return None


def format_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each job and each task but sft."""
    lines = [
        "| rows | task | gain | accuracy | forgotten | by `sft` at this gain | gain of `sft` | forgotten by it |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        if "sft" in result["task"]:
            continue
        sft = next(r for r in results if r["job"] == result["job"] and "sft" in r["task"])["strengths"]
        start, end, whole = result["strengths"][0], result["strengths"][-1], sft[-1]
        same = get_forgetting_at_loss(sft, end["loss"])
        cells = (
            result["job"],
            f"`{' '.join(result['task']).replace('--task ', '')}`",
            f"{start['loss'] - end['loss']:+.3f}",
            f"{start['accuracy']:.1%} → {end['accuracy']:.1%}",
            f"{end['forgetting']:+.3f}",
            "not reached" if same is None else f"{same:+.3f}",
            f"{start['loss'] - whole['loss']:+.3f}",
            f"{whole['forgetting']:+.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    return "\n".join(lines)


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, nargs="*")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--task", action="append", help="a task and its flags, in quotes; default: sft, then sdft")
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest answer that sdft samples")
    parser.add_argument("--out", type=Path, default=Path("sdft.jsonl"))
    parser.add_argument("--table", type=Path, help="print the results of a file")
    args = parser.parse_args()
    for job in args.jobs:
        for task in args.task or ["sft", f"sdft --set task.max_completion_length={args.longest}"]:
            words = ["--task", *task.split()]
            if all((r["job"], r["task"]) != (job.name, words) for r in read_results(args.out)):
                result = run_job(job, args.base, words)
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(format_table(read_results(args.table or args.out)))


if __name__ == "__main__":
    main()
