"""How much processor time each command takes before it does its work, beside what is wanted of it.

    python benchmarks/startup.py [NAME ...] [--repeats 3] [--json FILE]

Processor seconds of the command's own process and its children, the least of the repeats: what else runs on the machine
makes them longer, but less than it makes seconds on the clock. The runs are those of examples/devils-dictionary, on one
thread. "first step" counts until the first step is in metrics.jsonl, that step included; "merge" merges the adapter of
that one step. A plan is made twice, with an empty cache of plans and with what that left. Exit code 1: a command takes
longer than it may, or ends with another exit code than it should.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "examples/devils-dictionary.yaml")
ROWS = str(ROOT / "examples/devils-dictionary/train.jsonl")
CASES: dict[str, tuple[float, int, list[str]]] = {
    "help": (0.5, 0, ["--help"]),
    "wrong base": (1.0, 2, ["train", "--model", "smollm2-135n", "--data", ROWS, "--out", "{out}"]),
    "wrong file": (1.0, 2, ["train", "--model", "smollm2-135m", "--data", f"{ROWS}x", "--out", "{out}"]),
    "wrong setting": (1.0, 2, ["train", RECIPE, "--set", "train.learing_rate=1", "--out", "{out}"]),
    "wrong value": (1.0, 2, ["train", RECIPE, "--set", "train.epochs=-1", "--out", "{out}"]),
    "wrong method": (1.0, 2, ["train", RECIPE, "--method", "lorra", "--out", "{out}"]),
    "wrong method setting": (1.0, 2, ["train", RECIPE, "--set", "method.rnk=4", "--out", "{out}"]),
    "wrong method value": (1.0, 2, ["train", RECIPE, "--set", "method.rank=0", "--out", "{out}"]),
    "wrong run": (1.0, 2, ["eval", "{out}"]),
    "methods": (1.5, 0, ["methods"]),
    "models": (1.5, 0, ["models"]),
    "plan": (5.0, 0, ["plan", "smollm2-135m"]),
    "plan again": (5.0, 0, ["plan", "smollm2-135m"]),
    "first step": (10.0, 0, ["train", RECIPE, "--max-steps", "1", "--out", "{out}"]),
    "merge": (10.0, 0, ["merge", "{run}", "--out", "{out}"]),
}
"""By name: most processor seconds, the exit code, and the arguments of slimtune."""


def run_command(arguments: list[str], env: dict[str, str], until: Path | None = None) -> tuple[float, int, str]:
    """Run slimtune; return its processor seconds (until the file `until` has a line), exit code and stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "slimtune", *arguments]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = None
    while until is not None and process.poll() is None and seconds is None:
        if until.is_file() and b"\n" in until.read_bytes():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # user and system, children included
        else:
            time.sleep(0.01)
    _, text = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return whole if seconds is None else seconds, process.returncode, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        plans, run = Path(folder, "plans"), Path(folder, "run")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SLIMTUNE_TRACES": str(plans), "HF_HUB_OFFLINE": "1"}
        env["SLIMTUNE_BENCH"] = str(Path(folder, "bench.json"))  # none: a measured machine plans speed, too
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # without its bytecode, Python compiles 3,000 modules at each start
        for name in args.names or CASES:
            limit, code, arguments = CASES[name]
            times = []
            for repeat in range(args.repeats):
                if name == "plan":
                    shutil.rmtree(plans, ignore_errors=True)
                out = Path(folder, f"{name}-{repeat}".replace(" ", "-"))
                out = run if name == "first step" and repeat == 0 else out
                filled = [a.format(out=out, run=run) for a in arguments]
                until = out / "metrics.jsonl" if name == "first step" else None
                seconds, ended, text = run_command(filled, env, until)
                times.append(seconds)
                if ended != code:
                    wrong.append(f"{name}: exit code {ended}, not {code}: {text[-300:]}")
            found[name] = {"seconds": round(min(times), 2), "limit": limit}
            note = "" if min(times) <= limit else "   TOO LONG"
            print(f"{name:22} {min(times):6.2f} s of at most {limit:g}{note}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    print("\n".join(wrong))
    sys.exit(bool(wrong) or any(f["seconds"] > f["limit"] for f in found.values()))


if __name__ == "__main__":
    main()
