"""How long `slimtune plan` takes for every base of `slimtune models`, and what it answers.

    python benchmarks/plan_every_base.py [--gpu rtx-4090] [BASE or family ...]

Times are processor seconds (user and system) of the whole command in a process of its own, without traces of earlier
plans. The modules must be compiled, as `pip` does it: with PYTHONDONTWRITEBYTECODE set in an environment that is not,
every command compiles 3,000 modules again, which takes 5 s. The table comes as it is measured; the slowest bases come
at the end. Exit code 1: a plan of 10 s or more, or one that ends without an answer or a reason.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile

from slimtune.planning.known_bases import list_known_bases

LIMIT_S = 10.0
SLOWEST = 10


def plan_base(name: str, gpu: str) -> tuple[float, str, bool]:
    """Plan a base; return processor seconds, the answer or the reason, and whether there is one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "slimtune", "plan", name, *(["--gpu", gpu] if gpu else [])]
    with tempfile.TemporaryDirectory() as traces:
        environment = {**os.environ, "SLIMTUNE_TRACES": traces, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode == 0:
        return seconds, done.stdout.partition(" on ")[0].partition(" with lora ")[2], True
    reasons = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return seconds, " | ".join(reasons) or done.stderr[-200:], len(reasons) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", metavar="BASE")
    parser.add_argument("--gpu", default="rtx-4090", help='"": this machine')
    args = parser.parse_args()
    named = [base for name in args.bases or [None] for base in list_known_bases(name)]
    found = {}
    print("| base | CPU, s | answer |\n| --- | ---: | --- |", flush=True)
    for base in dict.fromkeys(base.name for base in named):
        found[base] = seconds, answer, _ = plan_base(base, args.gpu)
        print(f"| {base} | {seconds:.1f} | {answer} |", flush=True)
    slowest = sorted(found, key=lambda base: found[base][0], reverse=True)[:SLOWEST]
    print(f"\nslowest: {', '.join(f'{base} {found[base][0]:.1f} s' for base in slowest)}")
    sys.exit(any(seconds >= LIMIT_S or not is_answered for seconds, _, is_answered in found.values()))


if __name__ == "__main__":
    main()
