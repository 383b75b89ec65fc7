"""How long a plan takes, and what memory: the formula, the whole trace, the whole command, for an 8B and a 70B.

    python benchmarks/plan_speed.py [--json FILE]

Times are processor seconds of a process of its own that has imported everything; a plan uses one core. Of the 8B they
are the least of three processes, since what else runs makes them longer. Exit code 1: a formula of 1 s or more, a trace
of the 8B of 30 s or more, or a plan of 2 GB of memory or more.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

JOB = {"rank": 16, "seq_len": 2048, "gradient_accumulation_steps": 4}
PROCESSES = {"llama-3.1-8b": 3, "llama-3.1-70b": 1}
LIMITS = {"formula": 1.0, "trace": 30.0, "bytes": 2e9}


def measured(name: str) -> dict[str, float]:
    """Plan in this process; return seconds and bytes."""
    import torch

    from slimtune.models.registry import get_model_info
    from slimtune.planning.extrapolate import fit_memory_model
    from slimtune.planning.gpus import find_gpu
    from slimtune.planning.memory_trace import trace_memory
    from slimtune.planning.planner import make_plan
    from slimtune.planning.request import PlanRequest

    torch.set_num_threads(1)
    request = PlanRequest(
        get_model_info(name),
        find_gpu("rtx-3090"),
        settings={"rank": JOB["rank"]},
        seq_len=JOB["seq_len"],
        gradient_accumulation_steps=JOB["gradient_accumulation_steps"],
        checkpointing=True,
    )
    job = request.job("lora")
    fit_memory_model(
        PlanRequest(get_model_info("smollm2-135m"), find_gpu("rtx-3090"), seq_len=256).job("lora")
    )  # what starts up once
    found: dict[str, float] = {}
    for what, run in (
        ("formula", lambda: fit_memory_model(job)),
        ("trace", lambda: trace_memory(job)),
        ("plan", lambda: make_plan(request, "lora")),
    ):
        began = time.process_time()
        run()
        found[what] = time.process_time() - began
    return found | {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def apart(name: str) -> dict[str, float]:
    """Measure in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    found = {}
    print("| base | formula, s | trace, s | plan, s | memory, GB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, processes in PROCESSES.items():
        runs = [apart(name) for _ in range(processes)]
        found[name] = each = {key: (max if key == "bytes" else min)(r[key] for r in runs) for key in runs[0]}
        times = " | ".join(f"{each[k]:.2f}" for k in ("formula", "trace", "plan"))
        print(f"| {name} | {times} | {each['bytes'] / 1e9:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    small, large = found["llama-3.1-8b"], found["llama-3.1-70b"]
    sys.exit(any(small[k] >= limit for k, limit in LIMITS.items()) or large["bytes"] >= LIMITS["bytes"])


if __name__ == "__main__":
    main()
