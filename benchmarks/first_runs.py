"""Small real-life jobs run as a user runs them the first time: no flag but model, data and columns; then `eval`.

    python benchmarks/first_run_jobs.py --texts texts --out JOBS
    python benchmarks/first_runs.py JOBS --out first_runs.jsonl --base smollm2-135m gemma-3-270m.gguf
    python benchmarks/first_runs.py JOBS --out first_runs.jsonl --table

One line of JSON for each run; a run whose line is in the file is not done again. `--train` and `--eval` add flags,
under which a run has its own line: `--train=--lr=3e-4`. The verdict is that of `eval` on the held-out rows and the
general text that comes with slimtune.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def call(*command: str) -> tuple[int, str, str]:
    """Run slimtune; return its exit code and what it printed."""
    done = subprocess.run([sys.executable, "-m", "slimtune", *command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def list_job_flags(job: dict[str, Any], train: list[str]) -> list[str]:
    """Return what a user says of a job's rows; another task of `train` stands in place of the job's."""
    named = [word for column in job.get("column", ()) for word in ("--column", column)]
    keys = [
        key for key in ("task", "format") if key in job and not any(f.partition("=")[0] == f"--{key}" for f in train)
    ]
    return [*named, *(word for key in keys for word in (f"--{key}", job[key]))]


def run_job(folder: Path, base: str, train: list[str], evaluate: list[str]) -> dict[str, Any]:
    """Train and evaluate; return what counts."""
    job = json.loads((folder / "flags.json").read_text())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run = f"{scratch}/run"
        data = ["--model", base, "--data", str(folder / f"train.{job['file']}"), "--out", run]
        code, _, said = call("train", *data, *list_job_flags(job, train), *train)
        if code:
            return {"error": said[-600:]}
        result = json.loads(Path(run, "result.json").read_text())
        trained = time.perf_counter() - started
        held_out = ["--data", str(folder / f"held_out.{job['file']}"), "--json", *evaluate]
        code, printed, said = call("eval", run, *held_out)
    if code not in (0, 1) or not printed.strip():
        return {"error": said[-600:]}
    found = json.loads(printed)
    forgetting, preference = found.get("forgetting"), found.get("preference")
    names = ("loss_reduction", "loss_reduction_ci95", "accuracy_gain", "accuracy_gain_ci95", "improved")
    return {
        "left_out": job["left_out"],
        "passed": found["verdict"]["passed"],
        "reasons": found["verdict"]["reasons"],
        "warning": found["verdict"]["warning"],
        **{name: found[name] for name in names if name in found},
        "forgotten": forgetting and forgetting["change"],
        "forgotten_ci95": forgetting and forgetting["change_ci95"],
        "pairs_gain": preference and preference.get("accuracy_gain"),
        "pairs_gain_ci95": preference and preference.get("accuracy_gain_ci95"),
        "strength": (result.get("forgetting") or {}).get("strength"),
        "steps": result["steps"],
        "learning_rate": result.get("learning_rate"),
        "train_seconds": round(trained, 1),
        "eval_seconds": round(time.perf_counter() - started - trained, 1),
    }


def format_table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as Markdown, a column for each base and flags."""
    keys = list(dict.fromkeys((Path(r["base"]).stem, r["train"]) for r in runs))
    lines = ["| job |" + "".join(f" {base} {flags} |" for base, flags in keys), "|---|" + "---|" * len(keys)]
    for job in dict.fromkeys(r["job"] for r in runs):
        own = {(Path(r["base"]).stem, r["train"]): r for r in runs if r["job"] == job}
        lines.append(f"| {job} |" + "".join(f" {describe(own[k]) if k in own else ''} |" for k in keys))
    passed = [[r.get("passed", False) for r in runs if (Path(r["base"]).stem, r["train"]) == k] for k in keys]
    return "\n".join([*lines, "| better |" + "".join(f" {sum(p)} of {len(p)} |" for p in passed)])


def describe(run: dict[str, Any]) -> str:
    """Return the gain, what was forgotten, and the verdict of a run."""
    if "error" in run:
        return "error"
    gain = run.get("pairs_gain")
    gain = run.get("loss_reduction", run.get("accuracy_gain")) if gain is None else gain
    forgotten = "" if run["forgotten"] is None else f", forgot {run['forgotten']:.3f}"
    return f"{'better' if run['passed'] else '**no**'}: {gain:+.3f}{forgotten}"


def main() -> None:
    """Append a line for each run that has none yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--job", nargs="+", help="names of jobs; default: those that defaults are chosen by")
    parser.add_argument("--left-out", action="store_true", help="the jobs that were left out when defaults were chosen")
    parser.add_argument("--train", action="append", default=[], help="a flag for `train`, as --train=--lr=3e-4")
    parser.add_argument("--eval", action="append", default=[], help="a flag for `eval`")
    parser.add_argument("--table", action="store_true", help="print the runs as Markdown and train nothing")
    args = parser.parse_args()
    runs = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(format_table(runs))
        return
    done = {(r["job"], r["base"], r["train"]) for r in runs}
    for base in args.base:
        for folder in sorted(f.parent for f in args.jobs.glob("*/flags.json")):
            left_out = json.loads((folder / "flags.json").read_text())["left_out"]
            chosen = folder.name in args.job if args.job else left_out == args.left_out
            if not chosen or (folder.name, base, " ".join(args.train)) in done:
                continue
            line = {"job": folder.name, "base": base, "train": " ".join(args.train)}
            line |= run_job(folder, base, args.train, args.eval)
            with args.out.open("a") as out:
                print(json.dumps(line), file=out)
            print(line, flush=True)


if __name__ == "__main__":
    main()
