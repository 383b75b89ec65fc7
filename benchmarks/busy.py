"""Speed of a training run on a quiet and on a busy machine, by how long OpenMP's threads spin at a barrier.

    python benchmarks/busy.py [--steps 12] [--rounds 2] [--rivals 2] [--spins default 300000 1000 …] [--json FILE]

Each run is a process of its own, `slimtune train` of the demo's recipe, in turns: quiet, and beside `--rivals`
processes that compute without end. `default` is what slimtune sets itself; 300000 is libgomp's own count.

share    the part of the cores that the run can claim: its threads / (its threads + the rivals)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "examples/devils-dictionary.yaml"
SPIN = "while True: pass"


def train(spin: str, steps: int) -> float:
    """Run a training; return its trained tokens per second."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    if spin != "default":
        env["GOMP_SPINCOUNT"] = spin
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "slimtune", "train", str(RECIPE)]
        for setting in (f"train.max_steps={steps}", f"output_dir={run}", "data.validation=null", "data.test=null"):
            command += ["--set", setting]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"slimtune train failed:\n{done.stderr[-3000:]}")
        return json.loads((run / "result.json").read_text())["tokens_per_second"]


def main() -> None:
    """Run each spin count quiet and busy, in turns; print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rivals", type=int, default=2)
    parser.add_argument("--spins", nargs="+", default=["default", "300000"])
    parser.add_argument("--states", nargs="+", default=["quiet", "busy"], choices=["quiet", "busy"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    speeds: dict[str, dict[str, list[float]]] = {spin: {"quiet": [], "busy": []} for spin in options.spins}
    for _ in range(options.rounds):
        for state in options.states:
            rivals = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(options.rivals * (state == "busy"))]
            try:
                for spin in options.spins:
                    speeds[spin][state].append(train(spin, options.steps))
                    print(f"{spin:>9} {state:<6}{speeds[spin][state][-1]:>8.1f} tokens/s", flush=True)
            finally:
                for rival in rivals:
                    rival.kill()
                    rival.wait()
    share = cores / (cores + options.rivals)
    print(f"\n{cores} cores, {options.rivals} rivals, share {share:.2f}; medians of {options.rounds} rounds, tokens/s")
    print(f"{'spins':>9}{'quiet':>9}{'busy':>9}{'busy / (share · quiet)':>25}")
    for spin, found in speeds.items() if len(options.states) == 2 else ():
        quiet, busy = (statistics.median(found[state]) for state in ("quiet", "busy"))
        print(f"{spin:>9}{quiet:>9.1f}{busy:>9.1f}{busy / (share * quiet):>25.2f}")
    if options.json:
        options.json.write_text(json.dumps(speeds, indent=2) + "\n")


if __name__ == "__main__":
    main()
